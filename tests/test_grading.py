"""Corners of the scored rule and of the split check that a grader must get right; the rule is in ``test_tasks.py``."""

from __future__ import annotations

import pytest

from pause_lightning.tasks import Problem, WordProblems, check_disjoint, grade_gsm8k
from pause_lightning.tasks.grading import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18%", "18"),
        ("#### **18**", "18"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### $1,234.50", "1234.50"),
        ("#### 5,", "5"),
        ("#### 10-5", "10"),  # no subtraction, and no -5
        ("#### x = 5", "5"),
        ("#### 5\r\n", "5"),
        ("####\n5", None),  # the number has to be on the marker's line
        ("#### -", None),
        ("#### 1\n####", None),  # the last marker counts, number or not
    ],
)
def test_the_number_found_on_the_last_marker_line(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_no_number_is_as_good_as_another_that_is_none() -> None:
    assert not grade_gsm8k("#### 5/0", "#### 1/0").correct
    assert not grade_gsm8k("no idea", "nor here").correct


def test_absurd_numbers_neither_raise_nor_match() -> None:
    for reply in ("#### 1/" + "9" * 6000, "#### " + "9" * 6000, "#### 0." + "9" * 6000):
        assert not grade_gsm8k(reply, "#### 1").correct


def test_the_split_check_makes_up_no_split() -> None:
    splits = {"train": [Problem("a", "#### 1")], "test": [Problem("b", "#### 1")]}
    assert check_disjoint(splits) == 0 and sorted(splits) == ["test", "train"]


def test_generated_problems_are_the_same_for_a_seed_whatever_else_is_asked() -> None:
    few, many = (WordProblems(num_train=n, num_test=1, seed=5).load()["train"] for n in (20, 40))
    assert many[:20] == few
