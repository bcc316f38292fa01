"""A fork server for commands of the package: a run costs a second, as nothing is imported again.

Lives here: ``warm`` and ``run`` (in the process that has warmed up), and ``ForkServer`` (for tests: such a process beside
them, as forking one that has trained already is not safe). ``python -m tests.forks`` is that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended: ``code`` is negative for a signal."""

    code: int
    out: str
    err: str


def warm() -> None:
    """Import once what every run imports."""
    import peft  # noqa: F401
    import tensorboard.summary  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import pause_lightning.cli
    import pause_lightning.finish  # noqa: F401
    from pause_lightning.__main__ import _quiet

    _quiet()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def run(
    args: list[str],
    cwd: Path,
    processes: int = 1,
    prepare: Callable[[], None] | None = None,
    after: float | None = None,
) -> Done:
    """``python -m pause_lightning <args>`` in ``cwd``, in forked processes that think torchrun started them.

    ``prepare`` is called in the first of them. ``after``: seconds after which the process group is killed.
    """
    for name in (".out", ".err"):
        (cwd / name).write_text("")
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _child(args, cwd, prepare, rank, processes, port)
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    started, codes, killed = time.monotonic(), {}, False
    while len(codes) < processes:
        for rank, child in enumerate(children):
            if rank not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if not killed and ((after is not None and passed > after) or passed > 240):
            killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(children[0], signal.SIGKILL)
        time.sleep(0.005)
    return Done(codes[0], (cwd / ".out").read_text(), (cwd / ".err").read_text())


def _child(args: list[str], cwd: Path, prepare: Callable[[], None] | None, rank: int, processes: int, port: int) -> None:
    code = 1
    try:
        if rank == 0:
            os.setpgid(0, 0)
        os.chdir(cwd)
        sys.path.insert(0, str(cwd))
        for number, name in ((1, ".out"), (2, ".err")):
            file = os.open(name, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if processes > 1:
            os.environ |= {
                "TORCHELASTIC_RUN_ID": "faults", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        if prepare is not None and rank == 0:
            prepare()
        from pause_lightning.__main__ import main

        sys.argv = ["pause_lightning", *args]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ForkServer:
    """``run`` in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, args: list[str], cwd: Path, processes: int = 1, after: float | None = None) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([list(args), str(cwd), processes, after]) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    warm()
    for line in sys.stdin:
        args, cwd, processes, after = json.loads(line)
        print(json.dumps(asdict(run(args, Path(cwd), processes, None, after))), flush=True)
