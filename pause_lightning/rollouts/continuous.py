"""A sampling engine that never waits for the longest reply: a finished slot takes the next prompt at once.

Lives here: ``ContinuousSampler`` and its cache. It drives any HF causal LM with plain causal attention through the model's
own forward: slots of different lengths side by side without left padding, one prefill per prompt for all its samples,
fewer slots when the prompts run out. Each reply has a random stream of its own, so it depends on (weights, prompt,
settings, seed, its place among the prompts) and, but for rounding, not on what is sampled beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pause_lightning.errors import UserError
from pause_lightning.rollouts.sampler import Reply, Sampler, SamplingSettings

ALIGN = 32  # attention looks at a multiple of so many positions: fewer different shapes
BLOCK = 128


class ContinuousSampler(Sampler):
    """Slots that are refilled as replies end.

    Args:
        slots: replies generated side by side
        refill: free slots to wait for before new prompts are read in, as a share of the slots
    """

    def __init__(self, slots: int = 64, refill: float = 0.1) -> None:
        if slots < 1:
            raise UserError(f"model.sampler.slots must be at least 1, got {slots}")
        if not 0 <= refill <= 1:
            raise UserError(f"model.sampler.refill must lie between 0 and 1, got {refill}")
        self.slots, self.refill = slots, refill

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
    ) -> list[Reply]:
        """See ``Sampler.sample``. Raises: UserError for an architecture whose attention it does not know."""
        from pause_lightning.pause.model import context_length
        from pause_lightning.rollouts.hf import _processors

        context = context_length(model.config) or max(map(len, prompts), default=0) + settings.max_new_tokens
        rooms = [min(settings.max_new_tokens, context - len(p)) for p in prompts]
        width = max((len(p) + r for p, r in zip(prompts, rooms)), default=1)
        _check_attention(model.config, width)
        streams = _uniforms(seed, len(prompts), max(rooms, default=1), model.device)
        # The same prompts come one after the other: they share a prefill.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        state = _Slots(model, min(self.slots, len(prompts)), width)
        draw = _Draw(_processors(model, settings), greedy=settings.temperature == 0)
        replies: list[Reply | None] = [None] * len(prompts)
        waiting = iter(order)
        left = len(order)
        while left or state.busy:
            free = state.free()
            if left and (len(free) >= max(1, int(self.refill * state.size)) or not state.busy):
                taken = [next(waiting) for _ in range(min(len(free), left))]
                left -= len(taken)
                logits = state.take(free[: len(taken)], taken, [prompts[i] for i in taken], [rooms[i] for i in taken])
                state.add(free[: len(taken)], *draw(logits, streams[taken, 0]))
            else:
                if not left:
                    state.compact()
                used = state.drawn
                logits = state.step()
                state.add(list(range(state.size)), *draw(logits, streams[state.numbers.clamp(min=0), used]))
            done = state.finished(eos_id)
            for number, ids, logprobs in done:
                replies[number] = Reply(ids, logprobs, "eos" if ids[-1] == eos_id else "length")
            if on_progress is not None:
                on_progress(len(done))
        return replies  # type: ignore[return-value]


class _Draw:
    """logits [A, V], uniforms [A] -> (tokens [A], their log-probabilities under the model itself [A])."""

    def __init__(self, processors: list[Any], greedy: bool) -> None:
        self.processors, self.greedy = processors, greedy

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        own = logits.logsumexp(-1)
        scores = logits
        for process in self.processors:
            scores = process(None, scores)
        tokens = scores.argmax(-1) if self.greedy else inverse_cdf(scores, uniform)
        return tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - own


def inverse_cdf(scores: Tensor, uniform: Tensor) -> Tensor:
    """Tokens drawn from softmax(scores [A, V]) by inverse CDF, in two levels: the block of 128 tokens, then inside it.

    uniform [A] in [0, 1), float64. Several times faster than ``torch.multinomial`` at 50,000 tokens.
    """
    rows, vocab = scores.shape
    blocks = -(-vocab // BLOCK)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    if blocks * BLOCK != vocab:
        p = torch.nn.functional.pad(p, (0, blocks * BLOCK - vocab))
    p = p.view(rows, blocks, BLOCK)
    heads = p.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.unsqueeze(1) * heads[:, -1:]
    block = torch.searchsorted(heads, target, right=True).clamp(max=blocks - 1)
    before = torch.where(block > 0, heads.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(target))
    inside = p[torch.arange(rows, device=p.device), block[:, 0]].double().cumsum(-1)
    # What rounding leaves over goes to the last token of the block that is possible at all.
    place = torch.searchsorted(inside, (target - before).clamp(min=0), right=True)
    place = torch.minimum(place, torch.searchsorted(inside, inside[:, -1:].contiguous()))
    return (block * BLOCK + place).squeeze(1)


def _uniforms(seed: int, replies: int, steps: int, device: torch.device) -> Tensor:
    """[replies, steps] uniform numbers, a row a function of (seed, its number) alone."""
    from pause_lightning.batches import stable_seed

    rows = torch.empty(replies, max(steps, 1), dtype=torch.float64)
    generator = torch.Generator()
    for number in range(replies):
        generator.manual_seed(stable_seed(seed, "reply", number))
        rows[number] = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64)
    return rows.to(device)


class _Slots:
    """The replies that are being generated, and the keys and values of their tokens."""

    def __init__(self, model: Any, size: int, width: int) -> None:
        self.model, self.size, self.width = model, size, -(-width // ALIGN) * ALIGN
        self.cache = slot_cache(model, size, self.width)
        forward = inspect.signature(model.forward).parameters
        self.cached = "cache" if "cache" in forward else "past_key_values"  # renamed in transformers 5.24
        device = model.device
        zeros = torch.zeros(size, dtype=torch.long, device=device)
        self.numbers, self.length, self.drawn, self.room = zeros - 1, zeros.clone(), zeros.clone(), zeros.clone()
        self.last = zeros.clone()
        self.ids = torch.zeros(size, self.width, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, self.width, device=device)

    @property
    def busy(self) -> bool:
        return bool((self.numbers >= 0).any())

    def free(self) -> list[int]:
        return (self.numbers < 0).nonzero().flatten().tolist()

    def take(self, slots: list[int], numbers: list[int], prompts: list[Sequence[int]], rooms: list[int]) -> Tensor:
        """Read prompts into free slots; returns the logits after each, [n, V]."""
        from transformers import DynamicCache

        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(p), len(distinct)) for p in prompts]
        lengths = torch.tensor([len(p) for p in distinct], device=self.last.device)
        ids = torch.zeros(len(distinct), int(lengths.max()), dtype=torch.long, device=self.last.device)
        for row, prompt in enumerate(distinct):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        cache = DynamicCache()
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)).long()
        ends, end = (lengths - 1).unique(return_inverse=True)  # the LM head sees these positions only
        logits = self.model(
            input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=ends, **{self.cached: cache}
        ).logits[torch.arange(len(distinct), device=ids.device), end]
        self.cache.fill(slots, which, cache, ids.shape[1])
        chosen = torch.tensor(slots, device=ids.device)
        self.numbers[chosen] = torch.tensor(numbers, device=ids.device)
        self.length[chosen] = lengths[which]
        self.room[chosen] = torch.tensor(rooms, device=ids.device)
        self.drawn[chosen] = 0
        return logits[which]

    def step(self) -> Tensor:
        """One forward of the last token of every slot; returns logits [size, V]. Idle slots compute nonsense."""
        reach = -(-(int(self.length.max()) + 1) // ALIGN) * ALIGN
        position = self.length.clamp(max=self.width - 1)
        seen = torch.arange(reach, device=position.device) <= position.unsqueeze(1)
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        self.cache.at, self.cache.reach = position, reach
        logits = self.model(
            input_ids=self.last.unsqueeze(1),
            attention_mask=mask[:, None, None],
            position_ids=position.unsqueeze(1),
            use_cache=True,
            **{self.cached: self.cache},
        ).logits[:, -1]
        self.length += self.numbers >= 0
        return logits

    def add(self, slots: list[int], tokens: Tensor, logprobs: Tensor) -> None:
        chosen = torch.tensor(slots, device=tokens.device)
        chosen, mine = chosen[self.numbers[chosen] >= 0], self.numbers[chosen] >= 0
        self.last[chosen] = tokens[mine]
        self.ids[chosen, self.drawn[chosen]] = tokens[mine]
        self.logprobs[chosen, self.drawn[chosen]] = logprobs[mine]
        self.drawn[chosen] += 1

    def finished(self, eos_id: int) -> list[tuple[int, list[int], list[float]]]:
        """(number, ids, log-probabilities) of the replies that have ended; their slots are free."""
        ended = (self.numbers >= 0) & ((self.last == eos_id) | (self.drawn >= self.room))
        done = []
        for slot in ended.nonzero().flatten().tolist():
            n = int(self.drawn[slot])
            done.append((int(self.numbers[slot]), self.ids[slot, :n].tolist(), self.logprobs[slot, :n].tolist()))
        self.numbers[ended], self.length[ended], self.drawn[ended] = -1, 0, 0
        return done

    def compact(self) -> None:
        """No prompts are left: give up idle slots when they are an eighth or more."""
        busy = (self.numbers >= 0).nonzero().flatten()
        if len(busy) > self.size * 7 // 8:
            return
        self.cache.keep(busy, int(self.length.max()))
        for name in ("numbers", "length", "drawn", "room", "last", "ids", "logprobs"):
            setattr(self, name, getattr(self, name)[busy])
        self.size = len(busy)


def slot_cache(model: Any, size: int, width: int) -> Any:
    """A HF cache of ``size`` rows of ``width`` positions, in which every row has a position of its own."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class SlotLayer(CacheLayerMixin):
        is_sliding = False
        keys: Any = None
        values: Any = None

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
            def room(states: Any) -> Tensor:
                return states.new_zeros(size, states.shape[1], width, states.shape[-1])

            self.keys, self.values, self.is_initialized = room(key_states), room(value_states), True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.keys is None:
                self.lazy_initialization(key_states, value_states)
            rows = torch.arange(len(key_states), device=key_states.device)
            self.keys[rows, :, cache.at] = key_states[:, :, 0]
            self.values[rows, :, cache.at] = value_states[:, :, 0]
            return self.keys[: len(rows), :, : cache.reach], self.values[: len(rows), :, : cache.reach]

        def get_seq_length(self) -> int:
            return cache.reach - 1

        def get_max_length(self) -> int:
            return width

        get_max_cache_shape = get_max_length  # its name before transformers 5.24

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            return cache.reach, 0

    class SlotCache(Cache):
        at: Tensor
        reach: int = 1

        def fill(self, slots: list[int], which: list[int], prefilled: Any, length: int) -> None:
            for layer, source in zip(self.layers, prefilled.layers):
                if layer.keys is None:
                    layer.lazy_initialization(source.keys, source.values)
                layer.keys[slots, :, :length] = source.keys[which]
                layer.values[slots, :, :length] = source.values[which]

        def keep(self, rows: Tensor, length: int) -> None:
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    states[: len(rows), :, :length] = states[rows, :, :length]

    cache = SlotCache(layers=[SlotLayer() for _ in range(model.config.num_hidden_layers)])
    return cache


def _check_attention(config: Any, width: int) -> None:
    """A sliding window is no obstacle as long as prompt and reply fit into it."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others or (window is not None and width > window):
        what = ", ".join(sorted(others)) or f"a sliding window of {window}, prompt and reply take up to {width}"
        raise UserError(
            f"model.sampler: ContinuousSampler knows plain causal attention only; {config.model_type} has {what}. "
            "Use pause_lightning.rollouts.hf.HFSampler"
        )
