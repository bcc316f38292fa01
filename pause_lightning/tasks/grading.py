"""Grading GSM8K-format replies: the scored rule, and the usual rule reported beside it.

Lives here: ``grade_gsm8k`` and its two extractions. Replies are graded alone, never together with their prompt.

* scored: the last ``####`` line, the first number on it, compared as an exact fraction (``72.`` = ``72`` = ``72.0``,
  ``$``, thousands separators, ``**72**`` and missing spaces do not matter). No marker or no number: wrong.
* reference (reference.md 5): the first match of ``#### (\\-?[0-9\\.\\,]+)``, commas removed, equal as a string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

REFERENCE = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(-?)\s?[$€£]?\s?(-?)(\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s?/\s?(\d+))?")
_LONGEST = 100


@dataclass(frozen=True)
class Grade:
    """``answer``: the final answer found, or None; ``correct``: the scored verdict; ``reward``: 1.0 or 0.0."""

    answer: str | None
    correct: bool
    reference_correct: bool
    reward: float


def grade_gsm8k(reply: str, gold: str) -> Grade:
    """Grade ``reply`` against the worked answer ``gold``, which must have a final answer."""
    found, wanted = final_answer(reply), final_answer(gold)
    value = None if found is None else to_fraction(found)
    correct = value is not None and wanted is not None and value == to_fraction(wanted)
    reference, expected = reference_answer(reply), reference_answer(gold)
    return Grade(found, correct, reference is not None and reference == expected, float(correct))


def final_answer(text: str) -> str | None:
    """The number on the last ``####`` line, as written but without ``$`` and commas; None if there is none."""
    _, marker, rest = text.rpartition("####")
    if not marker:
        return None
    line = rest.split("\n", 1)[0]
    match = _NUMBER.search(line)
    if match is None:
        return None
    sign, sign2, digits, over = match.groups()
    number = ("-" if sign or sign2 else "") + digits.replace(",", "")
    if len(number) > _LONGEST:
        return None
    return number + (f"/{over}" if over else "")


def to_fraction(number: str) -> Fraction | None:
    """Exact value of what ``final_answer`` returns; None for a division by zero."""
    top, _, bottom = number.partition("/")
    if len(bottom) > _LONGEST or (bottom and not int(bottom)):
        return None
    return Fraction(top.rstrip(".")) / int(bottom or "1")


def reference_answer(text: str) -> str | None:
    """The usual rule's final answer, or None ("[invalid]")."""
    match = REFERENCE.search(text)
    return match.group(1).strip().replace(",", "") if match else None
