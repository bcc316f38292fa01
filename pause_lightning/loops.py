"""When things happen: warm-up epochs, then rollouts and SFT epochs in turn. Knows no model, no task, no pause.

Lives here: ``OuterLoopLoop`` (Lightning's fit loop with a schedule); its settings are ``schedule.py``'s, the rollouts of
one outer loop ``rollout_loop.py``'s.

One Lightning epoch is one SFT epoch; the schedule is flat (lightning-notes.md 1.2): epoch e < warmup_epochs is
warm-up, then ``sft_epochs`` epochs belong to each outer loop, whose rollouts are sampled in ``on_advance_start`` of its
first epoch, as far as they are not on the disk.

Where a run can be resumed is three numbers, its *position*: the epoch, the batches of it that are done (all of them:
its validation is still to come), and the batches in all. A checkpoint holds the position instead of Lightning's
progress counters, and loading one sets the counters as they are in an uninterrupted run; Lightning's own restart
states are never entered. The loop protocol is Lightning's private one, hence ``lightning<2.7``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pause_lightning.errors import RunStopped, UserError
from pause_lightning.rollout_loop import RolloutLoop, call_hook
from pause_lightning.schedule import OuterLoop
from pause_lightning.stopping import StopSignals

MAX_EMPTY_LOOPS = 3
START = "start_of_outer_loops.ckpt"


@dataclass(frozen=True)
class Position:
    """Where a run is. ``epoch``: SFT epochs done; ``batches``: done in the next one; ``total``: batches done in all.

    ``ends_epoch``: all batches of the epoch (or of the run, under max_steps) are done, the validation is still to come.
    """

    epoch: int
    batches: int
    total: int
    ends_epoch: bool


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's batch loop, which validates where a phase ends, and says where a run can be resumed."""

    def reset(self) -> None:
        super().reset()
        done = self.trainer.fit_loop.resumed_batches
        current = self.batch_progress.current
        current.ready = current.started = current.processed = current.completed = done
        self.trainer.fit_loop.resumed_batches = 0

    def on_advance_end(self, data_fetcher: Any) -> None:
        # The batch is trained on and logged. Inside an accumulation window nothing could be resumed.
        if not self._should_accumulate():
            call_hook(self.trainer, "on_resumable", self.trainer.fit_loop.position)
        super().on_advance_end(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning's agreement on stopping, once per batch; ours is in ``on_resumable``."""

    def _should_check_val_epoch(self) -> bool:
        return bool(self.trainer.enable_validation)

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        if not self.trainer.enable_validation:
            return False
        if _is_max_limit_reached(self.global_step, self.max_steps):
            return True
        return self.batch_progress.is_last_batch and self.trainer.fit_loop.epoch_ends_phase


class OuterLoopLoop(_FitLoop):
    """The fit loop of ``OuterLoopTrainer``; ``install`` puts it into any Lightning Trainer."""

    def __init__(self, trainer: Any, settings: OuterLoop, min_epochs: int | None = 0, max_epochs: int | None = None):
        super().__init__(trainer, min_epochs=min_epochs, max_epochs=max_epochs)
        self.settings = settings
        self.rollout_loop = RolloutLoop(trainer, settings)
        self.resumed_batches = 0  # of the next epoch, trained on before this process started
        self._data_of: int | None = None  # outer loop whose data is loaded; -1: the warm-up's
        self._rollouts_of: int | None = None  # outer loop whose rollouts are known to be complete
        self._empty = 0  # outer loops in a row that kept nothing
        self._only_validate, self._validate_at = False, 0

    @classmethod
    def install(cls, trainer: Any, settings: OuterLoop) -> OuterLoopLoop:
        old = trainer.fit_loop
        new = cls(trainer, settings, old.min_epochs, old.max_epochs)
        new.epoch_loop = _EpochLoop(trainer, old.min_steps, old.max_steps)
        new._data_source = old._data_source
        trainer.fit_loop, trainer.outer_loop = new, settings
        trainer.stop = trainer._signal_connector = StopSignals(trainer)
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

    @property
    def starts_outer_loop(self) -> bool:
        """Whether the next batch is the first one of an outer loop."""
        after = self.epoch_index - self.settings.warmup_epochs
        return after >= 0 and after % self.settings.sft_epochs == 0 and not self.resumed_batches and not self._only_validate

    @property
    def position(self) -> Position:
        """Where a checkpoint written now is to be resumed."""
        epochs, batches = self.epoch_progress.current, self.epoch_loop.batch_progress
        total = batches.total.processed
        if epochs.started <= epochs.processed:
            return Position(epochs.processed, 0, total, False)
        done, at_end = batches.current.processed, batches.is_last_batch and batches.current.processed > 0
        evaluated = self.epoch_loop.val_loop.batch_progress
        validated = (
            self.trainer.validating and evaluated.is_last_batch and evaluated.current.completed == evaluated.current.ready
        )
        ends_run = _is_max_limit_reached(self.epoch_loop.global_step, self.max_steps) and not validated
        if at_end and (validated or not (self.epoch_ends_phase or ends_run) or not self.trainer.enable_validation):
            return Position(epochs.processed + 1, 0, total, False)
        return Position(epochs.processed, done, total, at_end or (ends_run and self.trainer.enable_validation))

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

    def state_dict(self, destination: dict | None = None, prefix: str = "") -> dict:
        state = {
            "position": asdict(self.position),
            "steps": self.epoch_loop.global_step,
            "empty": self._empty,
            "processes": self.trainer.world_size,
            "policy": self.rollout_loop.policy,
            "stopped": self.trainer.should_stop,
        }
        return state if destination is None else destination | state

    def load_state_dict(self, state_dict: dict, prefix: str = "") -> None:
        at, steps = Position(**state_dict["position"]), state_dict["steps"]
        loop = self.epoch_loop
        for progress in (self.epoch_progress.current, self.epoch_progress.total):
            progress.ready = progress.started = progress.processed = progress.completed = at.epoch
        total = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = at.total
        stepped = loop.automatic_optimization.optim_progress.optimizer.step.total
        stepped.ready = stepped.completed = steps
        # Lightning counts a step after the validation that follows it.
        loop._batches_that_stepped = steps - at.ends_epoch
        self._empty, self.rollout_loop.policy = state_dict["empty"], state_dict["policy"]
        self.trainer.should_stop = state_dict["stopped"]
        if at.batches and not at.ends_epoch and state_dict["processes"] != self.trainer.world_size:
            raise UserError(
                f"the checkpoint is of the middle of an epoch with {state_dict['processes']} processes, which "
                f"{self.trainer.world_size} cannot go on from: go on from last_epoch.ckpt"
            )
        self.resumed_batches = 0 if at.ends_epoch else at.batches
        self._only_validate, self._validate_at = at.ends_epoch, at.batches

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
            elif self._rollouts_of != outer:
                return
            else:
                kept = data.train_on_rollouts(outer, self.rollout_loop.read(outer))
                call_hook(self.trainer, "on_sft_start", outer, kept)
                if self.starts_outer_loop:
                    self._count_empty(outer, kept)
            self._data_of, self._combined_loader = wanted, None
            if self._data_fetcher is not None:
                self._data_fetcher.teardown()
        super().setup_data()
        if self.resumed_batches and self._combined_loader is not None:
            for loader in self._combined_loader.flattened:
                loader.skip(self.resumed_batches)

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
        if outer is not None and self.starts_outer_loop:
            if outer == 0:
                self._save_start()
            self.rollout_loop.run(outer)
            self._rollouts_of = outer
            self.setup_data()  # says what is kept before anything starts anew
            self._restart()
        elif outer is not None:
            self._rollouts_of = outer
        if outer is not None:
            self.start_checkpoint(needed=True)
        super().on_advance_start()

    def start_checkpoint(self, needed: bool = False) -> Path:
        """The weights from before the outer loops. Raises: UserError if they are needed and gone."""
        path = Path(self.trainer.default_root_dir) / "checkpoints" / START
        wanted = self.settings.test_after_fit or self.settings.restart == "weights"
        if needed and wanted and not self.trainer.fast_dev_run and not path.is_file():
            raise UserError(f"{path} is gone, which this run still needs; restore it, or start over with --fresh")
        return path

    def _save_start(self) -> None:
        if not self.trainer.fast_dev_run:
            self.trainer.save_checkpoint(self.start_checkpoint(), weights_only=True)

    def _restart(self) -> None:
        if self.settings.restart == "weights":
            self.trainer.lightning_module.load_trained(self.start_checkpoint(needed=True))
        if self.settings.restart != "nothing":
            self.trainer.strategy.setup_optimizers(self.trainer)

    # ---- Lightning's private rules (lightning-notes.md 1.2, points 3 and 4)

    @property
    def done(self) -> bool:
        if self._only_validate:
            return False
        # An outer loop that keeps nothing has no batches; that must not end the run.
        saved: Any = getattr(self, "max_batches")  # noqa: B009  (a plain attribute of Lightning's, of no declared type)
        self.max_batches = saved or 1
        try:
            return super().done
        finally:
            self.max_batches = saved

    def advance(self) -> None:
        if self._only_validate:  # the checkpoint is of the end of an epoch, before its validation
            self._only_validate = False
            loop, trainer = self.epoch_loop, self.trainer
            current = loop.batch_progress.current
            current.ready = current.started = current.processed = current.completed = self._validate_at
            loop.batch_progress.is_last_batch = self._validate_at >= self.max_batches
            if trainer.enable_validation:
                trainer.validating = True
                loop.val_loop.run()
                trainer.training = True
            loop._batches_that_stepped += 1
            return
        if self.max_batches:
            super().advance()
