"""Freeze policy: what is off stays bit-identical, whatever the optimiser does."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import VOCAB, scramble_pause, tiny_model

from pause_lightning.errors import UserError
from pause_lightning.pause.freeze import FreezePolicy, LoRA, add_lora, apply_policy, named_groups, trainable_table
from pause_lightning.pause.model import add_pause, reply_loss

SWITCHES = [f.name for f in fields(FreezePolicy)]
OFF = dict.fromkeys(SWITCHES, False)
IDS = torch.tensor([[5, 9, VOCAB, 13, 4, 7], [6, VOCAB, VOCAB, 8, 3, 9]])


def model_with(lora: bool, tied: bool = False):  # type: ignore[no-untyped-def]
    model = scramble_pause(add_pause(tiny_model(tied=tied), VOCAB))
    return add_lora(model, LoRA(r=2, dropout=0.0), "base") if lora else model


@pytest.mark.parametrize("switch", SWITCHES)
def test_only_the_group_that_is_on_changes(switch: str) -> None:
    model = model_with(lora=switch == "lora")
    apply_policy(model, FreezePolicy(**{**OFF, switch: True}))
    before = {name: (group, p.detach().clone()) for name, p, group in named_groups(model)}
    # every parameter goes to the optimiser, with weight decay: what is frozen must not move
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        base = model.get_base_model() if switch == "lora" else model
        reply_loss(base, IDS, torch.ones_like(IDS), IDS).loss.backward()
        optimizer.step()
    changed = {before[name][0] for name, p, _ in named_groups(model) if not torch.equal(p, before[name][1])}
    assert changed == {switch}


def test_a_tied_matrix_cannot_be_half_frozen() -> None:
    model = model_with(lora=False, tied=True)
    with pytest.raises(UserError, match=r"freeze.lm_head is true but model.freeze.lm_embeddings is false"):
        apply_policy(model, FreezePolicy(lm_head=True))
    apply_policy(model, FreezePolicy(lm_head=True, lm_embeddings=True))


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        apply_policy(model_with(lora=False), FreezePolicy(**OFF))
    with pytest.raises(UserError, match="nothing to train"):
        apply_policy(tiny_model(), FreezePolicy())  # a model without pauses and without LoRA


def test_lora_on_a_body_that_trains_is_an_error() -> None:
    with pytest.raises(UserError, match="body"):
        apply_policy(model_with(lora=True), FreezePolicy(body=True))


def test_what_trains_is_float32_on_a_bfloat16_base() -> None:
    model = add_lora(add_pause(tiny_model().bfloat16(), VOCAB), LoRA(r=2), "base")
    apply_policy(model, FreezePolicy())
    for _, parameter, group in named_groups(model):
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), group
    reply_loss(model.get_base_model(), IDS, torch.ones_like(IDS), IDS).loss.backward()


def test_the_table_counts_every_parameter_once() -> None:
    model = model_with(lora=True)
    apply_policy(model, FreezePolicy(pause_head=False))
    table = trainable_table(model)
    total = sum(p.numel() for _, p, _ in named_groups(model))
    assert f"of {total:,} parameters train" in table
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:-1]}
    assert rows["pause_head"] == "frozen" and rows["pause_embedding"] == "trains" and rows["lora"] == "trains"


def test_unknown_lora_targets_are_named() -> None:
    with pytest.raises(UserError, match="target_modules"):
        add_lora(tiny_model(), LoRA(target_modules=["no_such_layer"]), "base")
