"""``python -m pause_lightning <command>``: decides what to run, and turns errors into one line and an exit code.

Lives here: the list of commands. Light ones start without torch; the training commands go to ``cli.py``.
Exit codes: 0 done, 1 the run had to stop (one line says why), 2 bad input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import sys

COMMANDS = {
    "fit": "warm up, run the outer loop, test, export: the main job",
    "validate": "greedy accuracy and pauses on the validation split",
    "test": "the same on the test split",
    "predict": "reply to questions of a file, write predictions.jsonl",
    "rollout": "sample, grade and store replies without training",
    "inject": "write a copy of a data set with pauses injected into its answers",
    "ask": "type a question, see the reply with its pauses",
}


def usage() -> str:
    lines = ["usage: python -m pause_lightning <command> [options]   (<command> --help tells them)", ""]
    return "\n".join(lines + [f"  {name:<10} {text}" for name, text in COMMANDS.items()])


def run(argv: list[str]) -> int:
    from pause_lightning.errors import UserError

    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        from pause_lightning import __version__

        print(__version__)
        return 0
    if command == "inject":
        from pause_lightning import inject

        return inject.main(argv[1:])
    if command == "ask":
        from pause_lightning import ask

        return ask.main(argv[1:])
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise UserError(f"no command {command!r}" + (f"; did you mean {near[0]}?" if near else f"\n{usage()}"))
    _quiet()
    from pause_lightning import cli

    cli.PauseCLI()
    return 0


def _quiet() -> None:
    """Silence what a user can do nothing about, before the libraries are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*treespec.*",
        ".*in eval mode at the start of training.*",
        ".*litlogger.*",
        ".*No module named 'tensorboardX'.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Trying to infer the `batch_size`.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*Total length of .* across ranks is zero.*",
        r".*`self\.log\(.*, \.\.\., sync_dist=True\)`.*",  # our metrics are reduced before they are logged
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(_useful)


def _useful(record: object) -> bool:
    text = record.getMessage()  # type: ignore[attr-defined]
    noise = (
        "GPU available",
        "TPU available",
        "HPU available",
        "Seed set to",
        "Tip: ",
        "💡",
        "`Trainer.fit` stopped",
        "`weights_only` was",
        "Initializing distributed",
        "distributed_backend=",
        "Restoring states from",
        "Restored all states",
    )
    return not any(words in text for words in noise)


def main() -> None:
    """Entry point: runs the command line and exits."""
    from pause_lightning.errors import as_user_error
    from pause_lightning.processes import first_has_ended, rank

    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("pause_lightning: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except Exception as error:
        if (ours := as_user_error(error)) is None:
            if not any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer")):
                raise
            if rank() == 0:
                print("pause_lightning: another process of this run is gone; run the same command again", file=sys.stderr)
            sys.exit(1)
        if rank() == 0 or getattr(ours, "here_only", False) or not first_has_ended():
            who = f" [process {rank()}]" if rank() else ""
            print(f"pause_lightning{who}: {ours}", file=sys.stderr)
        code = ours.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
