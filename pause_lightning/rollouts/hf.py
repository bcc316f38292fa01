"""The reference engine: HF ``generate`` on batches of prompts of similar length.

Lives here: ``HFSampler``. All processing of the logits is stated here in the order it happens; ``generate`` is given a
generation config of its own so that nothing a model folder brings along (top_k = 50, a repetition penalty) is applied.
transformers is imported on first use, as the command line knows this class by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pause_lightning.rollouts.sampler import Reply, Sampler, SamplingSettings


class HFSampler(Sampler):
    """HF ``generate`` with KV cache, left padding, batches sorted by prompt length.

    Args:
        batch_size: replies generated side by side
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        seed: int,
        *,
        eos_id: int,
        pad_id: int,
        on_progress: Callable[[int], None] | None = None,
        on_token: Callable[[int], None] | None = None,
        in_step: bool = False,
    ) -> list[Reply]:
        """See ``Sampler.sample``. ``on_token`` is told the ids of a single reply as they are drawn.

        ``in_step``: all processes call this together, each with prompts of its own or none, and every forward is one
        of all processes (sharded weights).
        """
        replies: list[Reply | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(order), self.batch_size):
                chunk = order[start : start + self.batch_size]
                if in_step:
                    _any_left(model, True)
                batch = self._generate(
                    model, [prompts[i] for i in chunk], settings, eos_id, pad_id, on_token, on_progress, in_step
                )
                for i, reply in zip(chunk, batch):
                    replies[i] = reply
                if on_progress is not None:
                    on_progress(len(chunk))
            while in_step and _any_left(model, False):
                idle = SamplingSettings(temperature=0.0, max_new_tokens=1)
                self._generate(model, [[eos_id]], idle, eos_id, pad_id, None, None, in_step)
        return replies  # type: ignore[return-value]

    def _generate(
        self,
        model: Any,
        prompts: list[Sequence[int]],
        settings: SamplingSettings,
        eos_id: int,
        pad_id: int,
        on_token: Callable[[int], None] | None,
        on_progress: Callable[[int], None] | None,
        in_step: bool,
    ) -> list[Reply]:
        from transformers import GenerationConfig, LogitsProcessorList

        from pause_lightning.pause.logits import LogprobRecorder
        from pause_lightning.pause.model import context_length

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        room = settings.max_new_tokens
        if (context := context_length(model.config)) is not None:
            room = min(room, context - width)
        recorder = LogprobRecorder(on_progress)
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=settings.temperature > 0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            # One buffer for keys and values: a growing one is copied whole at every step (half the time on CPU). But in
            # step with others a finished batch goes on, past the end of a buffer.
            cache_implementation=None if in_step else "static",
            disable_compile=True,  # which generate() would do by itself on CUDA, for every new shape
        )
        # generate() fills what is left open here from the model's own generation config: give it none.
        own, model.generation_config = model.generation_config, GenerationConfig()
        # It also makes the buffer as long as that of any call before, and a longer one changes the last bits of the logits:
        # replies would depend on what the process has sampled earlier.
        model.__dict__.pop("_previous_max_cache_length", None)
        try:
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder, *_processors(model, settings)]),
                streamer=None if on_token is None else _TokenStream(on_token),
                synced_gpus=in_step,
            )
        finally:
            model.generation_config = own
        logprobs = recorder.finish(output).tolist()
        replies = []
        for row, sampled in enumerate(output[:, width:].tolist()):
            finished = eos_id in sampled
            length = sampled.index(eos_id) + 1 if finished else len(sampled)
            replies.append(Reply(sampled[:length], logprobs[row][:length], "eos" if finished else "length"))
        return replies


def _any_left(model: Any, mine: bool) -> bool:
    """Whether any process has prompts left; called once per batch by all."""
    left = torch.tensor(int(mine), device=model.device)
    torch.distributed.all_reduce(left, op=torch.distributed.ReduceOp.MAX)
    return bool(left)


def _processors(model: Any, settings: SamplingSettings) -> list[Any]:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from pause_lightning.pause.logits import GateTemperature, PauseTemperature

    processors: list[Any] = []
    pause_id = getattr(model.config, "pause_token_id", None)
    tau = settings.temperature or 1.0
    if pause_id is not None and settings.gate_temperature != 1:
        processors.append(GateTemperature(pause_id, settings.gate_temperature))
    if pause_id is not None and settings.pause_temperature != 1:
        processors.append(PauseTemperature(pause_id, settings.pause_temperature, tau))
    if tau != 1:
        processors.append(TemperatureLogitsWarper(tau))
    if settings.temperature > 0 and settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.temperature > 0 and settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    return processors


class _TokenStream:
    """The streamer protocol of ``generate`` for one reply: the first ``put`` is the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.on_token(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""
