"""200 outer loops of a tiny model: memory, time per loop and files stay flat. ``python -m tests.soak [--loops 200]``.

Lives here: the run and the three lines it prints, which docs/reliability.md quotes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import faults

PROBE = '''
import json, os, time
import lightning.pytorch as pl

class Probe(pl.Callback):
    """Resident memory, time and files at the end of every outer loop."""
    def on_validation_end(self, trainer, pl_module):
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        files = [p for _, _, names in os.walk(trainer.default_root_dir) for p in names]
        with open("probe.jsonl", "a") as file:
            file.write(json.dumps([time.monotonic(), memory, len(files)]) + "\\n")
'''


def slope(values: list[float]) -> tuple[float, float]:
    """(least-squares slope per loop, its standard error)."""
    n = len(values)
    mean_x, mean_y = (n - 1) / 2, sum(values) / n
    spread = sum((i - mean_x) ** 2 for i in range(n))
    a = sum((i - mean_x) * (v - mean_y) for i, v in enumerate(values)) / spread
    rest = sum((v - mean_y - a * (i - mean_x)) ** 2 for i, v in enumerate(values))
    return a, (rest / (n - 2) / spread) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=200)
    loops = parser.parse_args().loops
    faults.warm()
    with tempfile.TemporaryDirectory() as work:
        cwd = Path(work)
        (cwd / "probe.py").write_text(PROBE)
        settings = faults.options(
            trainer__outer_loop__num_outer_loops=loops, trainer__outer_loop__sft_epochs=1,
            trainer__outer_loop__keep_loops=2, trainer__callbacks="probe.Probe", checkpoint__every_n_steps=None,
        )  # fmt: skip
        done = faults.forked(["fit", *settings], _with_outside(cwd), after=3600)
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (cwd / "probe.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 10 :]  # the first tenth fills caches
    seconds = [b[0] - a[0] for a, b in pairwise(rows)]
    memory, files = [r[1] for r in rows], [r[2] for r in rows]
    for name, values, unit in (("memory", memory, "MiB"), ("time per loop", seconds, "s")):
        a, error = slope(values)
        middle = sorted(values)[len(values) // 2]
        print(f"{name}: median {middle:.3f} {unit}, slope {a:+.2g} +- {2 * error:.1g} {unit} per loop")
    print(f"files: {files[0]} after {len(rows) // 9} loops, {files[-1]} after {loops}")
    return 0


def _with_outside(cwd: Path) -> Path:
    (cwd / "outside.py").write_text(faults.OUTSIDE)
    return cwd


if __name__ == "__main__":
    sys.exit(main())
