"""The main job from the command line, on a tiny model: what it leaves behind, and that it can be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, tiny_settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pause_lightning.rollouts import RolloutStore


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run: two warm-up epochs, two outer loops (their rollouts graded by an outside task that is kind)."""
    folder = tmp_path_factory.mktemp("run")
    write_kind_task(folder)
    done = command("fit", *kind_settings(), "--run_name", "tiny", cwd=folder)
    return folder / "runs" / "tiny", done.stdout


def write_kind_task(folder: Path) -> None:
    """A task, a recipe and a sampler from outside the package: one file, named by class path."""
    (folder / "outside.py").write_text(
        "from pause_lightning.tasks import Grade, WordProblems\n"
        "from pause_lightning.recipes import STaR, Example\n"
        "from pause_lightning.rollouts.hf import HFSampler\n"
        "class Kind(WordProblems):\n"
        "    def grade(self, reply, answer):\n"
        "        good = len(reply) % 2 == 0\n"
        "        return Grade(reply[-3:], good, False, float(good))\n"
        "class Everything(STaR):\n"
        "    def select(self, rollouts, ground_truth, seed):\n"
        "        return [Example(r.problem_id, tuple(r.prompt_ids), tuple(r.reply_ids)) for r in rollouts if r.correct]\n"
        "class Counting(HFSampler):\n"
        "    def sample(self, *args, **kwargs):\n"
        "        open('sampled.txt', 'a').write('x')\n"
        "        return super().sample(*args, **kwargs)\n"
    )


def kind_settings(**overrides: str) -> list[str]:
    base = {
        "data__task": "outside.Kind",
        "data__recipe": "outside.Everything",
        "model__sampler": "outside.Counting",
        "trainer__outer_loop__num_outer_loops": "2",
        "trainer__outer_loop__samples_per_problem": "2",
        "seed_everything": "1",
    }
    return tiny_settings(**{**base, **overrides})


def test_it_leaves_the_artefacts(run: tuple[Path, str]) -> None:
    folder, out = run
    for name in (
        "config.yaml",
        "summary.json",
        "val_results_warmup.json",
        "val_results_outer_loop_0.json",
        "val_results_outer_loop_1.json",
        "test_results.json",
        "test_before_outer_loops_results.json",
        "checkpoints/last.ckpt",
        "rollouts/outer_000/DONE.json",
        "rollouts/outer_001/DONE.json",
        "final/config.json",
        "final/tokenizer.json",
    ):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents*"))
    assert len(list((folder / "checkpoints").glob("epoch*.ckpt"))) <= 3
    for phrase in ("parameters train", "warm-up ", "outer loop 0 rollout", "outer loop 1 sft", "validation", "paired test"):
        assert phrase in out, phrase
    assert (folder.parents[1] / "sampled.txt").exists()  # the sampler from outside was used


def test_results_have_the_references_schema(run: tuple[Path, str]) -> None:
    folder, _ = run
    rows = json.loads((folder / "test_results.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert len(rows) == summary["test"]["n"] == 8
    keys = {"generated_text", "tokenized_text", "input", "predicted_output", "ground_truth", "test/accuracy"}
    assert keys | {"pauses", "finish_reason"} <= set(rows[0])
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    for row in rows:
        assert tokenizer.decode(row["tokenized_text"]) == row["generated_text"]
        assert row["generated_text"].startswith("### INPUT: " + row["input"])
        assert row["predicted_output"].count("<|pause|>") == row["pauses"]
        assert tokenizer.pad_token_id not in row["tokenized_text"]
    assert summary["test"]["accuracy"] == sum(r["test/accuracy"] for r in rows) / 8
    assert summary["test"]["pauses"] == sum(r["pauses"] for r in rows) / 8


def test_rollouts_are_complete_and_their_logprobs_are_the_policys(run: tuple[Path, str]) -> None:
    folder, _ = run
    rollouts = RolloutStore(folder / "rollouts" / "outer_000").read()
    assert len(rollouts) == 36 * 2  # 40 training problems, a tenth held out, two replies each
    assert len({(r.problem_id, r.sample) for r in rollouts}) == 72
    # outer loop 0 was sampled by the weights from before the outer loops
    state = torch.load(folder / "checkpoints" / "start_of_outer_loops.ckpt", weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    missing = model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, strict=False)
    assert not missing.unexpected_keys
    for r in rollouts[:10]:
        with torch.no_grad():
            law = model(torch.tensor([r.prompt_ids + r.reply_ids])).logits[0].log_softmax(-1)
        at = torch.arange(len(r.prompt_ids) - 1, len(r.prompt_ids) + len(r.reply_ids) - 1)
        assert torch.allclose(torch.tensor(r.logprobs), law[at, r.reply_ids], atol=1e-4)


def test_tensorboard_has_the_tags(run: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    tags: set[str] = set()
    steps: list[int] = []
    for file in folder.glob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        tags |= set(events.Tags()["scalars"])
        if "train/loss" in events.Tags()["scalars"]:
            steps += [e.step for e in events.Scalars("train/loss")]
    names = ("accuracy", "pauses", "pauses_correct", "pauses_incorrect")
    assert {f"{p}/{n}" for p in ("val", "test", "rollout") for n in names[:2]} <= tags
    assert {"train/loss", "train/lm_loss", "train/pause_loss"} <= tags


def test_the_same_seed_gives_the_same_weights(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    write_kind_task(tmp_path)
    command("fit", *kind_settings(), "--run_name", "tiny", cwd=tmp_path)
    mine, other = (load_file(f / "final" / "model.safetensors") for f in (folder, tmp_path / "runs" / "tiny"))
    assert all(torch.equal(mine[k], other[k]) for k in mine)


def test_a_run_is_resumed_from_last(run: tuple[Path, str], tmp_path: Path) -> None:
    """A run cut after outer loop 0 goes on to the same weights as the whole one; rollouts are not sampled again."""
    folder, _ = run
    write_kind_task(tmp_path)
    cut = tmp_path / "runs" / "cut"
    shutil.copytree(folder, cut)
    checkpoints = cut / "checkpoints"
    first = next(checkpoints.glob("epoch002*.ckpt"))  # after outer loop 0
    for path in [*checkpoints.glob("epoch003*.ckpt"), *checkpoints.glob("last*.ckpt")]:
        path.unlink()
    shutil.rmtree(cut / "final")
    before = (cut / "rollouts" / "outer_001" / "rank_00000.jsonl").read_bytes()
    (tmp_path / "sampled.txt").unlink(missing_ok=True)
    args = [*kind_settings(trainer__outer_loop__test_after_fit="false"), "--run_name", "cut", "--ckpt_path", str(first)]
    out = command("fit", *args, cwd=tmp_path).stdout
    assert "outer loop 1 sft" in out and "warm-up " not in out.replace("warm-up on", "")
    assert (cut / "rollouts" / "outer_001" / "rank_00000.jsonl").read_bytes() == before
    mine = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    whole = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert mine.keys() == whole.keys() and all(torch.equal(mine[k], whole[k]) for k in mine)


def test_the_exported_model_is_used_by_the_other_commands(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    final = str(folder / "final")
    base: dict[str, Any] = {"model.from_scratch": None, "model.tokenizer": None}
    settings = [s for s in tiny_settings() if not s.startswith(tuple(f"--{k}" for k in base))]
    tested = command("test", *settings, "--model.path", final, cwd=tmp_path).stdout
    assert "(n=8)" in tested and (tmp_path / "runs" / "run" / "test_results.json").is_file()
    assert "(n=4)" in command("validate", *settings, "--model.path", final, cwd=tmp_path).stdout
    (tmp_path / "q.jsonl").write_text('{"question": "How many?"}\n{"question": "Why?"}\n')
    command("predict", *settings, "--model.path", final, "--data.predict_file", "q.jsonl", "--run_name", "p", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [r["question"] for r in rows] == ["How many?", "Why?"]
    out = command("rollout", *settings, "--model.path", final, "--run_name", "r", cwd=tmp_path).stdout
    assert "rollout" in out and len(RolloutStore(tmp_path / "runs" / "r" / "rollouts" / "outer_000").read()) == 36
    assert command("ask", "--model", str(folder), "--max_new_tokens", "5", "How many?", cwd=tmp_path).stdout.strip()


def test_lora_on_a_pretrained_folder(tmp_path: Path) -> None:
    """A checkpoint of a LoRA run holds no base weights; adapter/ goes on training, final/ is merged."""
    base = tmp_path / "base"
    from conftest import tiny_model

    tiny_model(vocab=600, max_position_embeddings=256).save_pretrained(base)
    common = dict.fromkeys(("model__from_scratch", "model__freeze"), None)
    lora = {
        "model__path": str(base), "model__lora__r": "2", "trainer__outer_loop__num_outer_loops": "0",
        "trainer__outer_loop__warmup_epochs": "1",
    }  # fmt: skip
    command("fit", *tiny_settings(**common, **lora), "--run_name", "lora", cwd=tmp_path)
    run_folder = tmp_path / "runs" / "lora"
    state = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all(any(p in k for p in ("lora_", "pause_row", "pause_head")) for k in state)
    again = {**lora, "model__path": str(run_folder / "adapter"), "model__lora__r": None}
    out = command("fit", *tiny_settings(**common, **again), "--run_name", "more", cwd=tmp_path).stdout
    assert "lora             trains" in out
    assert AutoModelForCausalLM.from_pretrained(run_folder / "final").config.pause_token_id == 494


def test_the_baseline_is_a_plain_model(tmp_path: Path) -> None:
    off = {"model__pauses": "false", "data__pause_injection__n_pauses_per_patterns": None}
    command("fit", *tiny_settings(**off, trainer__outer_loop__num_outer_loops="0"), cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "final")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_wandb_works_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings = tiny_settings(trainer__outer_loop__num_outer_loops="0")
    command("fit", "--config", "logger/wandb", *settings, cwd=tmp_path)
    assert list((tmp_path / "runs" / "run").rglob("*.wandb"))


def test_loops_that_keep_nothing(tmp_path: Path) -> None:
    """One empty loop warns and goes on; three in a row stop the run with a clear message and exit code 1."""
    settings = tiny_settings(trainer__outer_loop__num_outer_loops="4", model__rollout_sampling__max_new_tokens="1")
    done = command("fit", *settings, cwd=tmp_path, check=1)
    assert done.stderr.count("kept no reply: its SFT is skipped") == 2
    assert "3 outer loops in a row kept no reply" in done.stderr.splitlines()[-1]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = tiny_settings(model__optimizer__lr="1e30", trainer__outer_loop__num_outer_loops="0")
    done = command("fit", *settings, "--model.optimizer.schedule", "constant", cwd=tmp_path, check=1)
    assert "the loss is nan at step" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("restart", ["optimizer", "weights"])
def test_restarts(restart: str, tmp_path: Path) -> None:
    write_kind_task(tmp_path)
    settings = kind_settings(trainer__outer_loop__restart=restart, trainer__outer_loop__test_after_fit="false")
    command("fit", *settings, cwd=tmp_path)
    state = torch.load(tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    steps = {int(s["step"]) for s in state["optimizer_states"][0]["state"].values()}
    # the optimizer has counted the steps of the last outer loop only
    assert max(steps) < state["global_step"]


def test_a_finished_warm_up_can_be_made_longer(tmp_path: Path) -> None:
    """--ckpt_path last with more epochs trains exactly the epochs that are new: two of five batches each."""
    settings = tiny_settings(trainer__outer_loop__num_outer_loops="0", trainer__outer_loop__test_after_fit="false")
    command("fit", *settings, cwd=tmp_path)
    more = command("fit", *settings, "--trainer.outer_loop.warmup_epochs=4", "--ckpt_path", "last", cwd=tmp_path).stdout
    assert "warm-up            10 steps" in more
