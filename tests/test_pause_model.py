"""What a pause model is: an ordinary HF causal LM with one exact law. The matrix is head x architecture x tying."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, VOCAB, scramble_pause, tiny_model
from transformers import AutoModelForCausalLM

from pause_lightning.errors import UserError
from pause_lightning.pause.freeze import FreezePolicy, LoRA, add_lora, apply_policy
from pause_lightning.pause.model import add_pause, reply_loss
from pause_lightning.pause.modules import PauseLMHead

MATRIX = [(head, arch, tied) for head in ("gate", "row") for arch in ARCHITECTURES for tied in (True, False)]
IDS = torch.tensor([[5, 9, VOCAB, 13, 4, 7], [6, VOCAB, VOCAB, 8, 3, 9]])
MASK = torch.ones_like(IDS)
LABELS = torch.where(torch.arange(6) < 2, -100, IDS)


@pytest.mark.parametrize(("head", "arch", "tied"), MATRIX)
def test_the_matrix(head: str, arch: str, tied: bool, tmp_path: Path) -> None:
    plain = tiny_model(arch, tied)
    before = plain(IDS.clamp(max=VOCAB - 1)).logits
    model = add_pause(plain, VOCAB, head=head, detach_head=False)
    # the law over the other tokens is the LM's own
    law = model(IDS.clamp(max=VOCAB - 1)).logits[..., :VOCAB].log_softmax(-1)
    assert torch.allclose(law, before.log_softmax(-1), atol=1e-6)
    scramble_pause(model)
    out = model.get_output_embeddings()
    assert isinstance(out, PauseLMHead)
    assert (out.weight is model.get_input_embeddings().weight) == tied

    hidden = getattr(model, model.base_model_prefix)(IDS)[0]
    z, gate = out.split(hidden)
    p = model(IDS).logits.softmax(-1)
    assert torch.allclose(p[..., VOCAB], gate.sigmoid(), atol=1e-6)
    others = (1 - gate.sigmoid()).unsqueeze(-1) * z.softmax(-1)
    assert torch.allclose(p[..., :VOCAB], others[..., :VOCAB], atol=1e-6)

    # our loss at label positions is the model's own
    loss = reply_loss(model, IDS, MASK, LABELS)
    assert torch.allclose(loss.loss, model(IDS, labels=LABELS).loss, atol=1e-5)

    # generate with and without cache, beams
    with_cache, without = (model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert with_cache.tolist() == without.tolist()
    assert model.generate(IDS, max_new_tokens=4, num_beams=3, do_sample=False).shape[0] == 2

    # save, load with the Auto class, tying kept
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied

    # LoRA: trains, the frozen base stays bit-identical under weight decay, adapter reload, merge
    lora = add_lora(loaded, LoRA(r=4, dropout=0.0), str(tmp_path / "m"))
    apply_policy(lora, FreezePolicy())
    frozen = {n: q.clone() for n, q in lora.named_parameters() if not q.requires_grad}
    trained = {n: q.detach().clone() for n, q in lora.named_parameters() if q.requires_grad}
    optimizer = torch.optim.AdamW([q for q in lora.parameters() if q.requires_grad], lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        reply_loss(lora.get_base_model(), IDS, MASK, LABELS).loss.backward()
        optimizer.step()
    parameters = dict(lora.named_parameters())
    assert all(torch.equal(parameters[n], q) for n, q in frozen.items())
    assert all(not torch.equal(parameters[n], q) for n, q in trained.items())
    lora.eval()
    logits = lora(IDS).logits
    lora.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    from peft import PeftModel

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS).logits, logits)
    merged = lora.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, merged(IDS).logits)


def test_paper_values_of_the_loss() -> None:
    """reference.md 10: gate logits (0, ln 3) for (pause, LM), LM softmax (.5, .5), labels [pause, token 0]."""
    head = PauseLMHead.adopt(torch.nn.Linear(1, 3, bias=False), pause_id=2, kind="gate", detach=True)
    with torch.no_grad():
        head.weight.zero_()
        head.pause_head.weight.zero_()
        head.pause_head.bias.fill_(-math.log(3))
    p = head(torch.zeros(1, 1)).softmax(-1)
    assert torch.allclose(p, torch.tensor([[0.375, 0.375, 0.25]]))

    class Body(torch.nn.Module):
        base_model_prefix = "body"

        def body(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.zeros(*input_ids.shape, 1),)

        def get_output_embeddings(self) -> torch.nn.Module:
            return head

    ids = torch.tensor([[1, 2, 0]])
    loss = reply_loss(Body(), ids, torch.ones_like(ids), torch.tensor([[-100, 2, 0]]))
    assert loss.loss.item() == pytest.approx(1.1836, abs=1e-4)
    assert loss.lm_loss.item() == pytest.approx(0.6931, abs=1e-4)
    assert loss.pause_loss.item() == pytest.approx(0.8370, abs=1e-4)
    assert loss.loss.item() == pytest.approx(loss.pause_loss.item() + loss.lm_loss.item() / 2)


def test_without_pauses_the_loss_is_plain_cross_entropy() -> None:
    model = tiny_model()
    ids = IDS.clamp(max=VOCAB - 1)
    labels = torch.where(torch.arange(6) < 2, -100, ids)
    loss = reply_loss(model, ids, MASK, labels)
    expected = F.cross_entropy(model(ids).logits[:, 1:-1].reshape(-1, VOCAB), ids[:, 2:].reshape(-1))
    assert torch.allclose(loss.loss, expected) and loss.pause_loss == 0


@pytest.mark.parametrize("head", ["gate", "row"])
def test_a_detached_head_alone_learns_when_to_pause(head: str) -> None:
    model = scramble_pause(add_pause(tiny_model(tied=False), VOCAB, head=head, detach_head=True))
    labels = torch.where(IDS == VOCAB, IDS, -100)  # nothing but pauses to predict
    reply_loss(model, IDS, MASK, labels).loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched and all("pause_head" in n for n in touched)


@pytest.mark.parametrize("head", ["gate", "row"])
def test_the_models_own_loss_has_the_same_gradient(head: str) -> None:
    """forward(labels=...) is what a user of plain HF would train with; detached or not, it must mean the same."""
    for detach in (True, False):
        model = scramble_pause(add_pause(tiny_model(tied=False), VOCAB, head=head, detach_head=detach))
        reply_loss(model, IDS, MASK, LABELS).loss.backward()
        ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        for name, gradient in ours.items():
            own = dict(model.named_parameters())[name].grad
            assert torch.allclose(gradient, own, atol=2e-6), (detach, name)


def test_a_padded_vocabulary_is_not_resized() -> None:
    model = add_pause(tiny_model(vocab=VOCAB), VOCAB - 10)
    assert model.config.vocab_size == VOCAB and model.config.pause_token_id == VOCAB - 10


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_a_new_gate_pauses_at_the_rate_it_is_told(rate: float) -> None:
    model = add_pause(tiny_model(), VOCAB, init_pause_rate=rate)
    assert torch.allclose(model(IDS).logits.softmax(-1)[..., VOCAB], torch.tensor(rate), atol=1e-6)


def test_bad_settings_say_what_to_do() -> None:
    with pytest.raises(UserError, match="init_pause_rate must lie between 0 and 1"):
        add_pause(tiny_model(), VOCAB, init_pause_rate=1.0)
    with pytest.raises(UserError, match="row head has no bias"):
        add_pause(tiny_model(), VOCAB, head="row", init_pause_rate=0.1)


def test_a_bfloat16_base_keeps_its_pause_parts_in_float32(tmp_path: Path) -> None:
    model = scramble_pause(add_pause(tiny_model().bfloat16(), VOCAB))
    assert model(IDS).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.get_output_embeddings().pause_head.weight.dtype == torch.float32
    assert loaded.get_output_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
