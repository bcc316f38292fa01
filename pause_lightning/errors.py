"""The errors a person at the keyboard is meant to read: one line, what is wrong, where, what to do.

Lives here: the two exception classes and nothing else. They are turned into one line on stderr and an exit code in
``__main__.py``; everything else that is raised is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: a setting, a file, a checkpoint. Ends the program with exit code 2."""

    exit_code = 2


class RunStopped(Exception):
    """A run that cannot go on (loss is NaN, nothing is kept, disk full). What is finished is on disk. Exit code 1."""

    exit_code = 1
