"""scripts/estimate.py: its counts against published ones, its bytes against those of real training steps on the CPU.

The time model is not tested: nothing here has a GPU.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import estimate

from pause_lightning.module import PauseLitModule
from pause_lightning.pause.freeze import FreezePolicy, LoRA

PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "models/smollm2-135m": 134_515_008,
}
MISTRAL = "mistralai/Mistral-7B-v0.1"
TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
PROMPT, REPLY, ROWS = 30, 70, 4


def numbers(model: Any, *names: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if not names or any(name in n for name in names))


def test_the_table_holds_every_known_name() -> None:
    assert PUBLISHED.keys() == estimate.KNOWN.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    module = PauseLitModule(path=name, pauses=False, freeze=FreezePolicy(lm_head=True, lm_embeddings=True, body=True))
    estimate.stand_in(module, str(tmp_path))
    assert numbers(module.build(weights=False)) == PUBLISHED[name]


def mistral(folder: Path) -> PauseLitModule:
    module = PauseLitModule(path=MISTRAL, dtype="bfloat16", lora=LoRA(r=16, target_modules=["q_proj", "v_proj"]))
    estimate.stand_in(module, str(folder))
    return module


GATE = 4096 + 1  # the pause head of Mistral-7B


def test_mistral_with_pauses_and_lora(tmp_path: Path) -> None:
    model = mistral(tmp_path).build(weights=False)
    assert numbers(model, "lora_") == 6_815_744
    # a row in either table, the pause embedding and the pause head; and the copies PEFT keeps of these two
    assert numbers(model) == PUBLISHED[MISTRAL] + 6_815_744 + 2 * 4096 + 2 * (4096 + GATE)


def test_what_mistral_holds(tmp_path: Path) -> None:
    p = estimate.policy(mistral(tmp_path), SimpleNamespace(mixed=True, batch=2, width=16))
    assert p.trained == 6_815_744 + 4096 + GATE
    assert p.whole == 2 * (PUBLISHED[MISTRAL] + 2 * 4096) + 4 * (6_815_744 + 2 * (4096 + GATE))
    assert p.cache == 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, width, bf16
    # with gradient checkpointing little more than the input of every layer is kept
    assert 32 * 2 * 16 * 4096 * 2 <= p.saved[True] < 1.3 * 32 * 2 * 16 * 4096 * 2 < p.saved[False] / 10


def tiny(lora: bool, checkpointing: bool, mixed: bool) -> tuple[PauseLitModule, SimpleNamespace]:
    module = PauseLitModule(
        from_scratch=TINY,
        tokenizer="quickstart",
        freeze=FreezePolicy(lm_head=not lora, lm_embeddings=not lora, body=not lora),
        lora=LoRA(r=16) if lora else None,
        gradient_checkpointing=checkpointing,
    )
    c = SimpleNamespace(mixed=mixed, checkpointing=checkpointing, batch=ROWS, slots=ROWS, longest=PROMPT, max_new=REPLY)
    c.width = PROMPT + REPLY
    return module, c


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive that it has seen made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, number: int) -> None:
        self.now -= self.alive.pop(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


class Real:
    """A model of the same configuration that has been trained for a step."""

    def __init__(self, module: Any, mixed: bool) -> None:
        self.model, self.mixed = module.build(weights=True).train(), mixed
        self.hf = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.trains = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trains, lr=1e-3)
        self.ids = torch.randint(5, 400, (ROWS, PROMPT + REPLY))
        self.labels = self.ids.clone()
        self.labels[:, :PROMPT] = -100
        self.step()

    def step(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.mixed else nullcontext():
            lm, pause, _, num = self.hf.reply_loss_terms(self.ids, torch.ones_like(self.ids), self.labels)
        self.optimizer.zero_grad()
        ((lm + pause) / num).backward()
        self.optimizer.step()

    def held(self) -> dict[str, list[torch.Tensor]]:
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        gradients = [p.grad for p in self.trains if p.grad is not None]
        return {"weights": list(self.model.parameters()), "gradients": gradients, "AdamW": states}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bytes_of_a_real_training_step(lora: bool, checkpointing: bool, mixed: bool) -> None:
    module, c = tiny(lora, checkpointing, mixed)
    estimated = estimate.memory(estimate.policy(module, c), c, 1, "ddp")

    real = Real(module, mixed)
    for what, tensors in real.held().items():
        assert sum(t.nbytes for t in tensors) == estimated[what], what
    meter = Peak()
    for tensor in itertools.chain(*real.held().values(), real.model.buffers()):
        meter.add(tensor)
    with meter:
        real.step()
    assert 0.9 < estimated["SFT"] / meter.peak < 1.2, (estimated, meter.peak)


def test_sharding_divides_what_is_held() -> None:
    module, c = tiny(lora=False, checkpointing=True, mixed=False)
    p = estimate.policy(module, c)
    one, ddp, fsdp2 = (estimate.memory(p, c, n, s) for n, s in ((1, "ddp"), (8, "ddp"), (8, "fsdp2")))
    sharded = estimate.memory(p, c, 8, "fsdp2_sharded")
    assert fsdp2["AdamW"] == one["AdamW"] / 8 and fsdp2["gradients"] == one["gradients"] / 8
    assert ddp["gradients"] == 2 * one["gradients"]  # DDP's buckets
    assert fsdp2["weights, rollouts"] == p.whole * 9 / 8 and sharded["weights, rollouts"] == sharded["weights"]


def test_a_plan_reads_configuration_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main(["--config", "quickstart", "--devices", "1", "8", "--data.batch_size", "16"]) == 0
    said = capsys.readouterr().out
    assert "490,241 of 490,241 parameters train" in said and "SFT batches of 16 per GPU" in said
    assert "4500 problems x 1" in said and "(the data's" in said
    assert said.count("\n| 8 | fsdp2 |") == 2 and said.count("\n| 1 | auto |") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "mistral7b_gsm8k", "--model.freeze.puse_head", "true"], "did you mean --model.freeze.pause_head?"),
        (["--config", "mistral7b_gsm8k", "--devics", "4"], "--devics"),
        (["--config", "mistral7b"], "configs known by name: "),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--mfu", "35"], "--mfu must be in (0, 1]"),
        (["--strategy", "fsdp"], "invalid choice: 'fsdp'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("estimate: ") and words in said.err


def test_an_unknown_name_without_network_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)  # put back afterwards
    monkeypatch.setattr(estimate.urllib.request, "urlopen", unreachable)
    assert estimate.main(["--config", "mistral7b_gsm8k", "--model.path", "nobody/no-model-7b"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nobody/no-model-7b" in said and MISTRAL in said
