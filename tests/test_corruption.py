"""One damage of every file of a run and its inputs: a clear line or the same result. All: tests/corruption.py."""

from __future__ import annotations

import subprocess
import sys

from tests.forks import ROOT


def test_one_damage_of_every_file() -> None:
    quick = [sys.executable, "-m", "tests.corruption", "--quick"]
    done = subprocess.run(quick, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split("|")[3].strip(" *")) >= 20
