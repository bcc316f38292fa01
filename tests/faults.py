"""Kill a run anywhere, run the same command again, compare everything: ``python -m tests.faults``.

Lives here: the places to kill at, and what must be equal afterwards; runs are forked (``forks.py``). The sweep writes
the table of docs/reliability.md; tests/test_faults.py runs a part of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import ROOT, warm  # noqa: F401
from tests.forks import run as forked

os.environ.setdefault("OMP_NUM_THREADS", "1")

OUTSIDE = '''
from pause_lightning.tasks import Grade, WordProblems
from pause_lightning.recipes import STaR, Example

class Kind(WordProblems):
    """Half of all replies are right, so that an untrained model has something to learn from."""
    def grade(self, reply, answer):
        good = len(reply) % 2 == 0
        return Grade(reply[-3:], good, False, float(good))

class Lengths(STaR):
    """Learns from replies of even length, whatever the task says."""
    def select(self, rollouts, ground_truth, seed):
        return [Example(r.problem_id, tuple(r.prompt_ids), tuple(r.reply_ids)) for r in rollouts if len(r.text) % 2 == 0]

class Everything(STaR):
    def select(self, rollouts, ground_truth, seed):
        return [Example(r.problem_id, tuple(r.prompt_ids), tuple(r.reply_ids)) for r in rollouts if r.correct]
'''
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True, "attention_dropout": 0.1,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.log_every_n_steps": 1,
    "trainer.outer_loop.warmup_epochs": 2,
    "trainer.outer_loop.num_outer_loops": 2,
    "trainer.outer_loop.sft_epochs": 2,
    "checkpoint.every_n_steps": 2,
    "model.tokenizer": "quickstart",
    "model.from_scratch": json.dumps(LLAMA),
    "model.freeze": json.dumps({"lm_head": True, "lm_embeddings": True, "body": True}),
    "model.rollout_sampling.max_new_tokens": 12,
    "model.eval_sampling.max_new_tokens": 12,
    "model.optimizer.lr": 0.01,
    "data.task": "outside.Kind",
    "data.task.init_args.num_train": 40,
    "data.task.init_args.num_test": 8,
    "data.recipe": "outside.Everything",
    "data.pause_injection.n_random_pauses": 3,
    "data.problems_per_unit": 8,
    "data.eval_batch_size": 4,
}


def options(**changed: Any) -> list[str]:
    """The settings as command-line options; ``__`` stands for dots, None leaves one out."""
    settings = SETTINGS | {k.replace("__", "."): v for k, v in changed.items()}
    return [f"--{k}={v}" for k, v in settings.items() if v is not None]


@dataclass(frozen=True)
class Kill:
    """Kill the whole process group when ``point`` is reached for the ``number``-th time in the first process."""

    point: str
    number: int


# ---- where to kill


def arm(kill: Kill) -> None:
    """Make this process die at the point."""
    import torch

    from pause_lightning.checkpoints import RunCheckpoints
    from pause_lightning.module import PauseLitModule
    from pause_lightning.rollouts.store import RolloutStore

    places: dict[str, tuple[Any, str, bool]] = {  # where the function is, its name, whether it runs before the kill
        "before an optimiser step": (torch.optim.AdamW, "step", False),
        "after an optimiser step": (torch.optim.AdamW, "step", True),
        "after a step's checkpoint": (RunCheckpoints, "on_resumable", True),
        "before a rollout unit is written": (RolloutStore, "append", False),
        "after a rollout unit is written": (RolloutStore, "append", True),
        "before rollouts are marked complete": (RolloutStore, "finish", False),
        "inside validation": (PauseLitModule, "validation_step", True),
        "inside a test": (PauseLitModule, "test_step", True),
        "before a file is synced": (os, "fsync", False),
        "before a rename": (os, "replace", False),
        "after a rename": (os, "replace", True),
        "before a link": (os, "link", False),
        "after a link": (os, "link", True),
    }
    seen = 0

    def now() -> bool:
        nonlocal seen
        seen += 1
        return seen == kill.number

    def die() -> None:
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)

    if kill.point == "in the middle of a checkpoint's bytes":
        save = torch.save

        def torn_save(thing: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(thing, file, *args, **kwargs)
            if now():
                file.flush()
                os.truncate(file.name, os.path.getsize(file.name) // 2)
                die()

        torch.save = torn_save
    elif kill.point == "in the middle of a rollout line":
        append = RolloutStore.append

        def torn_append(self: Any, rank: int, rollouts: Any) -> None:
            append(self, rank, rollouts)
            if now():
                path = self.folder / f"rank_{rank:05d}.jsonl"
                os.truncate(path, os.path.getsize(path) - 700)
                die()

        RolloutStore.append = torn_append  # type: ignore[method-assign]
    else:
        owner, name, first = places[kill.point]
        original = getattr(owner, name)

        @functools.wraps(original)
        def deadly(*args: Any, **kwargs: Any) -> Any:
            if not first and now():
                die()
            result = original(*args, **kwargs)
            if first and now():
                die()
            return result

        setattr(owner, name, deadly)


# ---- what must be equal


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that is not a time, a path or a file's metadata."""
    import torch
    from safetensors.torch import load_file

    from pause_lightning.rollouts import RolloutStore

    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    result: dict[str, Any] = {
        "last": last["state_dict"],
        "optimizer": last["optimizer_states"][0]["state"],
        "position": last["loops"]["fit_loop"],
        "kept checkpoints": sorted(p.name for p in (folder / "checkpoints").glob("*.ckpt")),
        "final": load_file(folder / "final" / "model.safetensors"),
        "summary": _timeless(json.loads((folder / "summary.json").read_text())),
        "logged": logged(folder),
    }
    for path in sorted(folder.glob("*_results*.json")):
        result[path.name] = json.loads(path.read_text())
    for path in sorted((folder / "rollouts").glob("outer_*")):
        result[f"rollouts/{path.name}"] = RolloutStore(path).read()
    return result


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "run", "best_checkpoint")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar of the TensorBoard files: a step that was done again after a kill may be there twice, but equal."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[tuple[str, int], float] = {}
    for file in sorted(folder.glob("events.out.tfevents*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if "seconds" not in tag:
                for event in events.Scalars(tag):
                    same = scalars.setdefault((tag, event.step), event.value)
                    if same != event.value and same == same:
                        scalars[(tag, event.step)] = float("inf")
    return {k: (v if v == v else -1.0) for k, v in scalars.items()}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two outcomes differ; tensors bit by bit."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}/{k}: only in one" for k in a.keys() ^ b.keys()]
        return missing + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{where}: {(a - b).abs().max()}"]
    return [] if a == b or (a != a and b != b) else [where]


# ---- the sweep

POINTS = {  # point -> how many of them a run passes at most (a number beyond the end is not counted)
    "before an optimiser step": range(1, 23),
    "after an optimiser step": range(1, 23, 2),
    "after a step's checkpoint": range(1, 23),
    "before a rollout unit is written": range(1, 11),
    "after a rollout unit is written": range(1, 11),
    "in the middle of a rollout line": range(1, 11),
    "before rollouts are marked complete": range(1, 3),
    "in the middle of a checkpoint's bytes": range(1, 25, 2),
    "inside validation": range(1, 4),
    "inside a test": range(1, 5),
    "before a file is synced": range(1, 140, 6),
    "before a rename": range(1, 70, 4),
    "after a rename": range(3, 70, 4),
    "before a link": range(1, 9, 2),
    "after a link": range(2, 9, 2),
}
QUICK = [
    Kill("before an optimiser step", 4), Kill("before an optimiser step", 13), Kill("after an optimiser step", 20),
    Kill("after a step's checkpoint", 10), Kill("in the middle of a rollout line", 7), Kill("inside validation", 2),
    Kill("in the middle of a checkpoint's bytes", 5), Kill("before a rename", 21), Kill("inside a test", 3),
]  # fmt: skip
FEW = [
    Kill("after a step's checkpoint", 8), Kill("in the middle of a rollout line", 2), Kill("before an optimiser step", 3),
    Kill("inside validation", 2),
]  # fmt: skip


@dataclass
class Variant:
    """One way to run the same thing: so many processes, under a strategy."""

    name: str
    processes: int
    changed: dict[str, Any]
    kills: list[Kill]
    random_kills: int = 0


def variants(quick: bool) -> list[Variant]:
    every = [Kill(point, n) for point, numbers in POINTS.items() for n in numbers]
    two = {"trainer__devices": 2}
    rng = random.Random(0)
    reached = [k for k in every if k.number <= (12 if "step" in k.point else 4 if "roll" in k.point else 40)]
    ddp = FEW if quick else [*FEW, *rng.sample(reached, 26)]
    fsdp = FEW[:2] if quick else [*FEW, *rng.sample(reached, 14)]
    lora = {
        "model__lora__r": 2, "model__freeze": None, "model__optimizer__outer_schedule": "cosine",
        "trainer__accumulate_grad_batches": 2, "trainer__gradient_clip_val": 1.0, "trainer__outer_loop__restart": "weights",
    }  # fmt: skip
    some = [k for k in every if "step" in k.point or "inside" in k.point or "line" in k.point][::3]
    return [
        Variant("1 process", 1, {}, QUICK if quick else every, 0 if quick else 20),
        Variant("1 process, LoRA, accumulation, weights restarted", 1, lora, FEW if quick else some),
        Variant("2 processes, ddp", 2, two | {"trainer__strategy": "ddp"}, ddp),
        Variant("2 processes, fsdp2", 2, two | {"trainer__strategy": "fsdp2"}, fsdp),
    ]


def run(args: list[str], cwd: Path, kill: Kill | None = None, processes: int = 1, after: float | None = None) -> Any:
    """A command of the package in ``cwd``, where the module ``outside`` can be imported; killed at ``kill``."""
    (cwd / "outside.py").write_text(OUTSIDE)
    return forked(args, cwd, processes, None if kill is None else (lambda: arm(kill)), after)


def sweep(variant: Variant, work: Path, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """(point, "" or what differs) of every kill of a variant that happened."""
    args = ["fit", *options(**variant.changed)]
    whole = work / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    done = run(args, whole, processes=variant.processes)
    assert done.code == 0, done.err
    seconds = time.monotonic() - began
    expected = outcome(whole / "runs" / "run")
    rows: list[tuple[str, str]] = []
    rng = random.Random(1)
    kills: list[Kill | float] = [*variant.kills, *(rng.uniform(0.1, 1.0) * seconds for _ in range(variant.random_kills))]
    for number, kill in enumerate(kills):
        cwd = work / f"{number}"
        cwd.mkdir()
        at = "at a random time" if isinstance(kill, float) else kill.point
        if isinstance(kill, float):
            died = run(args, cwd, processes=variant.processes, after=kill)
        else:
            died = run(args, cwd, kill, variant.processes)
        if died.code == 0:
            shutil.rmtree(cwd)
            continue
        wrong = died.err if died.code != -signal.SIGKILL else ""
        again = run(args, cwd, processes=variant.processes)
        if again.code != 0:
            wrong = f"exit {again.code}: {again.err[-2000:]}"
        elif sorted(p.name for p in (cwd / "runs").iterdir()) != ["run"]:
            wrong = "a second run folder"
        elif not wrong:
            wrong = "; ".join(differences(expected, outcome(cwd / "runs" / "run"))[:3])
        rows.append((at, wrong))
        if wrong:
            say(f"{variant.name}, {kill}: {wrong}")
        else:
            shutil.rmtree(cwd)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few positions only")
    parser.add_argument("--variant", help="only variants whose name contains this")
    args = parser.parse_args()
    warm()
    failed = 0
    print("| processes | killed | positions | different after the resume |\n|---|---|---|---|")
    for variant in variants(args.quick):
        if args.variant and args.variant not in variant.name:
            continue
        with tempfile.TemporaryDirectory() as work:
            rows = sweep(variant, Path(work), lambda text: print(text, file=sys.stderr, flush=True))
        for point in dict.fromkeys(at for at, _ in rows):
            wrong = [w for at, w in rows if at == point]
            print(f"| {variant.name} | {point} | {len(wrong)} | {sum(map(bool, wrong))} |", flush=True)
        different = sum(bool(w) for _, w in rows)
        print(f"| **{variant.name}** | **all** | **{len(rows)}** | **{different}** |", flush=True)
        failed += different
    return 1 if failed else 0


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        sys.exit(subprocess.call([sys.executable, "-m", "tests.faults", *sys.argv[1:]]))
    sys.exit(main())
