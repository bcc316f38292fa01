"""Being told to stop: signals become a request that the loops look at where a run can be resumed from.

Lives here: ``StopSignals``, which takes the place of Lightning's signal connector. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1
(the notice a cluster sends before the time is up) ask to stop; a second SIGINT stops at once. Requeueing a job is the
job script's business (scripts/slurm): it sees exit code 143.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from pause_lightning.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Handlers that note the first signal; ``check`` raises where it is safe to stop."""

    # Lightning's own loops look at this; they would stop at points of their own choosing, process by process.
    received_sigterm = False

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.received: int | None = None
        self.keep = False  # the command line keeps the handlers between fit, test and export
        self._before: dict[int, Any] = {}

    def register_signal_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}

    def teardown(self) -> None:
        if self.keep:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: Any) -> None:
        children = getattr(self.trainer.strategy.launcher, "procs", None) or []
        if signum == signal.SIGINT and self.received is not None:
            for child in children:
                child.kill()
            os.write(2, b"\npause_lightning: stopped at once\n")
            os._exit(130)
        if self.received is None:
            self.received = signum
            for child in children:  # a terminal sends Ctrl-C to them itself
                if signum != signal.SIGINT and child.poll() is None:
                    child.send_signal(signum)
            if self.trainer.global_rank == 0:
                how = "stopping at the next point to resume from (Ctrl-C again: at once)"
                os.write(2, f"\npause_lightning: {signal.Signals(signum).name}: {how}\n".encode())

    def check(self, *_: Any) -> None:
        """Raises: Interrupted, if this process was told to stop. For phases whose progress is on the disk already."""
        if self.received is not None:
            raise Interrupted(self.received)
