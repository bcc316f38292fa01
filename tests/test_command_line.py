"""The command line: layering, clear refusals (one line, exit code 2), and light commands that start at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, command, really, refused, tiny_settings

GOOD = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"})


def data_folder(folder: Path, train: str = GOOD, test: str = GOOD.replace("1 + 1", "2 + 0")) -> list[str]:
    (folder / "train.jsonl").write_text(train)
    (folder / "test.jsonl").write_text(test)
    kept = [s for s in tiny_settings() if not s.startswith("--data.task")]
    return [*kept, f"--data.task.path={folder}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.freeze.puse_head", "false"], "did you mean --model.freeze.pause_head?"),
        (["--trainer.outer_loop.warmup_epoch", "1"], "did you mean --trainer.outer_loop.warmup_epochs?"),
        (["--config", "quikstart"], "configs known by name: "),
        (["--model.path", "./nowhere"], "no folder ./nowhere"),
        (["--model.head", "gates"], "gates"),
        (["--trainer.outer_loop.sft_epochs", "0"], "sft_epochs must be at least 1"),
        (["--model.rollout_sampling.top_p", "7"], "model.rollout_sampling.top_p must be in (0, 1]"),
        (["--data.task.num_train", "0"], "num_train must be at least 1"),
        (["--model.init_from", "no.ckpt"], "no checkpoint no.ckpt"),
        (["--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["--runs_dir", "/proc/runs"], "cannot write the run folder /proc/runs/run"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], words: str, tmp_path: Path) -> None:
    settings = [s for s in tiny_settings() if not (options[0] == "--model.path" and "from_scratch" in s)]
    assert words in refused("fit", *settings, *options, cwd=tmp_path)


def test_a_typo_in_a_config_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model:\n  freeze:\n    pause_haed: false\n")
    assert "pause_haed" in refused("fit", "--config", "c.yaml", cwd=tmp_path)


def test_what_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    off = dict.fromkeys(("pause_embedding", "pause_head", "lm_head", "lm_embeddings", "lora", "body"), False)
    assert "nothing to train" in refused("fit", *tiny_settings(model__freeze=json.dumps(off)), cwd=tmp_path)
    assert "one tied matrix" in refused("fit", *tiny_settings(model__freeze='{"lm_head": true}'), cwd=tmp_path)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (GOOD + "\n{", "train.jsonl:2: malformed JSON line"),
        ('{"question": "q", "answer": "no answer"}', "train.jsonl:1: the answer has no final answer"),
        (GOOD.replace("1 + 1", "<|pause|>"), "train.jsonl:1: the pause token"),
        ("", "train.jsonl holds no record"),
        (
            json.dumps({"question": "long " * 400, "answer": "#### 2"}) + "\n" + GOOD.replace("?", "!" * 900),
            "longer than",
        ),
    ],
)
def test_bad_data_is_one_line(train: str, words: str, tmp_path: Path) -> None:
    assert words in refused("fit", *data_folder(tmp_path, train), cwd=tmp_path)


def test_a_missing_data_folder_is_one_line(tmp_path: Path) -> None:
    settings = [s for s in tiny_settings() if not s.startswith("--data.task")]
    assert "no folder ./none" in refused("fit", *settings, "--data.task.path", "./none", cwd=tmp_path)


def test_long_prompts_are_skipped_with_a_count(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"{i}?", "answer": "#### 2"}) for i in range(20)]
    rows += [json.dumps({"question": f"{i} " + "long " * 400, "answer": "#### 2"}) for i in range(20)]
    done = command("fit", *data_folder(tmp_path, "\n".join(rows)), "--trainer.outer_loop.test_after_fit", "false",
                   "--trainer.outer_loop.num_outer_loops", "0", cwd=tmp_path)  # fmt: skip
    assert "warm-up answers skipped" in done.stderr and "val prompts skipped" in done.stderr


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.other": torch.zeros(1)}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "x.ckpt")
    assert "of another model" in refused("fit", *tiny_settings(), "--model.init_from", "x.ckpt", cwd=tmp_path)
    (tmp_path / "y.ckpt").write_text("no checkpoint")
    assert "y.ckpt is damaged, or no checkpoint" in refused(
        "fit", *tiny_settings(), "--model.init_from", "y.ckpt", cwd=tmp_path
    )
    assert "y.ckpt" in refused("fit", *tiny_settings(), "--ckpt_path", "y.ckpt", cwd=tmp_path)


def test_later_settings_win_leaf_by_leaf(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model:\n  lora: {r: 8, alpha: 5}\n  freeze: {pause_head: true}\n")
    (tmp_path / "b.yaml").write_text("model:\n  freeze: {pause_head: false}\n")
    args = ["fit", "--config", "a.yaml", "--config", "b.yaml", "--model.lora.r", "4", "--print_config"]
    printed = yaml.safe_load(command(*args, cwd=tmp_path).stdout)["model"]
    assert (printed["lora"]["r"], printed["lora"]["alpha"], printed["freeze"]["pause_head"]) == (4, 5, False)
    assert printed["freeze"]["pause_embedding"] is True


def test_a_run_never_writes_into_the_folder_of_another(tmp_path: Path) -> None:
    settings = tiny_settings(trainer__outer_loop__num_outer_loops="0", trainer__outer_loop__test_after_fit="false")
    for _ in range(2):
        command("fit", *settings, "--run_name", "twice", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["twice", "twice-2"]


@pytest.mark.parametrize("args", [["--help"], ["inject", "--help"], ["ask", "--help"], ["--version"]])
def test_light_commands_start_at_once(args: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    really(*args, cwd=tmp_path)
    assert time.monotonic() - started < 1.5  # 0.05 s on a quiet machine; torch alone takes longer than this bound
    probe = f"import sys; sys.argv[1:] = {args!r}\nfrom pause_lightning.__main__ import run\n" \
            "try: run(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)


def test_the_training_commands_do_not_import_models_to_show_help() -> None:
    probe = "import sys, pause_lightning.cli; assert 'peft' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_an_unknown_command_names_the_nearest(tmp_path: Path) -> None:
    assert "did you mean rollout?" in refused("rolout", cwd=tmp_path)


def test_auto_classes_load_a_pause_model_after_one_import(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from pause_lightning.pause.model import add_pause

    config = AutoConfig.for_model(**{**TINY, "vocab_size": 50})
    add_pause(AutoModelForCausalLM.from_config(config), 50).save_pretrained(tmp_path)
    for order in ("import pause_lightning, transformers", "import transformers.models.auto, pause_lightning"):
        probe = f"{order}\nm = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n" \
                "assert type(m).__name__ == 'PauseLlamaForCausalLM'"  # fmt: skip
        subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)
