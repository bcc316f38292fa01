"""Shared fixtures: tiny models of each architecture, made from a configuration, no download."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import pause_lightning  # noqa: F401  (registers the pause classes)
from tests.forks import ForkServer

VOCAB = 64
ARCHITECTURES = ("llama", "mistral", "qwen2", "gpt2")
torch.set_num_threads(1)


def tiny_model(arch: str = "llama", tied: bool = True, vocab: int = VOCAB, seed: int = 0, **more: Any) -> Any:
    """A two-layer model with context 64, pad 0, bos 1, eos 2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "tie_word_embeddings": tied, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if arch == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        own = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **drop}
    else:
        own = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    config = AutoConfig.for_model(arch, **{**common, **own, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def scramble_pause(model: Any, seed: int = 1) -> Any:
    """Give the pause parts weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "pause_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


@pytest.fixture
def pause_model() -> Any:
    from pause_lightning.pause.model import add_pause

    return scramble_pause(add_pause(tiny_model(), VOCAB))


TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny_settings(**overrides: str) -> list[str]:
    """Command-line options of a run that takes a few seconds; ``overrides`` use ``__`` for dots."""
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.outer_loop.warmup_epochs": "2",
        "trainer.outer_loop.num_outer_loops": "1",
        "trainer.enable_progress_bar": "false",
        "model.tokenizer": "quickstart",
        "model.from_scratch": json.dumps(TINY),
        "model.freeze": json.dumps({"lm_head": True, "lm_embeddings": True, "body": True}),
        "model.rollout_sampling.max_new_tokens": "12",
        "model.eval_sampling.max_new_tokens": "12",
        "model.optimizer.lr": "0.01",
        "data.task": "WordProblems",
        "data.task.init_args.num_train": "40",
        "data.task.init_args.num_test": "8",
        "data.pause_injection.n_pauses_per_patterns": '{"=": 1}',
        "data.problems_per_unit": "8",
    }
    settings |= {k.replace("__", "."): v for k, v in overrides.items()}
    return [f"--{k}={v}" for k, v in settings.items() if v is not None]


@functools.cache
def server() -> ForkServer:
    """Forks the commands of this test process."""
    forks = ForkServer()
    atexit.register(forks.close)
    return forks


def command(*args: str, cwd: Path, check: int | None = 0, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``python -m pause_lightning`` as a user would, forked; fails unless the exit code is ``check``.

    ``processes``: as if started by torchrun.
    """
    done = server().run(list(args), cwd, processes)
    assert check is None or done.code == check, f"exit {done.code}\n{done.out}\n{done.err}"
    return subprocess.CompletedProcess(args, done.code, done.out, done.err)


def really(*args: str, cwd: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    """``command`` in a process that imports everything itself."""
    done = subprocess.run([sys.executable, "-m", "pause_lightning", *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(*args: str, cwd: Path) -> str:
    """Run a command that must be refused: exit code 2 and one line on stderr, which is returned."""
    done = command(*args, cwd=cwd, check=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("pause_lightning: "), done.stderr
    return lines[0]
