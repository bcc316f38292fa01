"""Runs that are killed, stopped, moved or started over go on exactly, or say why not. The full sweep: tests/faults.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, refused
from safetensors.torch import load_file

from tests import faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the settings of the sweep."""
    return fit(tmp_path_factory.mktemp("whole"))


def fit(cwd: Path, *more: str, check: int = 0, processes: int = 1, **changed: Any) -> Path:
    cwd.mkdir(exist_ok=True)
    (cwd / "outside.py").write_text(faults.OUTSIDE)
    command("fit", *faults.options(**changed), *more, cwd=cwd, check=check, processes=processes)
    return cwd / "runs" / "run"


def cut(whole: Path, cwd: Path, *, epoch: int) -> Path:
    """A copy of the finished run without the checkpoints of what came after this epoch."""
    (cwd / "outside.py").write_text(faults.OUTSIDE)
    run = cwd / "runs" / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").glob("*.ckpt"):
        if torch.load(path, weights_only=True)["loops"]["fit_loop"]["position"]["epoch"] > epoch:
            path.unlink()
    return run


def test_a_part_of_the_sweep() -> None:
    """Kills at steps, rollouts, checkpoints, validation and export, with 1 and 2 processes: no resume differs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--quick"], cwd=faults.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    totals = [line for line in done.stdout.splitlines() if "**all**" in line]
    assert len(totals) == 4 and all(int(line.split("|")[3].strip(" *")) > 1 for line in totals)


def test_a_moved_run_goes_on_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    moved = cut(whole, tmp_path, epoch=4)
    out = command("fit", *faults.options(), cwd=tmp_path).stdout
    assert "going on from" in out and "outer loop 1 sft" in out and "outer loop 0 sft" not in out
    assert faults.differences(faults.outcome(whole), faults.outcome(moved)) == []


def test_other_settings_are_refused_and_fresh_starts_beside(whole: Path, tmp_path: Path) -> None:
    cut(whole, tmp_path, epoch=4)
    changed = faults.options(model__optimizer__lr=0.02)
    assert "unfinished run with other settings (model.optimizer.lr: 0.01 there, 0.02 now)" in refused(
        "fit", *changed, cwd=tmp_path
    )
    command("fit", *changed, "--fresh", cwd=tmp_path)
    assert (tmp_path / "runs" / "run-2" / "summary.json").is_file()
    out = command("fit", *changed, "--ckpt_path", "last", cwd=tmp_path).stdout
    assert "going on from" in out and (tmp_path / "runs" / "run" / "summary.json").is_file()


def test_other_inputs_are_refused(whole: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, epoch=4)
    inputs = json.loads((run / "inputs.json").read_text())
    (run / "inputs.json").write_text(json.dumps(inputs | {"data": "other"}))
    assert "begun with other inputs: the data set changed since" in refused("fit", *faults.options(), cwd=tmp_path)


def test_a_damaged_last_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, epoch=4)
    content = bytearray((whole / "checkpoints" / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 255
    (run / "checkpoints" / "last.ckpt").write_bytes(content)
    done = command("fit", *faults.options(), cwd=tmp_path)
    assert "passed over" in done.stderr and "last.ckpt is damaged" in done.stderr
    assert faults.differences(faults.outcome(whole), faults.outcome(run)) == []


def test_rollouts_that_cannot_be_sampled_again_are_missed(whole: Path, tmp_path: Path) -> None:
    """In the middle of an outer loop's SFT the policy has moved on: missing rollouts are an error, never left out."""
    done = kill(tmp_path, 15)
    shard = next((done / "rollouts" / "outer_000").glob("*.jsonl"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    assert "units of rollouts are missing or damaged" in refused("fit", *faults.options(), cwd=tmp_path)


def kill(cwd: Path, step: int) -> Path:
    """A run whose process was killed before this optimiser step."""
    script = (
        "from pathlib import Path; from tests import faults; faults.warm()\n"
        f"at = faults.Kill('before an optimiser step', {step})\n"
        f"print(faults.run(['fit', *faults.options()], Path({str(cwd)!r}), at).code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=faults.ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == str(-signal.SIGKILL), done.stderr
    return cwd / "runs" / "run"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)], ids=["TERM", "USR1", "INT"]
)
def test_signals_stop_a_run_where_it_can_go_on(signum: int, code: int, whole: Path, tmp_path: Path) -> None:
    done, run = interrupted(tmp_path, [signum])
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(
        f"pause_lightning: stopped by {signal.Signals(signum).name}; all is saved"
    )
    command("fit", *faults.options(), cwd=tmp_path)
    assert faults.differences(faults.outcome(whole), faults.outcome(run)) == []


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    done, _ = interrupted(tmp_path, [signal.SIGINT, signal.SIGINT])
    assert done.returncode == 130 and "stopped at once" in done.stderr


def interrupted(cwd: Path, signals: list[int]) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run for real, and send the signals when the first checkpoint is there."""
    slow = faults.OUTSIDE + (  # so that there is time to be interrupted
        "import time\nfrom pause_lightning.module import PauseLitModule\n_step = PauseLitModule.training_step\n"
        "def slow(self, *args):\n    time.sleep(0.2)\n    return _step(self, *args)\nPauseLitModule.training_step = slow\n"
    )
    (cwd / "outside.py").write_text(slow)
    run = cwd / "runs" / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "pause_lightning", "fit", *faults.options()],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (run / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.05)
    for signum in signals:
        os.kill(process.pid, signum)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    (cwd / "outside.py").write_text(faults.OUTSIDE)
    return subprocess.CompletedProcess([], process.returncode, out, err), run


def test_two_at_once_do_not_share_a_folder(whole: Path, tmp_path: Path) -> None:
    from pause_lightning.files import locked

    run = cut(whole, tmp_path, epoch=4)
    with locked(run) as free:
        assert free
        assert "is being written by another process" in refused(
            "fit", *faults.options(), "--ckpt_path", "last", cwd=tmp_path
        )
        command("fit", *faults.options(), cwd=tmp_path)
    assert (tmp_path / "runs" / "run-2" / "summary.json").is_file() and not (run / "summary.json").exists()


def test_old_loops_are_deleted_when_asked(tmp_path: Path) -> None:
    run = fit(tmp_path, trainer__outer_loop__keep_loops=1, trainer__outer_loop__num_outer_loops=4)
    assert [p.name for p in sorted((run / "rollouts").iterdir())] == ["outer_003"]
    assert [p.name for p in sorted(run.glob("val_results_outer_loop_*"))] == ["val_results_outer_loop_3.json"]


def test_checkpoints_hold_no_pickle(whole: Path) -> None:
    for path in (whole / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)
    assert not list(whole.rglob("*.bin")) and not list(whole.rglob("*.pkl"))


def test_a_full_disk_is_one_line_and_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """A real one: a file system of 1 MB that fills up while checkpoints are written."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        (tmp_path / "outside.py").write_text(faults.OUTSIDE)
        done = command("fit", *faults.options(), "--runs_dir", str(small), cwd=tmp_path, check=1)
        assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=30m", str(small)], check=True)
        command("fit", *faults.options(), "--runs_dir", str(small), cwd=tmp_path)
        assert faults.differences(faults.outcome(whole), faults.outcome(small / "run")) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- what is easily got wrong beside killing


def test_without_validation_the_newest_weights_are_exported(tmp_path: Path) -> None:
    run = fit(tmp_path, trainer__limit_val_batches=0)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    final = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(final[name], last[f"model.{name}"]) for name in final)


def test_going_back_on_purpose_is_not_undone_by_the_next_resume(whole: Path, tmp_path: Path) -> None:
    """Kill, go back to an older checkpoint with other settings, kill, go on: never on the branch that was left."""
    run = cut(whole, tmp_path, epoch=6)
    first = next((run / "checkpoints").glob("epoch001*.ckpt"))
    for outer in ("outer_000", "outer_001"):
        shutil.rmtree(run / "rollouts" / outer)
    slower = faults.options(model__optimizer__lr=0.002)
    back = [*slower, "--ckpt_path", str(first.relative_to(tmp_path)), "--trainer.max_steps=13"]
    command("fit", *back, cwd=tmp_path)
    (run / "summary.json").unlink()
    out = command("fit", *slower, "--ckpt_path", "last", cwd=tmp_path).stdout
    assert "last.ckpt: epoch 3\n" in out and list((run / "checkpoints").glob("*.ckpt.old"))


def test_rollouts_of_other_units_are_refused(whole: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, epoch=4)
    shard = run / "rollouts" / "outer_001" / "rank_00000.jsonl"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    other = faults.options(data__problems_per_unit=16)
    assert "other settings (problems" in refused("fit", *other, "--ckpt_path", "last", cwd=tmp_path)


def test_looking_at_a_run_that_was_cut_off_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, epoch=4)
    before = {path: path.read_bytes() for path in (run / "config.yaml", run / "inputs.json")}
    settings = [s for s in faults.options() if not s.startswith("--checkpoint")]
    command("test", *settings, "--checkpoint.every_n_steps=2", "--ckpt_path", "last", cwd=tmp_path)
    command("rollout", *settings, "--checkpoint.every_n_steps=2", cwd=tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "runs" / "run-2" / "rollouts" / "outer_000" / "DONE.json").is_file()
    command("fit", *faults.options(), cwd=tmp_path)
    assert faults.differences(faults.outcome(whole)["final"], faults.outcome(run)["final"]) == []


def test_a_stop_that_was_decided_holds_after_a_kill(tmp_path: Path) -> None:
    """Early stopping and max_steps: killed in the test that follows, the run does not train on."""
    (tmp_path / "stopper.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Stop(pl.Callback):\n"
        "    def on_validation_end(self, trainer, module):\n"
        "        trainer.should_stop = trainer.fit_loop.outer_index == 0\n"
    )
    run = fit(tmp_path, trainer__callbacks="stopper.Stop")
    expected = faults.outcome(run)
    (run / "summary.json").unlink()
    out = command("fit", *faults.options(trainer__callbacks="stopper.Stop"), cwd=tmp_path).stdout
    assert "outer loop 1" not in out and faults.differences(expected, faults.outcome(run)) == []


def test_the_last_validation_of_max_steps_is_not_lost(tmp_path: Path) -> None:
    expected = faults.outcome(fit(tmp_path / "whole", trainer__max_steps=7))
    killed = tmp_path / "killed"
    script = (
        "from pathlib import Path; from tests import faults; faults.warm()\n"
        "at = faults.Kill('after a step\\'s checkpoint', 7)\n"
        f"folder = Path({str(killed)!r}); folder.mkdir()\n"
        "print(faults.run(['fit', *faults.options(trainer__max_steps=7)], folder, at).code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=faults.ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "-9", done.stderr
    command("fit", *faults.options(trainer__max_steps=7), cwd=killed)
    assert faults.differences(expected, faults.outcome(killed / "runs" / "run")) == []


def test_a_new_run_may_begin_at_a_checkpoint_of_another(whole: Path, tmp_path: Path) -> None:
    first = next((whole / "checkpoints").glob("epoch001*.ckpt"))
    run = fit(tmp_path, "--ckpt_path", str(first))
    assert faults.differences(faults.outcome(whole)["last"], faults.outcome(run)["last"]) == []
