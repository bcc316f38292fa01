"""What is measured on graded replies, as one torchmetric: exact over uneven shards of several processes.

Lives here: ``ReplyMetrics``. It keeps sums only (reduced by addition), so every reply counts once however the replies
were divided. Knows no Trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from pause_lightning.stats import wilson_interval

_SUMS = ("n", "correct", "reference", "pauses", "pauses_correct", "tokens", "finished", "unanswered")


class ReplyMetrics(Metric):
    """Accuracy with its 95% interval, pauses (overall, correct, incorrect), lengths and shares.

    ``compute`` gives floats: accuracy, accuracy_low, accuracy_high (Wilson 95%), reference_accuracy (the usual rule),
    n, pauses, pauses_correct, pauses_incorrect (mean per reply; nan for an empty group), pause_rate (share of tokens
    that are pauses), reply_length (tokens, pauses and EOS included), finished (share that ended with EOS), no_answer
    (share without a final answer).
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, *, correct: bool, reference_correct: bool, pauses: int, tokens: int, finished: bool, answered: bool
    ) -> None:
        """Count one reply of ``tokens`` tokens."""
        self.n += 1
        self.correct += correct
        self.reference += reference_correct
        self.pauses += pauses
        self.pauses_correct += pauses if correct else 0
        self.tokens += tokens
        self.finished += finished
        self.unanswered += not answered

    def compute(self) -> dict[str, float]:
        s = {name: float(getattr(self, name)) for name in _SUMS}
        low, high = wilson_interval(s["correct"], s["n"])
        return {
            "accuracy": _ratio(s["correct"], s["n"]),
            "accuracy_low": low,
            "accuracy_high": high,
            "reference_accuracy": _ratio(s["reference"], s["n"]),
            "n": s["n"],
            "pauses": _ratio(s["pauses"], s["n"]),
            "pauses_correct": _ratio(s["pauses_correct"], s["correct"]),
            "pauses_incorrect": _ratio(s["pauses"] - s["pauses_correct"], s["n"] - s["correct"]),
            "pause_rate": _ratio(s["pauses"], s["tokens"]),
            "reply_length": _ratio(s["tokens"], s["n"]),
            "finished": _ratio(s["finished"], s["n"]),
            "no_answer": _ratio(s["unanswered"], s["n"]),
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
