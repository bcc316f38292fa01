"""``python -m pause_lightning inject``: a copy of a data set with pauses injected into its training answers.

Lives here: the command; where pauses go is ``pause/injection.py``'s. The options are the reference's, names included
(reference.md 1.4). With a tokenizer the pauses go between token ids, which are written beside the text, so that
training uses exactly these ids; without, they go between words, for reading or other tools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

from pause_lightning.errors import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pause_lightning inject",
        description=__doc__.splitlines()[0].split(": ", 1)[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--dataset_location", default="data/gsm8k", help="folder with train and test (.jsonl or .json)")
    p.add_argument("--pause_token", default="<|pause|>", help="text of the pause token")
    p.add_argument(
        "--n_pauses_per_patterns", default="{}", help='JSON: regular expression -> pauses after its matches: {"=": 1}'
    )
    p.add_argument("--n_random_pauses", type=int, default=0, help="pauses at random places")
    p.add_argument("--variable_number_of_pauses", action="store_true", help="draw their number from 0..n_random_pauses")
    p.add_argument("--tokenizer_hf_name", default=None, help="HF folder or hub name; without it, units are words")
    p.add_argument("--augm_dataset_save_location", default="data/gsm8k_pause_injected", help="folder to write")
    p.add_argument("--pause_augm_col_name", default="pause_augmented_answer", help="column for the augmented answer")
    p.add_argument("--n_generated_samples_per_datapoint", type=int, default=1, help="copies of the training set")
    p.add_argument("--question_column", default="question", help="column with the question")
    p.add_argument("--answer_column", default="answer", help="column with the answer")
    p.add_argument("--allow_pauses_in_final_answer", action="store_true", help="also inject after the last ####")
    p.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    p.add_argument("--seed", type=int, default=0, help="the same seed draws the same pauses")
    p.add_argument("--verbose", action="store_true", help="show progress and the first answer")
    return p


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: bad options or data.
    """
    args = parser().parse_args(argv)
    from pause_lightning.pause.injection import PauseInjection
    from pause_lightning.tasks.gsm8k import INJECTION_FILE, SPLITS, find_split, read_records, text_of

    try:
        patterns = json.loads(args.n_pauses_per_patterns)
    except ValueError:
        patterns = None
    if not isinstance(patterns, dict) or not all(type(count) is int for count in patterns.values()):
        raise UserError(
            f"--n_pauses_per_patterns: {args.n_pauses_per_patterns} is no JSON object of numbers, e.g. '{{\"=\": 1}}'"
        )
    injection = PauseInjection(
        n_random_pauses=args.n_random_pauses,
        variable_number_of_pauses=args.variable_number_of_pauses,
        n_pauses_per_patterns=patterns,
        protect_final_answer=not args.allow_pauses_in_final_answer,
    )
    if args.n_generated_samples_per_datapoint < 1:
        raise UserError("--n_generated_samples_per_datapoint must be at least 1")
    if not args.pause_token:
        raise UserError("--pause_token must not be empty")
    if args.pause_augm_col_name == args.question_column:
        raise UserError(f"--pause_augm_col_name: {args.question_column} is the column with the question")
    source, target = Path(args.dataset_location), Path(args.augm_dataset_save_location)
    files = {name: find_split(source, name) for name in SPLITS}
    train, test = files["train"], files["test"]
    if train is None or test is None:
        missing = "train" if train is None else "test"
        raise UserError(f"--dataset_location: {source} has neither {missing}.jsonl nor {missing}.json")
    _check_target(source, target, args.overwrite, [name for name in SPLITS if files[name] is not None])
    rows = list(read_records(train))
    if not rows:
        raise UserError(f"{train} holds no record")
    for where, row in rows:
        if args.pause_token in text_of(row, args.answer_column, where) + text_of(row, args.question_column, where):
            raise UserError(f"{where}: the pause token {args.pause_token} is in the data already; choose another one")

    tokenizer = _tokenizer(args)
    column, rng = args.pause_augm_col_name, random.Random(args.seed)
    written: list[dict[str, Any]] = []
    counts: list[int] = []
    copies = args.n_generated_samples_per_datapoint
    for copy in range(copies):
        for index, (_, row) in enumerate(rows):
            text, ids, count = augment(row[args.answer_column], injection, tokenizer, args.pause_token, rng)
            counts.append(count)
            written.append({**row, column: text, **({} if ids is None else {f"{column}_ids": ids})})
            if args.verbose and index % 1000 == 0:
                print(f"copy {copy + 1}/{copies}: {index:,}/{len(rows):,} rows", file=sys.stderr)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / INJECTION_FILE).unlink(missing_ok=True)  # written last: without it the folder is not read as injected
    except OSError as error:
        raise UserError(f"--augm_dataset_save_location: cannot write {target} ({error.strerror})") from None
    from pause_lightning.files import write_json

    write_json(target / "train.json", written, one_per_line=True)
    for name in ("val", "test"):
        if (path := files[name]) is not None:
            write_json(target / f"{name}.json", [row for _, row in read_records(path)], one_per_line=True)
    about = {
        **{k: v for k, v in vars(args).items() if k not in ("verbose", "overwrite")},
        "n_pauses_per_patterns": patterns,
        "pause_token_id": None if tokenizer is None else tokenizer.pause_id,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "source_sha256": hashlib.sha256(train.read_bytes()).hexdigest(),
    }
    write_json(target / INJECTION_FILE, about)
    if args.verbose:
        print(written[0][column])
    print(
        f"{len(written):,} rows in {target}: {sum(counts) / len(counts):.2f} pauses per row, "
        f"{100 * counts.count(0) / len(counts):.2f}% without"
    )
    return 0


def _check_target(source: Path, target: Path, overwrite: bool, splits: list[str]) -> None:
    """Refuse a target whose files would be lost, or read in place of what is written."""
    where = f"--augm_dataset_save_location: {target}"
    if target.exists() and not target.is_dir():
        raise UserError(f"{where} is a file; name a folder")
    if target.resolve() == source.resolve():
        raise UserError(f"{where} is the data set itself; name another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{where} is not empty; --overwrite writes into it")
    rewritten = {f"{name}.json" for name in splits}
    for stale in ("train.jsonl", "test.jsonl", "val.jsonl", "val.json"):
        if (target / stale).exists() and stale not in rewritten:
            raise UserError(f"{where} holds {stale} of another data set, which would be read with this one: delete it")


def augment(
    answer: str, injection: Any, tokenizer: Any, pause_token: str, rng: random.Random
) -> tuple[str, list[int] | None, int]:
    """(text with pauses, ids with pauses or None in word mode, number of pauses)."""
    from pause_lightning.pause.injection import token_starts, word_starts

    if tokenizer is None:
        units, starts = word_starts(answer)
        words = injection.inject(units, answer, starts, pause_token, rng)
        return "".join(words), None, words.count(pause_token)
    ids, starts = token_starts(tokenizer, answer)
    injected = injection.inject(ids, answer, starts, tokenizer.pause_id, rng)
    # The text shows each pause where its token boundary lies; the ids are what is trained on.
    pieces, at = [], 0
    for place, unit in zip(_places(injected, starts, len(answer), tokenizer.pause_id), injected):
        if unit == tokenizer.pause_id:
            pieces += [answer[at:place], pause_token]
            at = place
    return "".join([*pieces, answer[at:]]), injected, injected.count(tokenizer.pause_id)


def _places(injected: list[int], starts: list[int], end: int, pause_id: int) -> list[int]:
    """Character position of each id of ``injected`` in the answer."""
    places, token = [], 0
    for unit in injected:
        places.append(starts[token] if token < len(starts) else end)
        token += unit != pause_id
    return places


def _tokenizer(args: argparse.Namespace) -> Any:
    if args.tokenizer_hf_name in (None, "", "None"):
        return None
    from pause_lightning.pause.load import load_tokenizer

    return load_tokenizer(args.tokenizer_hf_name, args.pause_token)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
