"""Graded rollouts on disk: one JSON line per reply, written a unit (block of problems) at a time.

Lives here: ``Rollout`` and ``RolloutStore``. The disk is the truth: what is complete here is never sampled again, and
what belongs to another policy, seed or data set is refused. Layout under a run folder:

    rollouts/outer_000/meta.json         fingerprint: policy, settings, seed, data
    rollouts/outer_000/rank_00000.jsonl  one line per reply; a unit counts when all its lines are there
    rollouts/outer_000/DONE.json         written when every unit is complete
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pause_lightning.errors import RunStopped, UserError


@dataclass(frozen=True)
class Rollout:
    """One graded reply to a training problem.

    Args:
        unit: number of the block of problems it was sampled with
        unit_size: replies in that block
        problem_id: id of the problem
        sample: 0 .. samples_per_problem - 1
        prompt_ids: the prompt, as ids
        reply_ids: the reply as sampled, EOS included when there is one
        text: the reply with its special tokens (pauses visible), for reading only
        answer: the final answer found in it, or null
        reward: 1.0 correct, 0.0 not
        correct: the scored verdict
        reference_correct: the verdict of the usual rule (reference.md 5)
        pauses: number of pauses in the reply
        finish_reason: "eos" or "length"
        logprobs: log-probability of each reply id under the policy at temperature 1
        seed: seed of the unit's sampling
    """

    unit: int
    unit_size: int
    problem_id: str
    sample: int
    prompt_ids: list[int]
    reply_ids: list[int]
    text: str
    answer: str | None
    reward: float
    correct: bool
    reference_correct: bool
    pauses: int
    finish_reason: str
    logprobs: list[float]
    seed: int


_FIELDS = {f.name for f in fields(Rollout)}


class RolloutStore:
    """The rollouts of one outer loop, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @property
    def complete(self) -> bool:
        return (self.folder / "DONE.json").exists()

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Claim the folder for a policy and its settings; a second claim must agree with the first.

        Raises:
            UserError: the folder holds rollouts of something else (says which part differs).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = self.folder / "meta.json"
        if meta.exists():
            found = json.loads(meta.read_text())
            differs = [key for key in fingerprint if found.get(key) != fingerprint[key]]
            if differs:
                raise UserError(
                    f"{self.folder} holds rollouts of another run ({', '.join(differs)} differ): "
                    "resume with the settings they were made with, or start a new run"
                )
        else:
            write_json(meta, fingerprint)

    def read(self) -> list[Rollout]:
        """All rollouts of complete units, by (unit, problem order, sample). Torn or foreign lines end a shard.

        A shard is cut off after its last complete line, so that appending to it is safe.
        """
        units: dict[int, list[Rollout]] = defaultdict(list)
        for shard in sorted(self.folder.glob("rank_*.jsonl")):
            for rollout in _read_shard(shard):
                units[rollout.unit].append(rollout)
        complete = [unit for unit, rows in sorted(units.items()) if len(rows) >= rows[0].unit_size]
        return [row for unit in complete for row in units[unit][-units[unit][0].unit_size :]]

    def append(self, rank: int, rollouts: Iterable[Rollout]) -> None:
        """Write one unit; it is on the disk (fsync) when this returns.

        Raises:
            RunStopped: the disk is full or the folder cannot be written; finished units stay as they are.
        """
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rollouts)
        path = self.folder / f"rank_{rank:05d}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunStopped(
                f"cannot write rollouts to {path}: {error.strerror}; the finished ones are kept, free some space and "
                "go on with --ckpt_path last"
            ) from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the outer loop's rollouts as complete."""
        write_json(self.folder / "DONE.json", summary)


def _read_shard(path: Path) -> list[Rollout]:
    rows: list[Rollout] = []
    good = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or set(record) != _FIELDS:
                    break
                rows.append(Rollout(**record))
            except (ValueError, TypeError):
                break
            good += len(line)
    if good < path.stat().st_size:
        os.truncate(path, good)
    return rows


def write_json(path: Path, value: Any, one_per_line: bool = False) -> None:
    """Atomic: write beside, fsync, rename. ``one_per_line``: a list of records, each on a line of its own.

    Raises:
        RunStopped: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            if one_per_line:
                file.write("[\n" + ",\n".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n]\n")
            else:
                file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunStopped(f"cannot write {path}: {error.strerror}") from None
