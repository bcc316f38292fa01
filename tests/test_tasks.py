"""Problems: where they come from, how they are split, how replies are graded, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pause_lightning.errors import UserError
from pause_lightning.tasks import (
    GSM8K,
    Problem,
    WordProblems,
    check_disjoint,
    dataset_hash,
    grade_gsm8k,
    split_train_val,
)
from pause_lightning.tasks.grading import final_answer, reference_answer
from pause_lightning.tasks.gsm8k import read_questions
from pause_lightning.tasks.prompts import DEFAULT_PROMPT, format_prompt

REAL = Path(__file__).parents[2] / "shared" / "gsm8k"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not on this machine")
GOOD = {"question": "What is 1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}


def folder_with(tmp_path: Path, train: str, test: str = json.dumps(GOOD)) -> str:
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "test.jsonl").write_text(test)
    return str(tmp_path)


# ---- grading


@pytest.mark.parametrize(
    ("reply", "gold", "correct"),
    [
        ("#### 72", "#### 72", True),
        ("#### 72.", "#### 72", True),
        ("#### 72.0", "#### 72", True),
        ("#### $72", "#### 72", True),
        ("####72", "#### 72", True),
        ("####  72", "#### 72", True),
        ("#### **72**", "#### 72", True),
        ("#### 1,234", "#### 1234", True),
        ("#### 1234", "#### 1,234", True),
        ("#### -5", "#### -5", True),
        ("#### -$5", "#### -5", True),
        ("#### $-5", "#### -5", True),
        ("#### 5", "#### -5", False),
        ("#### 1/2", "#### 1", False),
        ("#### 1/2", "#### 0.5", True),
        ("#### .5", "#### 0.5", True),
        ("#### 7 2", "#### 72", False),
        ("#### 1\n#### 72", "#### 72", True),  # the last line counts
        ("72", "#### 72", False),
        ("#### .", "#### 72", False),
        ("#### ,", "#### 72", False),
        ("####", "#### 72", False),
        ("#### 72\nSo 3 more", "#### 72", True),
        ("#### 1/0", "#### 1", False),
        ("#### " + "9" * 5000, "#### 72", False),
    ],
)
def test_the_scored_rule(reply: str, gold: str, correct: bool) -> None:
    grade = grade_gsm8k(reply, gold)
    assert grade.correct is correct and grade.reward == float(correct)


def test_the_reference_rule_is_reported_as_it_is() -> None:
    """The vectors of reference.md 10."""
    vectors = {
        "#### 1,234": "1234",
        "#### -5": "-5",
        "#### 72.": "72.",
        "#### 7 2": "7",
        "#### $5": None,
        "#### 1 then #### 2": "1",
    }
    assert {text: reference_answer(text) for text in vectors} == vectors
    assert not grade_gsm8k("#### 72.", "#### 72").reference_correct
    assert grade_gsm8k("#### 72", "#### 72").reference_correct


def test_no_reply_makes_the_grader_slow() -> None:
    started = time.monotonic()
    for text in ("-" * 50_000, " " * 50_000, "1," * 25_000, "$ - " * 10_000, "1 / " * 10_000):
        final_answer("#### " + text)
    assert time.monotonic() - started < 1


# ---- splits


def test_the_split_is_the_references() -> None:
    problems = [Problem(f"q{i}", "#### 1") for i in range(7473)]
    train, val = split_train_val(problems)
    assert [int(p.question[1:]) for p in val[:5]] == [3082, 2184, 5897, 2437, 6330]
    assert (len(train), len(val)) == (6725, 748)


def test_copies_of_a_question_stay_on_one_side() -> None:
    problems = [Problem(f"q{i}", f"copy {c} #### 1") for c in range(5) for i in range(40)]
    train, val = split_train_val(problems)
    assert not {p.id for p in train} & {p.id for p in val}
    assert len(val) == 4 and len(train) == 36 * 5


def test_a_question_of_the_test_split_leaves_train() -> None:
    splits = {
        "train": [Problem("a  b", "#### 1"), Problem("c", "#### 1")],
        "val": [],
        "test": [Problem("a b", "#### 1")],
    }
    assert check_disjoint(splits) == 1
    assert [p.question for p in splits["train"]] == ["c"]


@needs_real
def test_no_question_of_gsm8k_is_in_two_parts() -> None:
    splits = GSM8K(str(REAL)).load()
    assert (len(splits["train"]), len(splits["test"])) == (7473, 1319)
    splits["train"], splits["val"] = split_train_val(splits["train"])
    assert check_disjoint(splits) == 0
    ids = [{p.id for p in rows} for rows in splits.values()]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


# ---- generated problems


def test_generated_problems_are_right_and_never_shared() -> None:
    splits = WordProblems(num_train=300, num_test=100, steps=[1, 2, 3], seed=3).load()
    questions = [p.question for rows in splits.values() for p in rows]
    assert len(set(questions)) == 400
    for problem in splits["train"]:
        for line in problem.answer.splitlines()[:-1]:
            expression, result = line.split("<<")[1].split(">>")[0].split("=")
            assert eval(expression) == int(result) and 1 <= int(result) <= 50
        assert final_answer(problem.answer) == result
    assert dataset_hash(splits) == dataset_hash(WordProblems(num_train=300, num_test=100, steps=[1, 2, 3], seed=3).load())
    assert dataset_hash(splits) != dataset_hash(WordProblems(num_train=300, num_test=100, steps=[1, 2, 3], seed=4).load())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "num_train must be at least 1"),
        ({"steps": []}, "steps must be at least 1"),
        ({"max_number": 60}, "max_result must not be below"),
        ({"num_train": 10**6, "max_number": 2, "max_result": 4, "steps": [1]}, "different questions"),
    ],
)
def test_bad_options_of_the_generator(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WordProblems(**options).load()


# ---- files


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_arrays_and_lines_are_read_whatever_the_suffix(tmp_path: Path, as_array: bool, suffix: str) -> None:
    rows = [{"q": f"q{i}", "a": "#### 1", "extra": 1} for i in range(3)]
    text = json.dumps(rows, indent=2) if as_array else "\n".join(map(json.dumps, rows)) + "\n\n"
    for name in ("train", "test"):
        (tmp_path / f"{name}{suffix}").write_text(text)
    splits = GSM8K(str(tmp_path), question_column="q", answer_column="a", limit=2).load()
    assert [p.question for p in splits["train"]] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (json.dumps(GOOD) + "\n{broken", r"train.jsonl:2: malformed JSON line"),
        ("[" + json.dumps(GOOD) + ",\n{]", r"train.jsonl:2: malformed JSON"),
        (json.dumps({"question": "q"}), r"train.jsonl:1: no column 'answer'"),
        (json.dumps({"question": "q", "answer": 3}), r"train.jsonl:1: column 'answer' is no text"),
        (json.dumps({"question": "q", "answer": "3"}), r"train.jsonl:1: the answer has no final answer"),
        ("", r"train.jsonl holds no record"),
        (
            json.dumps({**GOOD, "question": "a <|pause|> b"}),
            r"train.jsonl:1: the pause token <\|pause\|> is in the data",
        ),
    ],
)
def test_bad_data_is_named_with_its_line(tmp_path: Path, train: str, message: str) -> None:
    task = GSM8K(folder_with(tmp_path, train))
    task.pause_token = "<|pause|>"
    with pytest.raises(UserError, match=message):
        task.load()


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        GSM8K(str(tmp_path / "nowhere")).load()
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"neither test\.jsonl nor test\.json"):
        GSM8K(str(tmp_path)).load()
    with pytest.raises(UserError, match="no file"):
        read_questions(tmp_path / "questions.jsonl")


def test_the_prompt_is_the_references() -> None:
    assert format_prompt(DEFAULT_PROMPT, "Why {x}?") == "### INPUT: Why {x}?\n\n ### Answer:"
    with pytest.raises(UserError, match="question"):
        format_prompt("no slot", "q")
