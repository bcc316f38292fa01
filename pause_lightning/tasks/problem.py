"""What a problem and a task are, and how problems are split: by question, once and for ever.

Lives here: ``Problem``, ``Task`` (the base of all tasks) and the splitting. Reading files is ``gsm8k.py``'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pause_lightning.tasks.grading import Grade, grade_gsm8k


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer.

    Args:
        question: as it is put into the prompt
        answer: the rationale and the final answer, without pauses
        answer_ids: the answer as token ids with pauses, when it comes from a data set that ``inject`` has written
    """

    question: str
    answer: str
    answer_ids: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        """A stable id of the question; copies of a question share it."""
        return hashlib.sha256(" ".join(self.question.split()).encode()).hexdigest()[:16]


Splits = dict[str, list[Problem]]


class Task:
    """Base of the tasks: implement ``load``; override ``grade`` where GSM8K's rule does not fit."""

    pause_token: str | None = None
    """Set by the data module before ``load``: text that the data must not contain."""

    def load(self) -> Splits:
        """The problems by split: ``train``, ``test``, and ``val`` unless it is to be cut from train."""
        raise NotImplementedError

    def grade(self, reply: str, answer: str) -> Grade:
        """Grade a reply (text without pauses and special tokens) against a problem's answer."""
        return grade_gsm8k(reply, answer)


def split_train_val(problems: Sequence[Problem], fraction: float = 0.1, seed: int = 42) -> tuple[list, list]:
    """(train, val): val is ``fraction`` of the questions, drawn as the reference does (reference.md 1.1).

    The questions are numbered in order of first appearance; val are the first ceil(fraction * N) of
    ``numpy.random.default_rng(seed).permutation(N)``, train the rest, in that order. All copies of a train question
    stay in train; val keeps one copy each.
    """
    copies: dict[str, list[Problem]] = {}
    for problem in problems:
        copies.setdefault(problem.id, []).append(problem)
    groups = list(copies.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    held_out = math.ceil(fraction * len(groups))
    val = [groups[i][0] for i in order[:held_out]]
    return [p for i in order[held_out:] for p in groups[i]], val


def check_disjoint(splits: Splits) -> int:
    """Remove, in place, problems whose question is in a later split (train < val < test); returns how many."""
    dropped, taken = 0, set()
    for name in ("test", "val", "train"):
        if name not in splits:
            continue
        rows = splits[name]
        kept = [p for p in rows if p.id not in taken]
        dropped += len(rows) - len(kept)
        splits[name] = kept
        taken |= {p.id for p in kept}
    return dropped


def dataset_hash(splits: Splits) -> str:
    """sha256 over questions, answers and ids of all splits, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for p in splits[name]:
            digest.update(f"{name}\0{p.question}\0{p.answer}\0{p.answer_ids}\0".encode())
    return digest.hexdigest()
