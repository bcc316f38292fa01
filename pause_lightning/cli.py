"""The training commands: ``fit``, ``validate``, ``test``, ``predict``, ``rollout``, as one LightningCLI.

Lives here: ``PauseCLI``: run folders, defaults, links, configs by name, and errors in one line with the nearest option
named. Light commands (``inject``, ``ask``) are dispatched in ``__main__.py`` before this is imported. transformers and
peft are not imported here: they are when a model is made.
"""

from __future__ import annotations

import difflib
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import pause_lightning.tasks  # noqa: F401  (its classes can be named in data.task)
from pause_lightning.callbacks import OuterLoopProgressBar, PhaseReport, ResultsWriter, Retention
from pause_lightning.checkpoints import (
    BestCheckpoints,
    RunCheckpoints,
    describe,
    go_back_to,
    make_last,
    position_of,
    read_checkpoint,
)
from pause_lightning.datamodule import GSM8KDataModule
from pause_lightning.errors import UserError, as_user_error
from pause_lightning.files import locked
from pause_lightning.module import PauseLitModule, say
from pause_lightning.processes import expected, first_decides, rank
from pause_lightning.runs import FINISHED, RunInputs, SettingsFile, choose_run
from pause_lightning.trainer import OuterLoopTrainer

CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def find_config(name: str) -> str:
    """A path as it is; a bare name (``quickstart``, ``logger/wandb``) as one of the configs this package brings along.

    Raises:
        UserError: neither a file nor a known name, or no text.
    """
    if name.lstrip().startswith("{"):
        return name
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config: {name} cannot be read ({error})") from None
        return name
    for folder in CONFIG_FOLDERS:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return str(candidate)
    known = sorted(str(p.relative_to(f).with_suffix("")) for f in CONFIG_FOLDERS if f.is_dir() for p in f.rglob("*.yaml"))
    raise UserError(f"--config: no file {name}; configs known by name: {', '.join(dict.fromkeys(known))}")


class PauseArgumentParser(LightningArgumentParser):
    """Errors in one line; a misspelt option is answered with the nearest one."""

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(given):
            if word in ("-c", "--config") and i + 1 < len(given):
                given[i + 1] = find_config(given[i + 1])
            elif word.startswith("--config="):
                given[i] = "--config=" + find_config(word.removeprefix("--config="))
        return super().parse_args(given, *rest, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A shortened option would be taken silently: --trainer.outer_loop.warmup for warmup_epochs.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise as_user_error(ex) or UserError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        wrong = re.search(
            r"nrecognized arguments: -*([\w.\-]+)|[Kk]ey \"?'?([\w.\-]+)'?\"? is not expected|"
            r"[Gg]roup '([\w.]+)' does not accept nested key '([\w.]+)'|"
            r"[Nn]ested key '([\w.]+)'|No action for (?:destination )?key \"?'?([\w.]+)",
            text,
        )
        if wrong:
            parts = [g for g in wrong.groups() if g]
            near = self._nearest(".".join(parts))
            if near:
                text = text.split(" Did you mean")[0].rstrip(".") + f"; did you mean --{near}?"
        return text

    def _nearest(self, key: str) -> str | None:
        keys: set[str] = set()
        subparsers = getattr(self, "_subcommands_action", None)
        for parser in [self, *(subparsers._name_parser_map.values() if subparsers else [])]:
            keys |= {o.removeprefix("--") for a in parser._actions for o in a.option_strings if o.startswith("--")}
        key = re.sub(r"^(fit|validate|test|predict|rollout)\.", "", key)
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        return close[0] if close else None


class PauseCLI(LightningCLI):
    """LightningCLI with run folders: everything a run writes is in ``<runs_dir>/<run_name>/``."""

    _command: str | None = None

    def __init__(self, args: list[str] | None = None) -> None:
        PauseCLI._command = next(iter(sys.argv[1:] if args is None else args), None)
        super().__init__(
            PauseLitModule,
            GSM8KDataModule,
            trainer_class=OuterLoopTrainer,
            parser_class=PauseArgumentParser,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SettingsFile,
            parser_kwargs={"prog": "python -m pause_lightning", "description": __doc__.splitlines()[0]},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = {**LightningCLI.subcommands(), "rollout": {"model", "datamodule"}}
        # The options of a command take a tenth of a second to collect: those of the command given are enough.
        only = PauseCLI._command
        return {only: commands[only]} if only is not None and only in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_name", type=str, default="run", help="name of the run's folder")
        parser.add_argument("--runs_dir", type=str, default="runs", help="where run folders are made")
        parser.add_argument(
            "--fresh", action="store_true", help="begin a new run even if the folder holds one that was cut off"
        )
        parser.add_class_arguments(RunCheckpoints, "checkpoint")
        parser.set_defaults(
            {
                "data.task": {"class_path": "pause_lightning.tasks.GSM8K"},
                "data.recipe": {"class_path": "pause_lightning.recipes.STaR"},
                "model.sampler": {"class_path": "pause_lightning.rollouts.continuous.ContinuousSampler"},
            }
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "trainer.outer_loop.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Settings come from the configuration, never from a checkpoint."""

    # ---- the run folder

    def before_instantiate_classes(self) -> None:
        config, command = self.config[self.subcommand], str(self.subcommand)
        wanted = Path(config.runs_dir) / config.run_name
        t = config.trainer
        processes = expected(str(t.accelerator), t.devices, t.num_nodes)

        def decide() -> dict[str, Any]:
            settings = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            ckpt_path = config.get("ckpt_path")
            choice = choose_run(command, wanted, ckpt_path, config.fresh, settings, processes)
            for note in choice["notes"]:
                print(f"pause_lightning: {note}", file=sys.stderr)
            return choice

        choice = first_decides(decide)
        self.run = Path(choice["folder"])
        if command in FINISHED and rank() == 0:
            self._lock = locked(self.run)  # held until the process ends
            if not self._lock.__enter__():
                raise UserError(f"{self.run} is being written by another process")
            chosen = choice["ckpt_path"]
            if command == "fit" and chosen is not None and Path(chosen).parent == self.run / "checkpoints":
                make_last(Path(chosen)) if config.get("ckpt_path") in (None, "last") else go_back_to(Path(chosen))
        if choice["ckpt_path"] is not None or config.get("ckpt_path") is not None:
            config.ckpt_path = choice["ckpt_path"]
        self.resumed = (self.run / "inputs.json").is_file()
        config.trainer.default_root_dir = str(self.run)
        logger = config.trainer.logger
        if logger is None or logger is True:
            config.trainer.logger = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(self.run), "name": "", "version": ""},
            }
        else:
            for one in logger if isinstance(logger, list) else [logger]:
                args = getattr(one, "init_args", None) or {}
                if "save_dir" in args and (args["save_dir"] in (None, ".")):
                    args["save_dir"] = str(self.run)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer")["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        callbacks: list[Any] = [PhaseReport(), ResultsWriter(), RunInputs(str(self.subcommand), self.resumed)]
        if not any(isinstance(c, ProgressBar) for c in given) and (
            self._get(self.config_init, "trainer")["enable_progress_bar"] is not False
        ):
            callbacks.append(OuterLoopProgressBar())
        if self.subcommand == "fit":
            # In this order: last.ckpt is to hold what all others have noted. (Lightning moves checkpoints to the end.)
            callbacks += [Retention(), BestCheckpoints(self.run / "checkpoints"), self._get(self.config_init, "checkpoint")]
        self.trainer_defaults = {"callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)

    # ---- around the stages

    def before_fit(self) -> None:
        self.started = time.monotonic()
        self.trainer.stop.keep = True
        say(f"run folder: {self.run}")
        path = self.config_init[self.subcommand].get("ckpt_path")
        if path is not None:
            at = position_of(read_checkpoint(Path(path)))
            say(f"going on from {path}" + (f": {describe(at)}" if at else ""))

    def after_fit(self) -> None:
        from pause_lightning.finish import finish_fit

        if not self.trainer.fast_dev_run:
            finish_fit(self.trainer, self.model, self.datamodule, self.started)
