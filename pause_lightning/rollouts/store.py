"""Graded rollouts on disk: one JSON line per reply, written a unit (block of problems) at a time.

Lives here: ``Rollout`` and ``RolloutStore``. The disk is the truth: what is complete here is never sampled again, and
what belongs to another policy, seed or data set is refused. Layout under a run folder:

    rollouts/outer_000/meta.json         fingerprint: policy, settings, seed, data
    rollouts/outer_000/rank_00000.jsonl  one line per reply with its checksum; a unit counts when all its lines are good
    rollouts/outer_000/DONE.json         the metrics; a mark for readers, written when every unit is complete
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
from pause_lightning.files import checked_line, read_checked_line, write_json


@dataclass(frozen=True)
class Rollout:
    """One graded reply to a training problem.

    Args:
        unit: number of the block of problems it was sampled with
        unit_size: replies in that block
        place: its place among them, from 0
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
    place: int
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

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Claim the folder for a policy and its settings; a second claim must agree with the first.

        Also cuts off what a kill left torn at the end of a shard, so that appending to it is safe.

        Raises:
            UserError: the folder holds rollouts of something else (says which part differs).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meta, shards = self.folder / "meta.json", sorted(self.folder.glob("rank_*.jsonl"))
        try:
            found = json.loads(meta.read_text())
        except FileNotFoundError:
            found = None
        except (ValueError, OSError):
            found = {}
        if shards and found != fingerprint:
            known = found if isinstance(found, dict) else {}
            differs = [key for key in fingerprint if known.get(key) != fingerprint[key]]
            raise UserError(
                f"{self.folder} holds rollouts of another policy or other settings ({', '.join(differs)}; see meta.json): "
                "go on with the settings they were made with, or delete that folder and they are sampled anew"
            )
        if found != fingerprint:
            write_json(meta, fingerprint)
        for shard in shards:
            _cut_torn_end(shard)

    def policy(self) -> str | None:
        """The fingerprint of the policy these rollouts are of; None if meta.json is damaged."""
        try:
            return json.loads((self.folder / "meta.json").read_text())["policy"]
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def units(self) -> set[int]:
        """The numbers of the units that are complete."""
        return {rollout.unit for rollout in self.read()}

    def read(self) -> list[Rollout]:
        """All rollouts of complete units, by (unit, problem order, sample). Torn or damaged lines do not count."""
        units: dict[int, list[Rollout]] = defaultdict(list)
        for shard in sorted(self.folder.glob("rank_*.jsonl")):
            for rollout in _read_shard(shard):
                if rollout.place == 0:  # a unit that was cut off and sampled again begins anew
                    units[rollout.unit] = []
                if rollout.place == len(units[rollout.unit]):
                    units[rollout.unit].append(rollout)
        return [row for _, rows in sorted(units.items()) if rows and len(rows) == rows[0].unit_size for row in rows]

    def append(self, rank: int, rollouts: Iterable[Rollout]) -> None:
        """Write one unit; it is on the disk (fsync) when this returns.

        Raises:
            RunStopped: the disk is full or the folder cannot be written; finished units stay as they are.
        """
        lines = "".join(checked_line(asdict(r)) for r in rollouts)
        path = self.folder / f"rank_{rank:05d}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunStopped(
                f"cannot write rollouts to {path}: {error.strerror}; the finished ones are kept: make room, then run the "
                "same command again",
                here_only=True,
            ) from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the outer loop's rollouts as complete."""
        write_json(self.folder / "DONE.json", summary)


def _read_shard(path: Path) -> list[Rollout]:
    rows: list[Rollout] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = read_checked_line(line)
            if set(record) == _FIELDS:
                rows.append(Rollout(**record))
        except (ValueError, TypeError):
            continue
    return rows


def _cut_torn_end(path: Path) -> None:
    lines = path.read_bytes()
    end = lines.rfind(b"\n") + 1
    if end < len(lines):
        os.truncate(path, end)
