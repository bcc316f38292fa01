"""The folder of a run: which one a command writes into, whether it goes on from there, and what it must find unchanged.

Lives here: ``choose_run`` (fresh, resumed or refused), ``SettingsFile`` (config.yaml), ``RunInputs`` (inputs.json: data,
tokenizer and base weights of the run). Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from pause_lightning.checkpoints import best_of, newest_usable, read_checkpoint
from pause_lightning.errors import UserError
from pause_lightning.files import atomic, locked, sha256, write_json

FINISHED = {"fit": "summary.json", "rollout": "rollouts/outer_000/DONE.json"}
# Settings that say where and how a run is computed and shown, not what: a resumed run may change them.
FREE = (
    "run_name", "runs_dir", "ckpt_path", "fresh", "config", "weights_only", "checkpoint", "return_predictions",
    "trainer.default_root_dir", "trainer.logger", "trainer.callbacks", "trainer.enable_progress_bar",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps",
    "trainer.outer_loop.keep_loops", "trainer.outer_loop.test_after_fit",
)  # fmt: skip


def choose_run(command: str, wanted: Path, ckpt_path: str | None, fresh: bool, settings: Any, processes: int) -> dict:
    """Decide in the first process: {"folder", "ckpt_path", "notes"}.

    A run that was cut off goes on in its folder, from its newest usable checkpoint, if its settings are the same.
    Otherwise ``wanted`` or, if that holds another run, ``wanted-2``, ``wanted-3``, ... is used.

    Raises:
        UserError: the checkpoint asked for does not exist or is damaged; the folder holds an unfinished run with other
            settings, or one that another process is writing.
    """
    path, notes = _checkpoint(wanted, ckpt_path, processes)
    if command == "rollout" or ckpt_path is None:
        if command not in FINISHED or fresh:
            return {"folder": str(fresh_folder(wanted)), "ckpt_path": path, "notes": notes}
    else:
        return {"folder": str(wanted), "ckpt_path": path, "notes": notes}
    for folder in _candidates(wanted):
        if not _holds_something(folder):
            return {"folder": str(folder), "ckpt_path": path, "notes": notes}
        saved = folder / "config.yaml"
        if not saved.is_file() or (folder / FINISHED[command]).is_file() or _command_of(folder) not in (None, command):
            continue
        with locked(folder) as free:
            if not free:
                continue
        begun = any((folder / "checkpoints").glob("*.ckpt")) or any((folder / "rollouts").glob("*/*.jsonl"))
        if begun and (differs := _differences(saved, settings)):
            raise UserError(
                f"{folder} holds an unfinished run with other settings ({differs}): --fresh starts a new one beside it, "
                "--ckpt_path last goes on with the settings given now"
            )
        if command == "fit":
            path, notes = _checkpoint(folder, "last", processes)
        return {"folder": str(folder), "ckpt_path": path, "notes": notes}
    raise AssertionError("unreachable")


def _checkpoint(folder: Path, wanted: str | None, processes: int) -> tuple[str | None, list[str]]:
    """(path of the checkpoint that ``--ckpt_path`` means in this run, what to tell)."""
    if wanted is None:
        return None, []
    if wanted == "last":
        path, notes = newest_usable(folder / "checkpoints", processes)
        return None if path is None else str(path), notes
    if wanted == "best":
        return str(best_of(folder / "checkpoints")), []
    read_checkpoint(Path(wanted), "--ckpt_path")
    return wanted, []


def _command_of(folder: Path) -> str | None:
    """The command a run folder was made by; None if it does not say."""
    try:
        return json.loads((folder / "inputs.json").read_text()).get("command")
    except (ValueError, OSError, AttributeError):
        return None


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    number = 2
    while True:
        yield folder.with_name(f"{folder.name}-{number}")
        number += 1


def fresh_folder(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ``folder-3``, ... : a run never writes into the folder of another."""
    return next(f for f in _candidates(folder) if not _holds_something(f))


def _holds_something(folder: Path) -> bool:
    """More than what a run leaves that dies before it begins: hidden files, a logger's empty ones."""
    return folder.exists() and any(
        not p.name.startswith((".", "events.out.", "wandb", "inputs.json")) for p in folder.iterdir()
    )


def _differences(saved: Path, settings: dict[str, Any]) -> str:
    try:
        before = dict(_leaves(yaml.safe_load(saved.read_text())))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, AttributeError):
        return f"{saved} is damaged"
    now = dict(_leaves(settings))
    differs = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not _free(k)]
    shown = [f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in differs[:2]]
    return "; ".join(shown) + (f"; and {len(differs) - 2} more" if len(differs) > 2 else "")


def _leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            yield f"{prefix}{key}", value


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


class SettingsFile(SaveConfigCallback):
    """Writes config.yaml, atomically, from the first process."""

    already_saved: bool

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero and not self.already_saved and _begins_run(trainer):
            with atomic(Path(trainer.default_root_dir) / "config.yaml") as file:
                file.write(self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


def _begins_run(trainer: Any) -> bool:
    """Whether this is what a run folder belongs to (fit, rollout), not a look at one."""
    return not trainer.fast_dev_run and (trainer.state.fn == "fit" or getattr(trainer, "rollout_only", False))


class RunInputs(Callback):
    """Holds a resumed run to the data, tokenizer and base weights it began with (inputs.json).

    Args:
        command: the command of the run
        resumed: whether the run goes on in a folder that has an inputs.json
    """

    def __init__(self, command: str, resumed: bool) -> None:
        self.command, self.resumed = command, resumed

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not trainer.is_global_zero or not _begins_run(trainer):
            return
        path = Path(trainer.default_root_dir) / "inputs.json"
        now: dict[str, Any] = {"data": trainer.datamodule.hash, "tokenizer": pl_module.tokenizer.sha256}
        now["base"] = weights_of(pl_module.path)
        before = None
        if self.resumed and path.is_file():
            try:
                before = json.loads(path.read_text())
                changed = [key for key in now if before[key] != now[key]]
            except (ValueError, KeyError, TypeError, OSError):
                raise UserError(f"{path} is damaged; delete it if data and model are those the run began with") from None
            if changed:
                names = {"data": "the data set", "tokenizer": "the tokenizer", "base": f"the weights in {pl_module.path}"}
                raise UserError(
                    f"{trainer.default_root_dir} was begun with other inputs: {' and '.join(names[c] for c in changed)} "
                    "changed since; restore what it began with, or start over with --fresh"
                )
        if before is None:
            write_json(path, {"command": self.command, **now})


def weights_of(path: str | None) -> dict[str, str]:
    """sha256 of each weights file in a model folder; empty for a hub name (the hub's cache is content-addressed)."""
    folder = Path(path or "").expanduser()
    if not path or not folder.is_dir():
        return {}
    files = [p for kind in ("*.safetensors", "*.bin") for p in folder.glob(kind)]
    own = {p.name: sha256(p) for p in sorted(files)}
    adapter = folder / "adapter_config.json"
    return own | (weights_of(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else {})
