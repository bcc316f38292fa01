"""When things happen: warm-up epochs, then rollouts and SFT epochs in turn. Knows no model, no task, no pause.

Lives here: ``OuterLoopLoop`` (Lightning's fit loop with a schedule), ``RolloutLoop`` and the ``OuterLoop`` settings.

One Lightning epoch is one SFT epoch; the schedule is flat (lightning-notes.md 1.2): epoch e < warmup_epochs is
warm-up, then ``sft_epochs`` epochs belong to each outer loop, whose rollouts are sampled in ``on_advance_start`` of its
first epoch unless they are complete on disk. So the epoch counter in a checkpoint says everything about the position,
and the rollouts on disk say the rest. The loop protocol is Lightning's private one, hence ``lightning<2.7``.

What the module must offer: ``rollout_unit(unit, samples, seed, on_progress) -> list[Rollout]`` and
``policy_fingerprint() -> str``; the data module: ``rollout_units``, ``train_on_warmup``, ``train_on_rollouts``, ``hash``.
Callbacks may have the hooks on_rollout_start(trainer, module, outer, total, done), on_rollout_progress(..., outer, n),
on_rollout_unit_end(..., outer, rollouts), on_rollout_end(..., outer, metrics), on_sft_start(..., outer, kept).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pause_lightning.batches import stable_seed
from pause_lightning.errors import RunStopped, UserError
from pause_lightning.metrics import ReplyMetrics
from pause_lightning.rollouts.store import Rollout, RolloutStore

MAX_EMPTY_LOOPS = 3
START = "start_of_outer_loops.ckpt"


@dataclass
class OuterLoop:
    """The schedule: warm-up epochs, then num_outer_loops times (rollouts, then SFT epochs on what is kept).

    Args:
        warmup_epochs: SFT epochs on the answers of the data set; 0 starts from the model as it is
        num_outer_loops: rounds of rollouts and SFT; 0 is plain SFT
        sft_epochs: SFT epochs on the kept replies of one outer loop
        samples_per_problem: replies sampled to each problem in an outer loop
        restart: what starts anew before the SFT of every outer loop: nothing, the optimizer, or also the weights
            (those from before the first outer loop, as in the STaR paper)
        test_after_fit: test the best checkpoint, and the weights from before the first outer loop, when fit ends
        seed: seed of sampling; on the command line it is seed_everything
    """

    warmup_epochs: int = 1
    num_outer_loops: int = 10
    sft_epochs: int = 1
    samples_per_problem: int = 1
    restart: Literal["nothing", "optimizer", "weights"] = "nothing"
    test_after_fit: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in (
            ("warmup_epochs", 0),
            ("num_outer_loops", 0),
            ("sft_epochs", 1),
            ("samples_per_problem", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"trainer.outer_loop.{name} must be at least {least}, got {getattr(self, name)}")
        if self.warmup_epochs + self.num_outer_loops == 0:
            raise UserError("nothing to do: trainer.outer_loop.warmup_epochs and num_outer_loops are both 0")

    @property
    def epochs(self) -> int:
        return self.warmup_epochs + self.num_outer_loops * self.sft_epochs


def call_hook(trainer: Any, name: str, *args: Any) -> None:
    """Call an optional callback hook of ours (Lightning's dispatcher knows its own names only)."""
    for callback in trainer.callbacks:
        hook = getattr(callback, name, None)
        if callable(hook):
            hook(trainer, trainer.lightning_module, *args)


class RolloutLoop(_Loop):
    """Samples, grades and stores the replies of one outer loop; what is on disk already is not sampled again."""

    def __init__(self, trainer: Any, settings: OuterLoop) -> None:
        super().__init__(trainer)
        self.settings = settings

    def store(self, outer: int) -> RolloutStore:
        return RolloutStore(Path(self.trainer.default_root_dir) / "rollouts" / f"outer_{outer:03d}")

    def fingerprint(self) -> dict[str, Any]:
        """What the rollouts of an outer loop are a function of."""
        module = self.trainer.lightning_module
        return {
            "policy": module.policy_fingerprint(),
            "sampling": asdict(module.rollout_sampling),
            "samples_per_problem": self.settings.samples_per_problem,
            "seed": self.settings.seed,
            "data": self.trainer.datamodule.hash,
        }

    def run(self, outer: int) -> dict[str, float]:
        """Complete the rollouts of ``outer``; returns their metrics."""
        trainer, module, started = self.trainer, self.trainer.lightning_module, time.monotonic()
        units = trainer.datamodule.rollout_units(outer)
        samples = self.settings.samples_per_problem
        store = self.store(outer)
        if trainer.is_global_zero:
            store.open(self.fingerprint())
        trainer.strategy.barrier("rollout_open")
        done = {rollout.unit for rollout in store.read()}
        mine = [u for u in units if u.index % trainer.world_size == trainer.global_rank and u.index not in done]
        total = samples * sum(len(u.prompts) for u in units)
        before = samples * sum(len(u.prompts) for u in units if u.index in done)
        call_hook(trainer, "on_rollout_start", outer, total, before)
        was_training = module.training
        module.eval()
        try:
            for unit in mine:
                seed = stable_seed(self.settings.seed, "rollout", outer, unit.index)
                rollouts = module.rollout_unit(
                    unit, samples, seed, lambda n: call_hook(trainer, "on_rollout_progress", outer, n)
                )
                store.append(trainer.global_rank, rollouts)
                call_hook(trainer, "on_rollout_unit_end", outer, rollouts)
                if trainer.received_sigterm:
                    raise SIGTERMException
        finally:
            module.train(was_training)
        trainer.strategy.barrier("rollout")
        metrics = self.metrics(store.read()) | {"seconds": time.monotonic() - started}
        if trainer.is_global_zero:
            store.finish({"outer": outer, **metrics})
        trainer.strategy.barrier("rollout_done")
        self._log({f"rollout/{k}": v for k, v in metrics.items()})
        call_hook(trainer, "on_rollout_end", outer, metrics)
        return metrics

    @staticmethod
    def metrics(rollouts: list[Rollout]) -> dict[str, float]:
        measured = ReplyMetrics()
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


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's batch loop, which validates where a phase ends rather than every n epochs."""

    def _should_check_val_epoch(self) -> bool:
        return bool(self.trainer.enable_validation)

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        if not self.trainer.enable_validation:
            return False
        if _is_max_limit_reached(self.global_step, self.max_steps):
            return True
        if self.restarting and self.batch_progress.is_last_batch:
            return True  # saved where a phase ended, maybe of another schedule: that epoch is over
        return self.batch_progress.is_last_batch and self.trainer.fit_loop.epoch_ends_phase


class OuterLoopLoop(_FitLoop):
    """The fit loop of ``OuterLoopTrainer``; ``install`` puts it into any Lightning Trainer."""

    def __init__(self, trainer: Any, settings: OuterLoop, min_epochs: int | None = 0, max_epochs: int | None = None):
        super().__init__(trainer, min_epochs=min_epochs, max_epochs=max_epochs)
        self.settings = settings
        self.rollout_loop = RolloutLoop(trainer, settings)
        self._data_of: int | None = None  # outer loop whose data is loaded; -1: the warm-up's
        self._prepared = -1  # last outer loop whose restart has been done
        self._empty = 0  # outer loops in a row that kept nothing
        self._finish_epoch = False

    @classmethod
    def install(cls, trainer: Any, settings: OuterLoop) -> OuterLoopLoop:
        old = trainer.fit_loop
        new = cls(trainer, settings, old.min_epochs, old.max_epochs)
        new.epoch_loop = _EpochLoop(trainer, old.min_steps, old.max_steps)
        new._data_source = old._data_source
        trainer.fit_loop = new
        return new

    # ---- position

    @property
    def epoch_index(self) -> int:
        return self.epoch_progress.current.processed

    @property
    def outer_index(self) -> int | None:
        """The outer loop this epoch belongs to; None in the warm-up."""
        after = self.epoch_index - self.settings.warmup_epochs
        return None if after < 0 else after // self.settings.sft_epochs

    @property
    def epoch_ends_phase(self) -> bool:
        after = self.epoch_index + 1 - self.settings.warmup_epochs
        return after >= 0 and after % self.settings.sft_epochs == 0

    def phase_progress(self) -> tuple[bool, int, int]:
        """(in the warm-up?, optimiser steps done in this phase, optimiser steps of this phase)."""
        s, outer = self.settings, self.outer_index
        epochs = s.warmup_epochs if outer is None else s.sft_epochs
        first = 0 if outer is None else s.warmup_epochs + outer * s.sft_epochs
        accumulate = self.trainer.accumulate_grad_batches
        per_epoch = math.ceil(self.max_batches / accumulate) if math.isfinite(self.max_batches) else 0
        done = (self.epoch_index - first) * per_epoch + self.batch_idx // accumulate
        total = per_epoch * epochs
        return outer is None, done, total if self.max_steps == -1 else min(total, self.max_steps)

    # ---- data

    def setup_data(self) -> None:
        # Also called by run() before the loop starts, when the rollouts of this outer loop may not exist yet.
        outer, data = self.outer_index, self.trainer.datamodule
        if self.epoch_index >= self.settings.epochs:
            return
        wanted = -1 if outer is None else outer
        if self._data_of != wanted:
            if outer is None:
                data.train_on_warmup()
            elif not self.rollout_loop.store(outer).complete:
                return
            else:
                kept = data.train_on_rollouts(outer, self.rollout_loop.store(outer).read())
                call_hook(self.trainer, "on_sft_start", outer, kept)
                self._count_empty(outer, kept)
            self._data_of, self._combined_loader = wanted, None
            if self._data_fetcher is not None:
                self._data_fetcher.teardown()
        super().setup_data()

    def _count_empty(self, outer: int, kept: int) -> None:
        self._empty = 0 if kept else self._empty + 1
        if self._empty >= MAX_EMPTY_LOOPS:
            raise RunStopped(
                f"{MAX_EMPTY_LOOPS} outer loops in a row kept no reply: the policy solves no training problem. Warm it up "
                f"for longer, or sample more replies or cooler; they are in {self.rollout_loop.store(outer).folder.parent}"
            )
        if not kept:
            rank_zero_warn(f"outer loop {outer} kept no reply: its SFT is skipped")

    def on_advance_start(self) -> None:
        outer = self.outer_index
        if outer is not None:
            if outer > self._prepared and outer == 0:
                self._save_start()
            if not self.rollout_loop.store(outer).complete:
                self.rollout_loop.run(outer)
            if outer > self._prepared:
                self._restart()
                self._prepared = outer
        super().on_advance_start()

    def _save_start(self) -> None:
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        if not self.trainer.fast_dev_run:
            self.trainer.save_checkpoint(folder / START, weights_only=True)

    def _restart(self) -> None:
        if self.settings.restart == "weights":
            path = Path(self.trainer.default_root_dir) / "checkpoints" / START
            checkpoint = self.trainer.strategy.load_checkpoint(path, weights_only=True)
            self.trainer.strategy.load_model_state_dict(checkpoint, strict=False)
        if self.settings.restart != "nothing":
            self.trainer.strategy.setup_optimizers(self.trainer)

    # ---- Lightning's private rules (lightning-notes.md 1.2, points 3 and 4)

    @property
    def done(self) -> bool:
        # An outer loop that keeps nothing has no batches; that must not end the run.
        saved: Any = getattr(self, "max_batches")  # noqa: B009  (a plain attribute of Lightning's, of no declared type)
        self.max_batches = saved or 1
        try:
            return super().done
        finally:
            self.max_batches = saved

    def reset(self) -> None:
        # A checkpoint written in on_train_batch_end of the last batch of an epoch: stock Lightning would start the
        # next epoch and skip the pending validation; we finish this epoch instead.
        progress = self.epoch_loop.batch_progress
        self._finish_epoch = (
            self.restarting and progress.is_last_batch and progress.total.completed == progress.total.processed - 1
        )
        if self._finish_epoch:
            progress.increment_completed()
        super().reset()

    def advance(self) -> None:
        if self._finish_epoch:
            self._finish_epoch = False
            loop, trainer = self.epoch_loop, self.trainer
            loop.restarting = False
            if trainer.enable_validation and self.epoch_ends_phase:
                trainer.validating = True
                loop.val_loop.run()
                trainer.training = True
            loop._batches_that_stepped += 1
            return
        if self.max_batches:
            super().advance()

    def on_save_checkpoint(self) -> dict[str, Any]:
        return super().on_save_checkpoint() | {"prepared": self._prepared, "empty": self._empty}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self._prepared, self._empty = state_dict.get("prepared", -1), state_dict.get("empty", 0)
