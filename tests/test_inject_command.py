"""What ``inject`` refuses, and the reader of an injected folder: nothing is trained on silently wrong data.

The command's results are specified in ``test_injection.py``; here it is called in-process, for its refusals.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pause_lightning.errors import UserError
from pause_lightning.inject import main
from pause_lightning.tasks import GSM8K

PAUSE = "<|pause|>"
ROW = {"question": "What is 1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
OTHER = {"question": "What is 2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "data", train=[ROW], test=[OTHER])


def written(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def inject(source: Path, target: Path, *more: str) -> None:
    where = ["--dataset_location", str(source), "--augm_dataset_save_location", str(target)]
    assert main([*where, "--n_random_pauses", "2", *more]) == 0


def injected(tmp_path: Path, row: dict, **about: object) -> GSM8K:
    marker = {"pause_token": PAUSE, "answer_column": "answer", "pause_augm_col_name": "paused", **about}
    task = GSM8K(str(written(tmp_path / "injected", train=[row], test=[OTHER], pause_injection=marker)))
    task.pause_token = PAUSE
    return task


# ---- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pause_token", ""], "--pause_token must not be empty"),
        (["--pause_augm_col_name", "question"], "is the column with the question"),
        (["--n_generated_samples_per_datapoint", "0"], "at least 1"),
        (["--n_pauses_per_patterns", '{"=": true}'], "no JSON object of numbers"),
        (["--n_pauses_per_patterns", "[1]"], "no JSON object of numbers"),
        (["--n_pauses_per_patterns", '{"=": -1}'], "negative"),
        (["--n_pauses_per_patterns", '{"(": 1}'], "no regular expression"),
        (["--answer_column", "solution"], r"train.json record 0: no column 'solution'"),
    ],
)
def test_bad_options_write_nothing(source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_source_without_training_records_or_test_file(source: Path, tmp_path: Path) -> None:
    written(source, train=[])
    with pytest.raises(UserError, match="holds no record"):
        inject(source, tmp_path / "out")
    (source / "test.json").unlink()
    with pytest.raises(UserError, match=r"neither test\.jsonl nor test\.json"):
        inject(source, tmp_path / "out")


def test_the_target_is_never_the_source_nor_a_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data set itself"):
        inject(source, source / ".." / "data", "--overwrite")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        inject(source, tmp_path / "file", "--overwrite")
    assert json.loads((source / "train.json").read_text()) == [ROW]


@pytest.mark.parametrize("stale", ["train.jsonl", "test.jsonl", "val.json"])
def test_overwrite_leaves_no_split_of_another_data_set(source: Path, tmp_path: Path, stale: str) -> None:
    inject(source, tmp_path / "out")
    inject(source, tmp_path / "out", "--overwrite")
    (tmp_path / "out" / stale).write_text(json.dumps(OTHER))
    with pytest.raises(UserError, match=f"holds {stale}"):
        inject(source, tmp_path / "out", "--overwrite")


def test_the_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--n_generated_samples_per_datapoint" in capsys.readouterr().out


# ---- reading what it wrote


def test_ids_are_read_from_the_injected_column_and_test_from_the_plain_one(tmp_path: Path) -> None:
    row = {**ROW, "paused": f"{PAUSE}{ROW['answer']}", "paused_ids": [9, 1, 2]}
    task = injected(tmp_path, row, tokenizer_sha256="abc")
    task.answer_column = "paused"
    splits = task.load()
    assert splits["train"][0].answer_ids == (9, 1, 2)
    assert splits["train"][0].answer == ROW["answer"]
    assert splits["test"][0].answer == OTHER["answer"]
    assert task.injection is not None and task.injection["tokenizer_sha256"] == "abc"


def test_the_column_without_the_pauses_is_not_taken_for_the_one_with_them(tmp_path: Path) -> None:
    row = {**ROW, "paused": f"{PAUSE}{ROW['answer']}", "paused_ids": [9, 1, 2]}
    with pytest.raises(UserError, match="its column is 'paused'"):
        injected(tmp_path, row, tokenizer_sha256="abc").load()


def test_pauses_in_a_text_without_ids_or_in_a_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.json record 0: the pause token"):
        injected(tmp_path, {**ROW, "answer": f"{PAUSE}{ROW['answer']}"}).load()
    with pytest.raises(UserError, match=r"train\.json record 0: the pause token"):
        injected(tmp_path, {"question": PAUSE, "answer": ROW["answer"], "answer_ids": [1]}).load()


def test_damaged_ids_and_markers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'answer_ids' is no list of token ids"):
        injected(tmp_path, {**ROW, "answer_ids": "abc"}).load()
    for content in ([], {}, {"pause_token": ""}):
        task = injected(tmp_path, ROW)
        written(tmp_path / "injected", pause_injection=content)
        with pytest.raises(UserError, match=r"pause_injection\.json: has no pause_token"):
            task.load()


def test_two_files_for_one_split_are_ambiguous(source: Path) -> None:
    (source / "train.jsonl").write_text(json.dumps(OTHER))
    with pytest.raises(UserError, match=r"both train\.jsonl and train\.json"):
        GSM8K(str(source)).load()


def test_a_byte_order_mark_is_not_data(source: Path) -> None:
    (source / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert GSM8K(str(source)).load()["train"][0].question == ROW["question"]
