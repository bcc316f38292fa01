"""The quickstart's numbers: seeds, and for each seed the control with as many further steps on the same rationales.

    python scripts/quickstart_study.py --seeds 0 1 2        (about eight minutes a seed on two cores)

The control starts from the weights from before the outer loops and trains, with 0 outer loops, as many steps on the
warm-up's rationales as the outer loops took, at their learning rate. Prints a Markdown table; runs are kept in ``runs/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pause_lightning.stats import mcnemar, show_accuracy


def fit(name: str, seed: int, *options: str) -> dict[str, Any]:
    """Run the quickstart with ``options`` (unless ``runs/<name>`` is finished) and return its summary."""
    summary = Path("runs") / name / "summary.json"
    if not summary.exists():
        args = ["fit", "--config", "quickstart", "--seed_everything", str(seed), "--run_name", name, *options]
        subprocess.run([sys.executable, "-m", "pause_lightning", *args], check=True)
    return json.loads(summary.read_text())


def control(name: str, seed: int, of: str, steps: int) -> dict[str, Any]:
    data = yaml.safe_load((Path("runs") / of / "config.yaml").read_text())
    optimizer = data["model"]["optimizer"]
    batches = -(-data["data"]["num_warmup_problems"] // data["data"]["batch_size"])
    return fit(
        name,
        seed,
        *("--model.init_from", f"runs/{of}/checkpoints/start_of_outer_loops.ckpt"),
        *("--trainer.outer_loop.num_outer_loops", "0"),
        *("--trainer.outer_loop.warmup_epochs", str(steps // batches + 1)),
        *("--trainer.max_steps", str(steps)),
        *("--model.optimizer.lr", str(optimizer["outer_lr"])),
        *("--model.optimizer.schedule", optimizer["outer_schedule"]),
        *("--model.optimizer.lr_warmup_steps", "0"),
    )


def show(m: dict[str, Any]) -> str:
    return show_accuracy(m["accuracy"], m["accuracy_low"], m["accuracy_high"], int(m["n"]))


def verdicts(name: str) -> list[bool]:
    rows = json.loads((Path("runs") / name / "test_results.json").read_text())
    return [row["test/accuracy"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print("| seed | before the outer loops | after | p | control | p, after against control | pauses, greedy | fit, s |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        name = f"study-{seed}"
        run = fit(name, seed)
        steps = sum(p.get("steps", 0) for p in run["phases"] if p["phase"] != "warm-up")
        other = control(f"{name}-control", seed, name, steps)
        against = mcnemar(verdicts(f"{name}-control"), verdicts(name))[2]
        pauses = " / ".join(f"{run['test'][k]:.2f}" for k in ("pauses", "pauses_correct", "pauses_incorrect"))
        cells = (
            seed,
            show(run["test_before_outer_loops"]),
            show(run["test"]),
            f"{run['paired_test']['p']:.1g}",
            show(other["test"]),
            f"{against:.1g}",
            pauses,
            round(run["seconds"]["fit"]),
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
