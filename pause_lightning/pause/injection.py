"""Putting pauses into answers, on token ids: at random and after patterns (reference.md 1.4).

Lives here: ``PauseInjection``, and ``token_starts`` and ``word_starts`` that give its units. Pauses are inserted between
the ids of the answer, so taking them out again always gives the answer's own ids. No torch.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pause_lightning.errors import UserError

Unit = TypeVar("Unit", int, str)


@dataclass
class PauseInjection:
    """Where pauses go in an answer of the warm-up.

    Args:
        n_random_pauses: pauses at random places
        variable_number_of_pauses: draw their number evenly from 0..n_random_pauses instead
        n_pauses_per_patterns: regular expression -> pauses right after each of its matches; the newline character as
            a pattern also puts as many at the start
        protect_final_answer: nothing is inserted after the last "####", so that grading finds the final answer
        redraw: draw the places anew in each epoch (read by the data module; inject writes fixed ones)
    """

    n_random_pauses: int = 0
    variable_number_of_pauses: bool = False
    n_pauses_per_patterns: dict[str, int] = field(default_factory=dict)
    protect_final_answer: bool = True
    redraw: bool = True

    def __post_init__(self) -> None:
        if self.n_random_pauses < 0:
            raise UserError(f"n_random_pauses must not be negative, got {self.n_random_pauses}")
        for pattern, count in self.n_pauses_per_patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"n_pauses_per_patterns: {pattern!r} is no regular expression ({error})") from None
            if count < 0:
                raise UserError(f"n_pauses_per_patterns: {pattern!r} has a negative number of pauses")

    def inject(self, ids: list[Unit], text: str, starts: list[int], pause: Unit, rng: random.Random) -> list[Unit]:
        """``ids`` with pauses. ``starts[i]``: where token i begins in ``text``. Units of any type will do.

        A pattern's pauses go to the first token boundary at or after the end of the match. The random ones are drawn
        in the reference's order: their number, then each place, uniformly over all boundaries.
        """
        last = self._last_boundary(text, starts)
        augmented = list(ids)
        places = []
        for pattern, count in self.n_pauses_per_patterns.items():
            places += [(bisect_left(starts, m.end()), count) for m in re.finditer(pattern, text)]
        if self.n_pauses_per_patterns.get("\n"):
            places.append((0, self.n_pauses_per_patterns["\n"]))
        for boundary, count in sorted(places, reverse=True):
            if boundary <= last:
                augmented[boundary:boundary] = [pause] * count
        limit = last + len(augmented) - len(ids)
        number = rng.randint(0, self.n_random_pauses) if self.variable_number_of_pauses else self.n_random_pauses
        for boundary in sorted((rng.randint(0, limit) for _ in range(number)), reverse=True):
            augmented.insert(boundary, pause)
        return augmented

    def _last_boundary(self, text: str, starts: list[int]) -> int:
        marker = text.rfind("####") if self.protect_final_answer else -1
        if marker < 0:
            return len(starts)
        # the boundary in front of the token that holds the marker's first character
        return max(0, bisect_right(starts, marker) - 1)


def token_starts(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(ids, character where each begins) of ``text`` by a HF fast tokenizer, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts: list[int] = []
    for start, _ in encoded["offset_mapping"]:
        starts.append(max(start, starts[-1] if starts else 0))
    return list(encoded["input_ids"]), starts


def word_starts(text: str) -> tuple[list[str], list[int]]:
    """(words, character where each begins): split at single spaces; a word keeps the space in front of it."""
    units, starts, at = [], [], 0
    for index, word in enumerate(text.split(" ")):
        unit = word if index == 0 else f" {word}"
        units.append(unit)
        starts.append(at)
        at += len(unit)
    return units, starts
