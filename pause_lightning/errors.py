"""The errors a person at the keyboard is meant to read: one line, what is wrong, where, what to do.

Lives here: the three exception classes and nothing else. They are turned into one line on stderr and an exit code in
``__main__.py``; everything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import re
import signal


class UserError(Exception):
    """Bad input: a setting, a file, a checkpoint. Ends the program with exit code 2."""

    exit_code = 2


class RunStopped(Exception):
    """A run that cannot go on (loss is NaN, nothing is kept, disk full). What is finished is on disk. Exit code 1.

    ``here_only``: only this process may have met it, so it speaks for itself even if it is not the first one.
    """

    exit_code = 1

    def __init__(self, message: str, here_only: bool = False) -> None:
        super().__init__(message)
        self.here_only = here_only


class Interrupted(RunStopped):
    """A run that was told to stop and did, at a point it resumes from. Exit code 130 (Ctrl-C) or 143 (all else)."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; all is saved: run the same command again and it goes on from here")
        self.exit_code = 130 if signum == signal.SIGINT else 143


def as_user_error(error: BaseException | None) -> UserError | RunStopped | None:
    """The error of ours that ``error`` is or wraps: jsonargparse reports what a constructor raises as its own."""
    seen = error
    while seen is not None:
        if isinstance(seen, (UserError, RunStopped)):
            return seen
        seen = seen.__cause__ or seen.__context__
    own = re.search(r"- (data\.[\w.]+ must (?:be|not) [^\n]*|data\.task: [^\n]*)", str(error))
    return UserError(own.group(1)) if own else None
