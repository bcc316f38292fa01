"""The rollouts of one outer loop: dealt out to the processes, sampled, graded, stored, measured. Knows no model, no task.

Lives here: ``RolloutLoop`` and ``call_hook``. When it runs is ``loops.py``'s business; what is on the disk is never sampled
again (``rollouts/store.py``).

What the module must offer: ``rollout_unit(unit or None, samples, seed, on_progress) -> list[Rollout]``,
``policy_fingerprint() -> str``, ``generating()`` (a context) and ``in_step``; the data module: ``rollout_units``,
``train_on_warmup``, ``train_on_rollouts``, ``hash``. Callbacks may have the hooks on_rollout_start(trainer, module,
outer, total, done), on_rollout_progress(..., outer, n), on_rollout_unit_end(..., outer, rollouts), on_rollout_end(...,
outer, metrics), on_sft_start(..., outer, kept), on_resumable(trainer, module, position).
"""

from __future__ import annotations

import hashlib
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pause_lightning.batches import stable_seed
from pause_lightning.errors import Interrupted, UserError
from pause_lightning.metrics import ReplyMetrics
from pause_lightning.processes import WorkQueue, any_of
from pause_lightning.rollouts.store import Rollout, RolloutStore
from pause_lightning.schedule import OuterLoop


def call_hook(trainer: Any, name: str, *args: Any) -> None:
    """Call an optional callback hook of ours (Lightning's dispatcher knows its own names only)."""
    for callback in trainer.callbacks:
        hook = getattr(callback, name, None)
        if callable(hook):
            hook(trainer, trainer.lightning_module, *args)


class RolloutLoop:
    """Samples, grades and stores the replies of one outer loop; what is on disk already is not sampled again."""

    def __init__(self, trainer: Any, settings: OuterLoop) -> None:
        self.trainer, self.settings = trainer, settings
        self.policy: str | None = None  # fingerprint of the policy that the last rollouts are of

    def store(self, outer: int) -> RolloutStore:
        return RolloutStore(Path(self.trainer.default_root_dir) / "rollouts" / f"outer_{outer:03d}")

    def fingerprint(self, units: list[Any]) -> dict[str, Any]:
        """What the rollouts of an outer loop are a function of."""
        module = self.trainer.lightning_module
        return {
            "policy": module.policy_fingerprint(),
            "sampling": asdict(module.rollout_sampling),
            "samples_per_problem": self.settings.samples_per_problem,
            "seed": self.settings.seed,
            "data": self.trainer.datamodule.hash,
            "problems": hashlib.sha256(repr([(u.index, [p.ids for p in u.prompts]) for u in units]).encode()).hexdigest(),
        }

    def run(self, outer: int) -> dict[str, float]:
        """Complete the rollouts of ``outer``; returns their metrics.

        Units (fixed blocks of problems) are dealt out to the processes; a unit's replies are a function of the unit,
        the policy and the seed, whichever process samples them.

        Raises:
            UserError: the folder holds rollouts of something else.
            Interrupted: told to stop; finished units are on the disk.
        """
        trainer, module, started = self.trainer, self.trainer.lightning_module, time.monotonic()
        units = trainer.datamodule.rollout_units(outer)
        samples, store = self.settings.samples_per_problem, self.store(outer)
        fingerprint = self.fingerprint(units)
        self.policy = fingerprint["policy"]
        done: set[int] = set()
        if trainer.is_global_zero:
            store.open(fingerprint)
            done = store.units()
        done = trainer.strategy.broadcast(done)
        total = samples * sum(len(u.prompts) for u in units)
        before = samples * sum(len(u.prompts) for u in units if u.index in done)
        call_hook(trainer, "on_rollout_start", outer, total, before)

        def on_progress(n: int) -> None:
            if not module.in_step:
                trainer.stop.check()
            if n:
                call_hook(trainer, "on_rollout_progress", outer, n)

        missing = [u for u in units if u.index not in done]
        with module.generating():
            for unit in WorkQueue(trainer, missing, in_step=module.in_step):
                seed = stable_seed(self.settings.seed, "rollout", outer, unit.index if unit else None)
                rollouts = module.rollout_unit(unit, samples, seed, on_progress)
                if unit is not None:
                    store.append(trainer.global_rank, rollouts)
                    call_hook(trainer, "on_rollout_unit_end", outer, rollouts)
                if not module.in_step:
                    trainer.stop.check()
                elif any_of(trainer, trainer.stop.received is not None)[0]:
                    raise Interrupted(trainer.stop.received or signal.SIGTERM)
        trainer.strategy.barrier("rollout")
        metrics = self.metrics(self.read(outer, units)) | {"seconds": time.monotonic() - started}
        if trainer.is_global_zero:
            store.finish({"outer": outer, **metrics})
        trainer.strategy.barrier("rollout_done")
        self._log({f"rollout/{k}": v for k, v in metrics.items()})
        call_hook(trainer, "on_rollout_end", outer, metrics)
        return metrics

    def read(self, outer: int, units: list[Any] | None = None) -> list[Rollout]:
        """All rollouts of ``outer``, in the order of the units.

        Raises:
            UserError: some are missing. They cannot be sampled anew, as the policy has moved on.
        """
        store = self.store(outer)
        wanted = {u.index for u in (units or self.trainer.datamodule.rollout_units(outer))}
        rollouts = store.read()
        if self.policy is not None and store.policy() != self.policy:
            raise UserError(
                f"{store.folder}: these are not the rollouts this checkpoint was being trained on (meta.json names another "
                "policy): restore them, or go back to an older checkpoint with --ckpt_path"
            )
        if missing := sorted(wanted - {r.unit for r in rollouts}):
            raise UserError(
                f"{store.folder}: {len(missing)} of {len(wanted)} units of rollouts are missing or damaged (first: unit "
                f"{missing[0]}), and the policy was trained since. Delete last.ckpt and last_epoch.ckpt of this run, then "
                "run the same command again: it goes on from an older checkpoint and samples them again"
            )
        return [r for r in rollouts if r.unit in wanted]

    @staticmethod
    def metrics(rollouts: list[Rollout]) -> dict[str, float]:
        measured = ReplyMetrics(sync_on_compute=False)  # every process has read all of them
        for r in rollouts:
            measured.update(
                correct=r.correct,
                reference_correct=r.reference_correct,
                pauses=r.pauses,
                tokens=len(r.reply_ids),
                finished=r.finish_reason == "eos",
                answered=r.answer is not None,
            )
        return measured.compute()

    def _log(self, metrics: dict[str, float]) -> None:
        # self.log is not legal outside Lightning's own phases (lightning-notes.md 1.2, point 10)
        connector = self.trainer._logger_connector
        connector.log_metrics(metrics, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        connector._callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
