"""Several processes: the same rollouts, metrics and exports on any number of them, under ddp and fsdp2 (CPU, gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, really, tiny_model
from safetensors.torch import load_file

from pause_lightning.rollouts import RolloutStore
from tests import faults
from tests.forks import free_port

DDP = {"trainer__devices": 2, "trainer__strategy": "ddp"}
FSDP2 = {"trainer__devices": 2, "trainer__strategy": "fsdp2"}
FULL = {"model__from_scratch": json.dumps(faults.LLAMA | {"attention_dropout": 0.0})}


def fit(cwd: Path, *more: str, processes: int = 2, **changed: Any) -> Path:
    cwd.mkdir(exist_ok=True, parents=True)
    (cwd / "outside.py").write_text(faults.OUTSIDE)
    command("fit", *faults.options(**changed), *more, cwd=cwd, processes=processes)
    return cwd / "runs" / "run"


def trained(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def optimizer(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two states with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained folder in bfloat16, untied, wide enough that its base outweighs a LoRA."""
    folder = tmp_path_factory.mktemp("base")
    wide = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256, "num_attention_heads": 4}
    tiny_model(vocab=600, tied=False, num_hidden_layers=4, **wide).bfloat16().save_pretrained(folder)
    return folder


def lora(base: Path) -> dict[str, Any]:
    return {
        "model__from_scratch": None, "model__path": base, "model__dtype": "bfloat16", "model__lora__r": 2,
        "model__lora__dropout": 0.0, "model__freeze": None, "trainer__outer_loop__warmup_epochs": 1,
    }  # fmt: skip


def test_the_same_rollouts_on_1_2_and_4_processes(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2, 4):
        cwd = tmp_path / str(processes)
        cwd.mkdir()
        (cwd / "outside.py").write_text(faults.OUTSIDE)
        settings = faults.options(
            checkpoint__every_n_steps=None, data__problems_per_unit=4, **{**DDP, "trainer__devices": processes}
        )
        command("rollout", *settings, "--trainer.outer_loop.samples_per_problem=2", cwd=cwd, processes=processes)
        folder = cwd / "runs" / "run" / "rollouts" / "outer_000"
        found.append(RolloutStore(folder).read())
        assert len(list(folder.glob("rank_*.jsonl"))) == processes or processes == 4
        assert json.loads((folder / "DONE.json").read_text())["n"] == 72  # counted once
    assert len(found[0]) == 72 and found[0] == found[1] == found[2]


def test_metrics_and_results_count_every_problem_once_in_order(tmp_path: Path) -> None:
    one = fit(tmp_path / "one", processes=1, trainer__outer_loop__num_outer_loops=0, data__eval_batch_size=3)
    final = {
        "model__path": one / "final",
        "model__from_scratch": None,
        "model__tokenizer": None,
        "data__eval_batch_size": 3,
    }
    results = []
    for processes in (1, 2):
        cwd = tmp_path / f"test{processes}"
        cwd.mkdir()
        (cwd / "outside.py").write_text(faults.OUTSIDE)
        settings = faults.options(checkpoint__every_n_steps=None, **final, **{**DDP, "trainer__devices": processes})
        out = command("test", *settings, cwd=cwd, processes=processes).stdout
        assert "(n=8)" in out
        results.append(json.loads((cwd / "runs" / "run" / "test_results.json").read_text()))
    assert len(results[0]) == 8 and results[0] == results[1]


def test_the_loss_is_the_mean_over_the_labels_of_all_processes(tmp_path: Path) -> None:
    """One step on all 36 answers: in one batch on one process, or in two batches of different lengths on two."""
    common = {
        **FULL, "trainer__outer_loop__num_outer_loops": 0, "trainer__outer_loop__warmup_epochs": 1,
        "trainer__outer_loop__test_after_fit": "false", "data__pause_injection__redraw": "false",
    }  # fmt: skip
    one = fit(tmp_path / "one", processes=1, data__batch_size=36, **common)
    two = fit(tmp_path / "two", data__batch_size=18, **DDP, **common)
    assert faults.logged(one)["train/loss", 0] == pytest.approx(faults.logged(two)["train/loss", 0], abs=1e-6)
    # Adam's first step is the sign of the gradient times lr: compare its first moment, the gradient itself
    states = [
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"] for r in (one, two)
    ]
    for i in states[0]:
        assert torch.allclose(states[0][i]["exp_avg"], states[1][i]["exp_avg"], atol=1e-7)


def test_ddp_and_fsdp2_train_the_same_weights(tmp_path: Path) -> None:
    loops = {"trainer__outer_loop__num_outer_loops": 3, **FULL}
    ddp, fsdp2 = fit(tmp_path / "ddp", **DDP, **loops), fit(tmp_path / "fsdp2", **FSDP2, **loops)
    assert apart(trained(ddp), trained(fsdp2)) <= 1e-6
    assert apart(load_file(ddp / "final" / "model.safetensors"), load_file(fsdp2 / "final" / "model.safetensors")) <= 1e-6
    names = [{p.name for p in (run / "final").iterdir()} for run in (ddp, fsdp2)]
    assert names[0] == names[1]
    a, b = optimizer(ddp), optimizer(fsdp2)
    assert a["param_groups"] == b["param_groups"]
    for i, entry in a["state"].items():
        assert all(torch.allclose(entry[k], b["state"][i][k], atol=1e-6) for k in entry)


@pytest.mark.parametrize("kind", ["lora", "untied", "checkpointing", "offload"])
def test_fsdp2_is_ddp(kind: str, base: Path, tmp_path: Path) -> None:
    """LoRA and pause modules on a frozen bfloat16 base, untied full fine-tuning, recomputed activations, CPU offload."""
    settings: dict[str, Any] = {
        "lora": lora(base),
        "untied": {
            "model__from_scratch": json.dumps({**json.loads(FULL["model__from_scratch"]), "tie_word_embeddings": False})
        },
        "checkpointing": {**FULL, "model__gradient_checkpointing": "true"},
        "offload": FULL,
    }[kind]
    strategy = json.dumps({"class_path": "pause_lightning.strategies.FSDP2Strategy", "init_args": {"cpu_offload": True}})
    sharded = {**FSDP2, "trainer__strategy": strategy} if kind == "offload" else FSDP2
    plain = FULL if kind == "checkpointing" else settings
    ddp, fsdp2 = fit(tmp_path / "ddp", **DDP, **plain), fit(tmp_path / "fsdp2", **sharded, **settings)
    assert apart(trained(ddp), trained(fsdp2)) <= 1e-6
    if kind == "lora":
        assert all(any(p in k for p in ("lora_", "pause_")) for k in trained(fsdp2))
        size = (fsdp2 / "checkpoints" / "last.ckpt").stat().st_size
        weights = sum(t.numel() * t.element_size() for t in trained(fsdp2).values())
        whole = (base / "model.safetensors").stat().st_size
        assert weights < 0.02 * whole and size < 0.1 * whole  # the file has the optimizer and the run's state as well
        adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (ddp, fsdp2)]
        assert apart(*adapters) <= 1e-6


def test_replies_can_be_sampled_while_the_weights_stay_sharded(tmp_path: Path) -> None:
    """All processes generate in step, with units, batches and reply lengths of their own."""
    strategy = {"class_path": "pause_lightning.strategies.FSDP2Strategy", "init_args": {"generate_sharded": True}}
    sampler = json.dumps({"class_path": "pause_lightning.rollouts.hf.HFSampler", "init_args": {"batch_size": 5}})
    once = fit(tmp_path / "once", **FSDP2, **FULL, model__sampler=sampler)
    step = fit(tmp_path / "step", **{**FSDP2, "trainer__strategy": json.dumps(strategy)}, **FULL, model__sampler=sampler)
    for outer in ("outer_000", "outer_001"):
        a, b = (RolloutStore(run / "rollouts" / outer).read() for run in (once, step))
        assert len(a) == 36 and [r.reply_ids for r in a] == [r.reply_ids for r in b]
    assert apart(trained(once), trained(step)) <= 1e-6


def test_each_process_of_fsdp2_holds_about_half(base: Path, tmp_path: Path) -> None:
    """Bytes of parameters and optimizer state per process, full fine-tuning."""
    held = []
    for name, strategy in (("ddp", DDP), ("fsdp2", FSDP2)):
        cwd = tmp_path / name
        cwd.mkdir()
        probe = (
            "import torch, pathlib, lightning.pytorch as pl\n"
            "class Held(pl.Callback):\n"
            "    def on_train_end(self, trainer, module):\n"
            "        local = lambda t: t.to_local() if hasattr(t, 'to_local') else t\n"
            "        size = lambda ts: sum(local(t).numel() * local(t).element_size() for t in ts)\n"
            "        states = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v)]\n"
            "        held = size(module.parameters()) + size(states)\n"
            "        pathlib.Path(f'held{trainer.global_rank}').write_text(str(held))\n"
        )
        (cwd / "probe.py").write_text(probe)
        everything = json.dumps({"body": True, "lm_head": True, "lm_embeddings": True, "lora": False})
        full = {**lora(base), "model__lora__r": None, "model__lora__dropout": None, "model__freeze": everything}
        fit(cwd, **{**strategy, **full, "trainer__callbacks": "probe.Held", "trainer__outer_loop__num_outer_loops": 0})
        held.append([int((cwd / f"held{rank}").read_text()) for rank in (0, 1)])
    assert held[0][0] == held[0][1]
    for sharded in held[1]:
        assert 0.45 < sharded / held[0][0] < 0.55, held


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(faults.OUTSIDE)
    few = {"trainer__outer_loop__test_after_fit": "false", "checkpoint__every_n_steps": 1}
    killed = (
        "from pathlib import Path; from tests import faults; faults.warm()\n"
        f"settings, at = faults.options(**{ {**DDP, **few}!r}), faults.Kill('before an optimiser step', 5)\n"
        f"print(faults.run(['fit', *settings], Path({str(tmp_path)!r}), at, 2).code)"
    )
    done = subprocess.run([sys.executable, "-c", killed], cwd=faults.ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "-9", done.stderr
    one = command("fit", *faults.options(**few, trainer__devices=1), cwd=tmp_path)
    assert "last.ckpt is of the middle of an epoch with 2 processes, which 1 cannot go on from" in one.stderr
    assert "going on from runs/run/checkpoints/last_epoch.ckpt: epoch 1" in one.stdout
    # and the other way round, under another strategy, at the end of a phase
    last = tmp_path / "runs" / "run"
    (last / "summary.json").unlink()
    longer = faults.options(**few, **FSDP2, trainer__outer_loop__num_outer_loops=3)
    two = command("fit", *longer, "--ckpt_path", "last", cwd=tmp_path, processes=2)
    assert "outer loop 2 sft" in two.stdout and "outer loop 1" not in two.stdout


def test_free_processes_take_over_the_units_of_slow_ones(tmp_path: Path) -> None:
    """Units that take 10 to 400 ms: at the end nobody waits longer than 5% of the phase (plus one short unit)."""
    (tmp_path / "slow.py").write_text(
        "import json, pathlib, time\n"
        "from pause_lightning.rollouts.sampler import Reply, Sampler\n"
        "class Slow(Sampler):\n"
        "    def sample(self, model, prompts, settings, seed, *, eos_id, pad_id, on_progress=None):\n"
        "        import torch.distributed as dist\n"
        "        time.sleep(0.4 if seed % 7 == 0 else 0.01 + (seed % 90) / 1000)\n"
        "        with open(f'worked{dist.get_rank()}', 'a') as file:\n"
        "            file.write(f'{time.time()}\\n')\n"
        "        return [Reply([eos_id], [0.0], 'eos') for _ in prompts]\n"
    )
    (tmp_path / "outside.py").write_text(faults.OUTSIDE)
    settings = faults.options(
        **DDP, checkpoint__every_n_steps=None, model__sampler="slow.Slow", data__task__init_args__num_train=400,
        data__problems_per_unit=2,
    )  # fmt: skip
    command("rollout", *settings, cwd=tmp_path, processes=2)
    times = [[float(t) for t in (tmp_path / f"worked{rank}").read_text().split()] for rank in (0, 1)]
    assert len(times[0]) + len(times[1]) == 180
    phase = max(t[-1] for t in times) - min(t[0] for t in times)
    assert abs(times[0][-1] - times[1][-1]) < 0.05 * phase + 0.1, (phase, times[0][-1] - times[1][-1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lightning", "torchrun", "slurm"])
def test_every_way_to_start_processes(how: str, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(faults.OUTSIDE)
    command = [sys.executable, "-m", "pause_lightning", "fit"]
    settings = faults.options(**DDP, trainer__outer_loop__num_outer_loops=1)
    environments = [os.environ | {"OMP_NUM_THREADS": "1"}]
    if how == "torchrun":
        command[2:3] = [
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
            "-m",
            "pause_lightning",
        ]
    if how == "slurm":  # what srun sets; there is no SLURM here
        node = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        node |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1"}
        tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
        environments = [environments[0] | node | task for task in tasks]
    started = [
        subprocess.Popen(
            [*command, *settings], cwd=tmp_path, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for e in environments
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), ended
    assert "".join(out for out, _ in ended).count("outer loop 0 sft") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]
    assert len(RolloutStore(tmp_path / "runs" / "run" / "rollouts" / "outer_000").read()) == 36


def test_a_user_error_of_two_processes_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(faults.OUTSIDE)
    nothing = faults.options(
        **DDP, model__freeze=json.dumps(dict.fromkeys(("pause_embedding", "pause_head", "lora"), False))
    )
    done = really("fit", *nothing, cwd=tmp_path, check=2)
    assert [line for line in done.stderr.splitlines() if line] == [
        done.stderr.strip()
    ] and "nothing to train" in done.stderr
