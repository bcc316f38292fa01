"""What a sampler is: prompts as ids, settings and a seed go in, replies as ids come out.

Lives here: ``SamplingSettings``, ``Reply`` and the ``Sampler`` protocol. Engines are files of their own beside this
one (``hf.py``) and are chosen by class path: ``--model.sampler my.package.MySampler``. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pause_lightning.errors import UserError

FinishReason = Literal["eos", "length"]


@dataclass
class SamplingSettings:
    """How replies are drawn. Nothing else is applied: no hidden top-k, no repetition penalty.

    Args:
        temperature: divides the logits; 0 is greedy decoding
        top_k: keep the k most likely tokens; 0 keeps all
        top_p: keep the smallest set of tokens with this much probability; 1 keeps all
        max_new_tokens: longest reply, pauses and EOS included; the model's context also ends a reply
        pause_temperature: multiplies the odds of pausing: 0 forbids pauses, 1 leaves the model's law, 2 doubles the odds
        gate_temperature: p(pause) = sigmoid(gate logit / gate_temperature); 1 leaves the model's law
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 400
    pause_temperature: float = 1.0
    gate_temperature: float = 1.0

    def check(self, key: str) -> None:
        """Raises: UserError naming the setting (under ``key``) that is out of range."""
        for name, ok, wanted in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("pause_temperature", self.pause_temperature >= 0, ">= 0"),
            ("gate_temperature", self.gate_temperature > 0, "> 0"),
        ):
            if not ok:
                raise UserError(f"{key}.{name} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Reply:
    """One sampled reply.

    ``ids``: the sampled ids, EOS included when there is one, no pads. ``logprobs``: the log-probability of each id
    under the model itself (temperature 1, nothing truncated, no pause control), whatever law it was drawn from.
    ``finish_reason``: "eos", or "length" when it was cut off.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


class Sampler:
    """Base of the sampling engines. Subclass it, implement ``sample``, name the class in ``model.sampler``."""

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
    ) -> list[Reply]:
        """One reply per prompt, in order. Repeat a prompt to sample it several times.

        The result is a function of (weights, prompts, settings, seed): the global random state is neither read nor
        changed. ``on_progress`` is told how many replies have been finished since the last call, now and then 0; it may
        raise, to stop sampling.
        """
        raise NotImplementedError
