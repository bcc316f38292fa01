"""Checkpoints: how they are written and checked, when, and which one a run goes on from.

Lives here: ``CheckpointFile`` (Lightning's plugin for the file itself), ``RunCheckpoints`` (when), ``BestCheckpoints``,
``newest_usable`` (which). A checkpoint holds what trains, the optimizer and the position (``loops.py``); it is loaded
with ``weights_only=True``. In ``<run>/checkpoints/``:

    last.ckpt          the newest: at the end of every epoch, before and after validation, every n steps, when stopped
    last_epoch.ckpt    the newest end of an epoch: where a run can go on with another number of processes
    epoch003-….ckpt    the best by validation accuracy
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from pause_lightning.errors import Interrupted, UserError
from pause_lightning.files import atomic
from pause_lightning.processes import any_of

LAST, EPOCH = "last.ckpt", "last_epoch.ckpt"
BEST = "epoch[0-9]*-step[0-9]*.ckpt"
MIDDLE = "the middle of an epoch"


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; reads it only if every byte is as it was written, and without pickle."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises: RunStopped if the disk is full or not writable."""
        with atomic(Path(path), "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch reports a full disk as its own
                raise OSError(28, f"writing failed ({str(error).splitlines()[0]})") from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Raises: UserError if there is no such file, or it is damaged, or not a checkpoint of ours."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, key: str = "the checkpoint") -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises: UserError, naming ``key``."""
    if not path.is_file():
        raise UserError(f"{key}: no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums it has written
            damaged = archive.testzip()
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
                return checkpoint
    except Exception as error:
        raise UserError(f"{key}: {path} is damaged, or no checkpoint of ours ({type(error).__name__})") from None
    raise UserError(f"{key}: {path} is damaged" if damaged else f"{key}: {path} is no checkpoint of ours")


def newest_usable(folder: Path, processes: int) -> tuple[Path | None, list[str]]:
    """(the checkpoint in ``folder`` to go on from with so many processes, what to tell about those passed over).

    That is last.ckpt; if it cannot be used, last_epoch.ckpt or one of the best, the furthest first.

    Raises:
        UserError: there are checkpoints, and none of them can be used.
    """
    notes: list[str] = []
    found: list[tuple[tuple[int, int], Path]] = []
    paths = [p for p in (folder / LAST, folder / EPOCH, *folder.glob(BEST)) if p.is_file()]
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            state, at = checkpoint["loops"]["fit_loop"], position_of(checkpoint)
            complete = at is not None and bool(checkpoint.get("optimizer_states"))
        except (UserError, KeyError, TypeError) as error:
            notes.append(f"passed over: {error}")
            continue
        if at is None or not complete:
            notes.append(f"passed over: {path} is not of a run that can go on")
        elif at["batches"] and not at["ends_epoch"] and state["processes"] != processes:
            notes.append(
                f"{path.name} is of {MIDDLE} with {state['processes']} processes, which {processes} cannot go on from: "
                "its epoch begins again"
            )
        elif path.name == LAST:
            return path, notes
        else:
            found.append(((at["epoch"], at["batches"]), path))
    if not found and any(n.startswith("passed") for n in notes):
        why = notes[0].removeprefix("passed over: ")
        raise UserError(f"{folder} has no usable checkpoint ({why}); --fresh starts anew")
    return (max(found)[1] if found else None), notes


def position_of(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The position (``loops.Position`` as a dictionary) a checkpoint is of, or None."""
    return checkpoint.get("loops", {}).get("fit_loop", {}).get("position")


def go_back_to(path: Path) -> None:
    """Make ``path``, an older checkpoint of its run, the one the run goes on from; later ones are renamed to ``*.old``."""
    folder, here = path.parent, position_of(read_checkpoint(path))
    for other in [folder / EPOCH, *folder.glob(BEST)]:
        if here is None or other == path or not other.is_file():
            continue
        there = position_of(torch.load(other, map_location="cpu", weights_only=True))
        if there is None or (there["epoch"], there["batches"]) > (here["epoch"], here["batches"]):
            other.rename(other.with_name(other.name + ".old"))
    make_last(path)


def make_last(path: Path) -> None:
    """Where a run goes on from is its last checkpoint, also if it is an older one, or one of the best."""
    if path.name != LAST:
        link(path, path.with_name(LAST))


class RunCheckpoints(Checkpoint):
    """Keeps last.ckpt and last_epoch.ckpt, and stops a run that was told to stop when all is saved.

    Args:
        every_n_steps: also save last.ckpt after so many optimiser steps; null: at the ends of epochs only
        every_n_minutes: also save last.ckpt when the last save is so long ago; null: do not look at the time
    """

    def __init__(self, every_n_steps: int | None = None, every_n_minutes: float | None = 15.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"checkpoint.{name} must be above 0, got {value}")
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self._saved_at = time.monotonic()

    def on_resumable(self, trainer: Any, pl_module: Any, position: Any) -> None:
        """A batch is done: save if it is time, and stop if some process was told to."""
        step, now = trainer.global_step, time.monotonic()
        minutes = self.every_n_minutes
        late = minutes is not None and now - self._saved_at > 60 * minutes
        stop, late = any_of(trainer, trainer.stop.received is not None, late)
        # Only an epoch that ends a phase is told apart by ``ends_epoch``; the end of any other is batch 0 of the next.
        at_end = position.ends_epoch or position.batches == 0
        if stop or late or at_end or (self.every_n_steps and step % self.every_n_steps == 0):
            self._save(trainer, also_as=EPOCH if at_end else None)
        if stop:
            raise Interrupted(trainer.stop.received or signal.SIGTERM)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer, also_as=EPOCH)

    def _save(self, trainer: Any, also_as: str | None) -> None:
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:  # what was logged before this checkpoint is not logged again after a resume
            logger.save()
            flush = getattr(getattr(logger, "experiment", None), "flush", None)
            if flush is not None:
                flush()
        folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.save_checkpoint(folder / LAST)
        self._saved_at = time.monotonic()
        if also_as and trainer.is_global_zero:
            link(folder / LAST, folder / also_as)


class BestCheckpoints(ModelCheckpoint):
    """The best checkpoints by validation accuracy. Unlike its base, it survives a moved run folder.

    Args:
        folder: where
        keep: how many
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        super().__init__(
            dirpath=folder,
            filename="epoch{epoch:03d}-step{step:06d}",
            auto_insert_metric_name=False,
            monitor="val/accuracy",
            mode="max",
            save_top_k=keep,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        return "BestCheckpoints"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        best = here(state_dict["best_model_path"])
        begun = any(Path(str(self.dirpath)).glob("*.ckpt"))
        if best and not begun:  # a new run from a checkpoint of another
            return
        if best and not Path(best).is_file():
            raise UserError(
                f"the best checkpoint of this run so far is gone: {best}; restore it, or start over with --fresh"
            )
        # A kill may have come between deleting one that was no longer among the best and saving last.ckpt.
        models = {path: score for path, score in models.items() if Path(path).is_file()}
        worst = min(models, key=models.get, default="")  # type: ignore[arg-type]
        full = len(models) == self.save_top_k
        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_k_models": models,
                "best_model_path": best,
                "kth_best_model_path": worst if full else "",
                "kth_value": models[worst] if full else torch.tensor(float("-inf")),
            }
        )


def best_of(folder: Path) -> Path:
    """The best checkpoint of a run by its newest one. Raises: UserError if there is none."""
    newest, _ = newest_usable(folder, 1)
    state = {} if newest is None else read_checkpoint(newest).get("callbacks", {}).get("BestCheckpoints", {})
    best = folder / Path(state.get("best_model_path", "")).name
    if not best.is_file():
        raise UserError(f"--ckpt_path best: {folder} has no best checkpoint yet")
    return best


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, atomically; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def describe(position: Any) -> str:
    """A position for the person at the terminal."""
    at = position if isinstance(position, dict) else asdict(position)
    where = "before its validation" if at["ends_epoch"] else f"after {at['batches']} batches of it" if at["batches"] else ""
    return f"epoch {at['epoch']} {where}".strip()
