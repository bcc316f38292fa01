"""What a person sees of a run, and what it leaves on disk while it goes on.

Lives here: ``PhaseReport`` (one line per finished phase), ``OuterLoopProgressBar`` (bars with rates and running
accuracy in every long phase), ``ResultsWriter`` (val_results_*.json, test_results.json, predictions.jsonl).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from tqdm.auto import tqdm

from pause_lightning.files import atomic, write_json
from pause_lightning.module import say
from pause_lightning.processes import gather
from pause_lightning.stats import show_accuracy


def show_metrics(m: dict[str, float]) -> str:
    """Accuracy with n and interval, then pauses and the shares that explain it."""
    accuracy = show_accuracy(m["accuracy"], m["accuracy_low"], m["accuracy_high"], int(m["n"]))
    pauses = "/".join(f"{m[k]:.2f}" for k in ("pauses", "pauses_correct", "pauses_incorrect"))
    return f"{accuracy}, pauses {pauses} (all/correct/incorrect), finished {100 * m['finished']:.0f}%"


class PhaseReport(Callback):
    """Prints one line when a phase is finished: warm-up, rollouts, SFT, validation, test."""

    def __init__(self) -> None:
        self.phases: list[dict[str, Any]] = []
        self._losses: deque[float] = deque(maxlen=100)
        self._started = time.monotonic()
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"phases": self.phases, "losses": list(self._losses), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.phases, self._step = state_dict["phases"], state_dict["step"]
        self._losses.extend(state_dict["losses"])

    def _line(self, name: str, text: str, **facts: Any) -> None:
        seconds = time.monotonic() - self._started
        self.phases.append({"phase": name, "seconds": round(seconds, 2), **facts})
        say(f"{name:<18} {text}  [{seconds:.1f} s]")
        self._started = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["mean_loss"])

    def _training_line(self, trainer: Any) -> None:
        if not self._losses:
            return
        loop = trainer.fit_loop
        name = "warm-up" if loop.outer_index is None else f"outer loop {loop.outer_index} sft"
        recent, steps = sum(self._losses) / len(self._losses), trainer.global_step - self._step
        self._line(name, f"{steps} steps, loss {recent:.4f} (last {len(self._losses)})", steps=steps)
        self._losses.clear()
        self._step = trainer.global_step

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.training or trainer.state.fn == "fit":
            self._training_line(trainer)
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = pl_module.metrics_of["val"]
        self._line("  validation", show_metrics(metrics), metrics=metrics)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = time.monotonic()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        name = pl_module.test_name
        self._line(name.replace("_", " "), show_metrics(pl_module.metrics_of[name]), metrics=pl_module.metrics_of[name])

    def on_rollout_start(self, trainer: Any, pl_module: Any, outer: int, total: int, done: int) -> None:
        self._started = time.monotonic()

    def on_rollout_end(self, trainer: Any, pl_module: Any, outer: int, metrics: dict[str, float]) -> None:
        self._line(f"outer loop {outer} rollout", show_metrics(metrics), metrics=metrics)

    def on_sft_start(self, trainer: Any, pl_module: Any, outer: int, kept: int) -> None:
        say(f"{'':<18} {kept} replies kept to learn from")


class OuterLoopProgressBar(TQDMProgressBar):
    """Lightning's bars, plus one for rollouts and running accuracy in rollouts, validation and test.

    Off when stderr is no terminal: a log file gets the finished lines only.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)
        self._bar: Any = None
        self._seen, self._correct = 0, 0

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        loop, schedule = trainer.fit_loop, trainer.outer_loop
        after = loop.epoch_index - schedule.warmup_epochs
        name, epoch, of = "Warm-up", loop.epoch_index + 1, schedule.warmup_epochs
        if after >= 0:
            name, epoch, of = f"SFT {loop.outer_index}", after % schedule.sft_epochs + 1, schedule.sft_epochs
        self.train_progress_bar.set_description(f"{name}, epoch {epoch} of {of}")

    def on_rollout_start(self, trainer: Any, pl_module: Any, outer: int, total: int, done: int) -> None:
        self._bar = tqdm(
            desc=f"Rollout {outer}", total=total, initial=done, unit="reply", disable=self.is_disabled, leave=False
        )
        self._seen = self._correct = 0

    def on_rollout_progress(self, trainer: Any, pl_module: Any, outer: int, n: int) -> None:
        self._bar.update(n * trainer.world_size)

    def on_rollout_unit_end(self, trainer: Any, pl_module: Any, outer: int, rollouts: list[Any]) -> None:
        self._seen += len(rollouts)
        self._correct += sum(r.correct for r in rollouts)
        self._bar.set_postfix(accuracy=f"{self._correct / self._seen:.3f}")

    def on_rollout_end(self, trainer: Any, pl_module: Any, outer: int, metrics: dict[str, float]) -> None:
        self._bar.close()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().on_validation_batch_end(trainer, pl_module, *args, **kwargs)
        self._running(pl_module, self.val_progress_bar)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().on_test_batch_end(trainer, pl_module, *args, **kwargs)
        self._running(pl_module, self.test_progress_bar)

    def _running(self, pl_module: Any, bar: Any) -> None:
        if not self.is_disabled and pl_module.measured.n:
            bar.set_postfix(accuracy=f"{float(pl_module.measured.correct / pl_module.measured.n):.3f}")


class ResultsWriter(Callback):
    """Writes the graded replies of every validation and test, in the order of the problems."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            name = "val_results.json"
        elif trainer.fit_loop.outer_index is None:
            name = "val_results_warmup.json"
        else:
            name = f"val_results_outer_loop_{trainer.fit_loop.outer_index}.json"
        self._write(trainer, pl_module, name)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, pl_module, f"{pl_module.test_name}_results.json")

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        rows = in_order(trainer, pl_module.results)
        if trainer.is_global_zero and rows:
            path = Path(trainer.default_root_dir) / "predictions.jsonl"
            with atomic(path) as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            say(f"{len(rows)} replies written to {path}")

    def _write(self, trainer: Any, pl_module: Any, name: str) -> None:
        rows = in_order(trainer, pl_module.results)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_json(Path(trainer.default_root_dir) / name, rows)


def in_order(trainer: Any, results: list[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The rows of all processes, in the order of the problems."""
    batches = sorted(gather(trainer, results), key=lambda numbered: numbered[0])
    return [row for _, rows in batches for row in rows]


class Retention(Callback):
    """Deletes rollouts and validation replies of outer loops that are done, but for the newest ``keep_loops``."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        keep, outer = trainer.outer_loop.keep_loops, trainer.fit_loop.outer_index
        if keep is None or outer is None or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        for old in range(outer - keep, -1, -1):
            folder = run / "rollouts" / f"outer_{old:03d}"
            if not folder.exists():
                break
            shutil.rmtree(folder)
            (run / f"val_results_outer_loop_{old}.json").unlink(missing_ok=True)
