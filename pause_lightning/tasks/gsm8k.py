"""GSM8K and data sets of its format: from the hub, or a folder of train/test(/val) with suffix .jsonl or .json.

Lives here: ``GSM8K`` and the readers, with errors that name the file and the line. Both a JSON array and JSON lines are
read, whatever the suffix. A folder that ``inject`` has written brings token ids along (``pause_injection.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pause_lightning.errors import UserError
from pause_lightning.tasks.grading import final_answer
from pause_lightning.tasks.problem import Problem, Splits, Task

INJECTION_FILE = "pause_injection.json"
SPLITS = ("train", "val", "test")


class GSM8K(Task):
    """GSM8K, or anything with a question and an answer that ends in ``#### N``.

    Args:
        path: a folder, or the name of a hub data set
        question_column: name of the column with the question
        answer_column: name of the column with the worked answer
        limit: use the first so many rows of each split; null: all
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        question_column: str = "question",
        answer_column: str = "answer",
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"data.task.limit must be at least 1, got {limit}")
        self.path, self.limit = path, limit
        self.question_column, self.answer_column = question_column, answer_column
        self.injection: dict[str, Any] | None = None

    def load(self) -> Splits:
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return self._load_folder(folder)
        if self.path.startswith((".", "/", "~")) or self.path.count("/") != 1 or folder.exists():
            raise UserError(f"data.task.path: no folder {self.path}; give one with train.jsonl and test.jsonl (or .json)")
        return self._load_hub()

    def _load_folder(self, folder: Path) -> Splits:
        marker = folder / INJECTION_FILE
        if marker.exists():
            self.injection = read_injection(marker)
        splits: Splits = {}
        for name in SPLITS:
            path = find_split(folder, name)
            if path is None:
                if name == "val":
                    continue
                raise UserError(f"data.task.path: {folder} has neither {name}.jsonl nor {name}.json")
            splits[name] = [self.problem(record, where) for where, record in self._limited(read_records(path))]
            if not splits[name]:
                raise UserError(f"{path} holds no record")
        has_ids = self.injection is not None and self.injection.get("tokenizer_sha256") is not None
        if has_ids and any(p.answer_ids is None for p in splits["train"]):
            raise UserError(
                f"data.task.answer_column: inject wrote no pauses for the column {self.answer_column!r} of {folder}; "
                f"its column is {self.injection.get('pause_augm_col_name')!r}"  # type: ignore[union-attr]
            )
        return splits

    def _load_hub(self) -> Splits:
        try:
            from datasets import load_dataset

            loaded = load_dataset(self.path, "main")
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.task.path: cannot load the hub data set {self.path} ({reason}); without network, give a folder"
            ) from None
        splits: Splits = {}
        for name in SPLITS:
            if name in loaded:
                rows = ((f"{self.path} {name} row {i}", row) for i, row in enumerate(loaded[name]))
                splits[name] = [self.problem(row, where) for where, row in self._limited(rows)]
        for name in ("train", "test"):
            if not splits.get(name):
                raise UserError(f"data.task.path: the hub data set {self.path} has no rows in {name}")
        return splits

    def _limited(self, records: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for index, item in enumerate(records):
            if self.limit is not None and index >= self.limit:
                return
            yield item

    def problem(self, record: Any, where: str) -> Problem:
        """A record as a Problem; ``where`` names it in errors."""
        question = text_of(record, self.question_column, where)
        column, ids = self.answer_column, None
        if self.injection is not None:
            ids = record.get(f"{column}_ids")
            if column not in record:  # inject augments train only: val and test keep the column it read
                column = self.injection.get("answer_column", column)
        answer = text_of(record, column, where)
        if ids is not None:
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise UserError(f"{where}: column '{column}_ids' is no list of token ids")
            answer = answer.replace(self.injection["pause_token"], "")  # type: ignore[index]
        if self.pause_token is not None and self.pause_token in question + answer:
            raise UserError(
                f"{where}: the pause token {self.pause_token} is in the data already; use a data set without it "
                "(inject with --tokenizer_hf_name writes one that can be trained on), or another model.pause_token"
            )
        if final_answer(answer) is None:
            raise UserError(f"{where}: the answer has no final answer (a last line '#### N')")
        return Problem(question, answer, None if ids is None else tuple(ids))


def read_questions(path: Path, column: str = "question") -> list[Problem]:
    """Problems without answers, for predict. Raises: UserError as the other readers."""
    if not path.is_file():
        raise UserError(f"data.predict_file: no file {path}")
    problems = [Problem(text_of(record, column, where), "") for where, record in read_records(path)]
    if not problems:
        raise UserError(f"data.predict_file: {path} holds no record")
    return problems


def find_split(folder: Path, name: str) -> Path | None:
    """The file of a split in a folder, if it is there. Raises: UserError if there are two, which may differ."""
    found = [path for suffix in (".jsonl", ".json") if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {name}.jsonl and {name}.json: delete the one that is not meant")
    return found[0] if found else None


def read_injection(path: Path) -> dict[str, Any]:
    """What ``inject`` wrote about a data set. Raises: UserError if it is not that."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("pause_token"), str) or not about["pause_token"]:
        raise UserError(f"{path}: has no pause_token; run inject again")
    return about


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON array or of JSON lines; ``where`` is ``file:line`` or ``file record n``.

    Raises:
        UserError: malformed JSON, with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', '?')}: malformed JSON ({error})") from None
        for index, record in enumerate(rows):
            yield f"{path} record {index}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: malformed JSON line ({error})") from None


def text_of(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        raise UserError(f"{where}: no column {column!r}; name yours with data.task.question_column or answer_column")
    if not isinstance(record[column], str):
        raise UserError(f"{where}: column {column!r} is no text")
    return record[column]
