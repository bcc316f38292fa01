"""How often a pause model pauses when it speaks: logits processors for HF ``generate``.

Lives here: ``GateTemperature`` and ``PauseTemperature``, and ``LogprobRecorder`` which only listens. They act on
logits [B, V] and need no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor


class GateTemperature(LogitsProcessor):
    """p(pause) = sigmoid(g / temperature); the other tokens share the rest as before (reference.md 2.2)."""

    def __init__(self, pause_id: int, temperature: float) -> None:
        self.pause_id, self.temperature = pause_id, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().clone()
        others = _others(scores, self.pause_id)
        gate = scores[:, self.pause_id] - others
        scores[:, self.pause_id] = gate / self.temperature + others
        return scores


class PauseTemperature(LogitsProcessor):
    """Multiplies the odds of pausing, under sampling temperature tau, by ``temperature`` (reference.md 6).

    With p the probability at tau: p' = T p / (1 - p + T p), the others scaled by (1 - p') / (1 - p). 0 forbids
    pauses, 1 changes nothing. In logits that is one addition: tau * log T to the pause column.
    """

    def __init__(self, pause_id: int, temperature: float, tau: float = 1.0) -> None:
        self.pause_id = pause_id
        self.shift = tau * math.log(temperature) if temperature > 0 else float("-inf")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().clone()
        # A row in which only the pause is possible keeps it, as there is nothing else to say.
        forced = torch.isneginf(_others(scores, self.pause_id))
        shifted = scores[:, self.pause_id] + self.shift
        scores[:, self.pause_id] = torch.where(forced, scores[:, self.pause_id], shifted)
        return scores


class LogprobRecorder(LogitsProcessor):
    """First in the list, sees the model's own logits: keeps the log-probability of the token each step then drew.

    A step's token is known at the next call only; ``finish`` adds the last one. ``on_step(0)`` is called at each step.
    """

    def __init__(self, on_step: Callable[[int], None] | None = None) -> None:
        self.on_step = on_step
        self.last: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.on_step is not None:
            self.on_step(0)
        self._take(input_ids[:, -1])
        self.last = scores.float()
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self.last is not None:
            chosen = self.last.gather(1, tokens.unsqueeze(1)).squeeze(1)
            self.columns.append(chosen - self.last.logsumexp(-1))

    def finish(self, output: Tensor) -> Tensor:
        """output [B, width + steps] -> log-probabilities [B, steps]."""
        self._take(output[:, -1])
        return torch.stack(self.columns, 1) if self.columns else output.new_zeros((len(output), 0), dtype=torch.float)


def _others(scores: Tensor, pause_id: int) -> Tensor:
    masked = scores.clone()
    masked[:, pause_id] = float("-inf")
    return masked.logsumexp(-1)
