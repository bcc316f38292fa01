"""Damage one file of a cut-off run, or of its inputs, and run the same command again: ``python -m tests.corruption``.

Lives here: the worlds (a folder with inputs and a run that was killed), the damages, and the verdict: one clear line, or
exactly the result without the damage. Everything else is a failure. The table is quoted in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import Kill, differences, options, outcome, run, warm

Damage = Callable[[bytes], "bytes | None"]


def flip(where: float) -> Damage:
    """One byte, at this fraction of the file, gets other bits."""

    def damage(content: bytes) -> bytes:
        at = min(int(where * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :]

    return damage


FLIPS: dict[str, Damage] = {f"byte flipped at {100 * w:.0f}%": flip(w) for w in (0, 0.25, 0.5, 0.75, 1)}
CUTS: dict[str, Damage] = {
    "cut to half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "replaced by garbage": lambda content: bytes(range(256)) * 20,
    "deleted": lambda content: None,
}
ALL = FLIPS | CUTS
CHANGED = {name: damage for name, damage in CUTS.items() if name != "deleted"}  # of files that nothing reads any more
JSON: dict[str, Damage] = {"another type": lambda content: b"[1, 2]\n", "a key missing": lambda content: b"{}\n"}


@dataclass
class World:
    """A folder in which ``args`` was run, killed at ``kill`` (or not run at all), and what the whole run leaves."""

    name: str
    args: list[str]
    kill: Kill | None
    files: dict[str, dict[str, Damage]]
    prepare: Callable[[Path], None] = lambda folder: None
    expected: dict[str, Any] = field(default_factory=dict)


def write_data(folder: Path) -> None:
    """A GSM8K-format data set of its own."""
    from pause_lightning.tasks import WordProblems

    (folder / "data").mkdir()
    for name, problems in WordProblems(num_train=40, num_test=8).load().items():
        rows = [json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems]
        (folder / "data" / f"{name}.jsonl").write_text("".join(rows))


def export(folder: Path, **changed: Any) -> None:
    """A base model (and an adapter on it) made by earlier runs."""
    for run_name, more in (("base", {}), ("tuned", changed)):
        if more or run_name == "base":
            few = {"trainer__outer_loop__num_outer_loops": 0, "trainer__outer_loop__test_after_fit": "false"}
            done = run(["fit", *options(**few, **more), "--run_name", run_name, "--runs_dir", "made"], folder)
            assert done.code == 0, done.err
        if run_name == "base":
            shutil.copytree(folder / "made" / "base" / "final", folder / "base")
    if changed:
        shutil.copytree(folder / "made" / "tuned" / "adapter", folder / "adapter")
    shutil.rmtree(folder / "made")


def worlds() -> list[World]:
    settings = options()
    checkpoints = {
        "checkpoints/last.ckpt": ALL, "checkpoints/last_epoch.ckpt": CHANGED, "checkpoints/*.ckpt": CUTS,
        "checkpoints/start_of_outer_loops.ckpt": CUTS, "checkpoints/epoch0*.ckpt": {"deleted": CUTS["deleted"]},
    }  # fmt: skip
    on_base = {"model__from_scratch": None, "model__tokenizer": None, "model__path": "base", "data__task": "GSM8K"}
    on_base |= {"data__task__init_args__num_train": None, "data__task__init_args__num_test": None}
    on_base |= {"data__task__init_args__path": "./data", "data__recipe": "outside.Lengths"}
    lora = {"model__from_scratch": None, "model__path": "base", "model__tokenizer": None, "model__lora__r": 2}
    lora |= {"model__freeze": None}
    adapter = lora | {"model__path": "adapter", "model__lora__r": None, "trainer__outer_loop__num_outer_loops": 0}
    model = {"base/model.safetensors": ALL, "base/tokenizer.json": ALL, "base/config.json": ALL | JSON}
    return [
        World("killed in rollouts", ["fit", *settings], Kill("before a rollout unit is written", 8), {
            "rollouts/outer_001/rank_00000.jsonl": ALL, "rollouts/outer_001/meta.json": ALL | JSON,
            "config.yaml": ALL, "inputs.json": ALL | JSON,
        }),
        World("killed in SFT", ["fit", *settings], Kill("before an optimiser step", 19), {
            **checkpoints, "rollouts/outer_001/rank_00000.jsonl": ALL, "rollouts/outer_001/DONE.json": ALL | JSON,
            "rollouts/outer_001/meta.json": CUTS,
        }),
        World("killed in the test", ["fit", *settings], Kill("inside a test", 3), {
            **checkpoints,
        }),
        World("data and base model, killed in SFT", ["fit", *options(**on_base)], Kill("before an optimiser step", 13), {
            "../../data/train.jsonl": ALL, "../../data/test.jsonl": ALL,
            **{f"../../{name}": damages for name, damages in model.items()}, "../../base/SHA256SUMS": ALL,
        }, lambda folder: (write_data(folder), export(folder))),  # type: ignore[func-returns-value]
        World("adapter as model.path, not begun", ["fit", *options(**adapter)], None, {
            "../../adapter/adapter_model.safetensors": ALL, "../../adapter/adapter_config.json": ALL | JSON,
            "../../adapter/config.json": CUTS | JSON, "../../adapter/tokenizer.json": CUTS,
            "../../base/model.safetensors": FLIPS,
        }, lambda folder: export(folder, **lora)),
        World("a --config file, killed in SFT", ["fit", *settings, "--config", "mine.yaml"],
              Kill("before an optimiser step", 5), {"../../mine.yaml": ALL}, _write_config),
    ]  # fmt: skip


def _write_config(folder: Path) -> None:
    (folder / "mine.yaml").write_text("model:\n  optimizer:\n    weight_decay: 0.25\ndata:\n  batch_size: 6\n")


def begin(world: World, work: Path) -> Path:
    """Make the world's folder; its expected outcome comes from a copy in which nothing was killed."""
    start, whole = work / "start", work / "whole"
    start.mkdir(parents=True)
    world.prepare(start)
    shutil.copytree(start, whole)
    done = run(world.args, whole)
    assert done.code == 0, done.err
    world.expected = outcome(whole / "runs" / "run")
    if world.kill is not None:
        assert run(world.args, start, world.kill).code < 0
    return start


def verdict(world: World, cwd: Path) -> str:
    """ "recovered", "error", or what is wrong."""
    done = run(world.args, cwd)
    lines = [line for line in done.err.splitlines() if line.strip()]
    if done.code == 0:
        newest = max((cwd / "runs").iterdir(), key=lambda p: (p / "summary.json").exists() and p.stat().st_mtime)
        wrong = differences(world.expected, outcome(newest))
        return f"wrong: {wrong[:3]}" if wrong else "recovered"
    if done.code in (1, 2) and lines and lines[-1].startswith("pause_lightning: ") and "Traceback" not in done.err:
        return "error"
    return f"exit {done.code}: " + " / ".join(lines[-3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one damage of each file")
    parser.add_argument("--world", default="", help="only worlds whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="say what each damage led to")
    args = parser.parse_args()
    warm()
    total = failed = 0
    print("| world | damaged file | ways | one clear line | recovered exactly | failed |\n|---|---|---|---|---|---|")
    for world in worlds():
        if args.world not in world.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = begin(world, Path(folder))
            for number, (pattern, damages) in enumerate(world.files.items()):
                found: list[str] = []
                for name, damage in list(damages.items())[:: 100 if args.quick else 1]:
                    cwd = Path(folder) / f"{number}"
                    shutil.copytree(start, cwd)
                    paths = (
                        sorted((cwd / "runs" / "run").glob(pattern)) if "*" in pattern else [cwd / "runs" / "run" / pattern]
                    )
                    (cwd / "runs" / "run").mkdir(parents=True, exist_ok=True)
                    for path in paths:
                        content = damage(path.read_bytes())
                        path.unlink()
                        if content is not None:
                            path.write_bytes(content)
                    found.append(verdict(world, cwd))
                    if args.verbose or found[-1] not in ("error", "recovered"):
                        print(f"{world.name}: {pattern} {name}: {found[-1]}", file=sys.stderr, flush=True)
                    shutil.rmtree(cwd)
                errors, exact = found.count("error"), found.count("recovered")
                total, failed = total + len(found), failed + len(found) - errors - exact
                shown = pattern.removeprefix("../../")
                print(
                    f"| {world.name} | {shown} | {len(found)} | {errors} | {exact} | {len(found) - errors - exact} |",
                    flush=True,
                )
    print(f"| **all** | | **{total}** | | | **{failed}** |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
