"""Pause injection: on ids, the reference's draws, and nothing that grading needs is split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import command, refused

from pause_lightning.errors import UserError
from pause_lightning.pause.injection import PauseInjection, token_starts, word_starts
from pause_lightning.pause.load import load_tokenizer
from pause_lightning.tasks import WordProblems, grade_gsm8k
from pause_lightning.tasks.gsm8k import GSM8K

REAL = Path(__file__).parents[2] / "shared" / "gsm8k"
PAUSE = "<|pause|>"
MISTRAL_PIECES = (
    "Natal|ia| sold| |4|8|/|2| =| <<|4|8|/|2|=|2|4|>>|2|4| cl|ips| in| May|.|\n|N|atal|ia| sold| |4|8|+|2|4| =| <<|4|8"
    "|+|2|4|=|7|2|>>|7|2| cl|ips| altogether| in| April| and| May|.|\n|####| |7|2"
)


def test_the_references_draws() -> None:
    """reference.md 10: the first augmented row for seed 42, with the pieces Mistral's tokenizer has for that answer."""
    pieces = MISTRAL_PIECES.split("|")
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    injection = PauseInjection(n_random_pauses=10, variable_number_of_pauses=True, protect_final_answer=False)
    text = "".join(pieces)
    assert "".join(injection.inject(pieces, text, starts, PAUSE, random.Random(42))) == (
        "Natal<|pause|>ia sold 48<|pause|>/<|pause|>2<|pause|> = <<48/2<|pause|>=<|pause|>24<|pause|>>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24<|pause|>=72>><|pause|><|pause|>72 clips altogether in April and May.\n#### 72"
    )


def answers() -> list[str]:
    if REAL.is_dir():
        return [p.answer for p in GSM8K(str(REAL)).load()["train"]]
    return [p.answer for p in WordProblems(num_train=1000, num_test=1).load()["train"]]


def tokenizers() -> list[str]:
    here = Path(__file__).parents[1] / "models" / "smollm2-135m"
    return ["quickstart", *([str(here)] if here.is_dir() else [])]


@pytest.mark.parametrize("path", tokenizers())
def test_pauses_removed_give_the_answers_own_ids_and_the_answer_survives(path: str) -> None:
    tokenizer = load_tokenizer(path, PAUSE)
    pause = tokenizer.pause_id
    injection = PauseInjection(10, True, {"=": 1, "\n": 1})
    rng, seen = random.Random(0), 0
    for answer in answers():
        ids, starts = token_starts(tokenizer, answer)
        injected = injection.inject(ids, answer, starts, pause, rng)
        assert [i for i in injected if i != pause] == ids
        assert ids == tokenizer(answer, add_special_tokens=False)["input_ids"]
        # the protected part is contiguous: from the token with the first # on
        marker = next(i for i in range(len(ids)) if starts[i] <= answer.rfind("####") < [*starts, len(answer)][i + 1])
        assert pause not in injected[len(injected) - (len(ids) - marker) :]
        assert grade_gsm8k(tokenizer.decode([i for i in injected if i != pause]), answer).correct
        seen += injected.count(pause)
    assert seen > 5 * len(answers())


def test_a_pattern_puts_pauses_right_after_each_match() -> None:
    tokenizer = load_tokenizer("quickstart", PAUSE)
    answer = "So 3 + 4 = <<3+4=7>>7 pens.\n#### 7"
    ids, starts = token_starts(tokenizer, answer)
    injected = PauseInjection(n_pauses_per_patterns={"=": 2, "####": 1}).inject(
        ids, answer, starts, tokenizer.pause_id, random.Random(0)
    )
    text = tokenizer.decode(injected)
    assert text == "So 3 + 4 =<|pause|><|pause|> <<3+4=<|pause|><|pause|>7>>7 pens.\n#### 7"
    newline = PauseInjection(n_pauses_per_patterns={"\n": 1}).inject(
        ids, answer, starts, tokenizer.pause_id, random.Random()
    )
    assert tokenizer.decode(newline) == "<|pause|>So 3 + 4 = <<3+4=7>>7 pens.\n<|pause|>#### 7"


def test_the_number_of_random_pauses() -> None:
    units, starts = word_starts("a b c d e")
    fixed = [PauseInjection(3).inject(units, "a b c d e", starts, PAUSE, random.Random(s)).count(PAUSE) for s in range(50)]
    assert set(fixed) == {3}
    drawn = [
        PauseInjection(3, True).inject(units, "a b c d e", starts, PAUSE, random.Random(s)).count(PAUSE) for s in range(200)
    ]
    assert set(drawn) == {0, 1, 2, 3}


def test_bad_options() -> None:
    with pytest.raises(UserError, match="no regular expression"):
        PauseInjection(n_pauses_per_patterns={"(": 1})
    with pytest.raises(UserError, match="negative"):
        PauseInjection(n_random_pauses=-1)


# ---- the command


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    splits = WordProblems(num_train=30, num_test=5).load()
    for name, rows in splits.items():
        text = "\n".join(json.dumps({"question": p.question, "answer": p.answer}) for p in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_inject_writes_a_data_set_that_is_read_back_as_the_same_ids(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["inject", "--dataset_location", str(dataset), "--augm_dataset_save_location", str(out)]
    args += ["--n_random_pauses", "4", "--pause_augm_col_name", "answer", "--tokenizer_hf_name", "quickstart"]
    done = command(*args, "--n_generated_samples_per_datapoint", "3", "--seed", "7", cwd=tmp_path)
    assert "90 rows" in done.stdout and "4.00 pauses per row" in done.stdout
    rows = json.loads((out / "train.json").read_text())
    assert [r["question"] for r in rows[:30]] == [r["question"] for r in rows[30:60]]
    assert rows[0]["answer"] != rows[30]["answer"]  # each copy is drawn anew
    plain = {p.question: p.answer for p in GSM8K(str(dataset)).load()["train"]}
    task = GSM8K(str(out))
    task.pause_token = PAUSE
    tokenizer = load_tokenizer("quickstart", PAUSE)
    for problem, row in zip(task.load()["train"], rows):
        assert problem.answer == plain[problem.question] == row["answer"].replace(PAUSE, "")
        ids = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
        assert [i for i in problem.answer_ids or () if i != tokenizer.pause_id] == ids
        assert row["answer"].count(PAUSE) == list(problem.answer_ids or ()).count(tokenizer.pause_id) == 4
    again = tmp_path / "again"
    command(*[a if a != str(out) else str(again) for a in args], "--n_generated_samples_per_datapoint", "3", "--seed", "7",
            cwd=tmp_path)  # fmt: skip
    assert (again / "train.json").read_bytes() == (out / "train.json").read_bytes()


def test_inject_between_words(dataset: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "gsm8k_pause_injector.py"
    assert script.is_file()
    out = tmp_path / "out"
    command("inject", "--dataset_location", str(dataset), "--augm_dataset_save_location", str(out),
            "--n_random_pauses", "2", cwd=tmp_path)  # fmt: skip
    for row in json.loads((out / "train.json").read_text()):
        assert row["pause_augmented_answer"].replace(PAUSE, "") == row["answer"]
        assert row["pause_augmented_answer"].count(PAUSE) == 2


def test_inject_refuses_what_it_cannot_do(dataset: Path, tmp_path: Path) -> None:
    where = ["--augm_dataset_save_location", str(tmp_path / "out")]
    here = ["--dataset_location", str(dataset)]
    assert "neither train.jsonl" in refused("inject", "--dataset_location", "nowhere", *where, cwd=tmp_path)
    assert "no JSON object" in refused("inject", *here, *where, "--n_pauses_per_patterns", "{", cwd=tmp_path)
    assert "no folder" in refused("inject", *here, *where, "--tokenizer_hf_name", "./none", cwd=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in refused("inject", *here, "--augm_dataset_save_location", str(tmp_path / "full"), cwd=tmp_path)
    (dataset / "train.jsonl").write_text('{"question": "a", "answer": "<|pause|>\\n#### 1"}')
    assert "train.jsonl:1" in refused("inject", *here, *where, cwd=tmp_path)
