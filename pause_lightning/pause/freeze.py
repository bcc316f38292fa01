"""What trains: the freeze policy, LoRA, and the table that says so.

Lives here: ``FreezePolicy``, ``LoRA`` (settings), ``apply_policy``, ``add_lora``, ``trainable_table``. The groups are
disjoint sets of Parameters, so a frozen group stays bit-identical whatever the optimiser does (weight decay included).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pause_lightning.errors import UserError

PAUSE_MODULES = ["pause_row", "pause_head"]
GROUPS = ("pause_embedding", "pause_head", "lm_head", "lm_embeddings", "lora", "body")


@dataclass
class FreezePolicy:
    """Which groups of parameters train: true trains, false is frozen.

    Args:
        pause_embedding: the embedding of the pause token
        pause_head: the head that decides to pause
        lm_head: the output matrix (tied models: the same matrix as lm_embeddings, so both switches must agree)
        lm_embeddings: the input embedding table
        lora: the LoRA matrices, where the model has any (see model.lora)
        body: all the rest: attention, MLPs, norms (full fine-tuning)
    """

    pause_embedding: bool = True
    pause_head: bool = True
    lm_head: bool = False
    lm_embeddings: bool = False
    lora: bool = True
    body: bool = False


@dataclass
class LoRA:
    """LoRA adapters through PEFT (reference.md 2.6).

    Args:
        r: rank
        alpha: scale; the update is multiplied by alpha / r
        dropout: dropout on the adapters' input, in training
        target_modules: names of the linear layers; null: PEFT's choice for the architecture (q_proj and v_proj mostly)
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = field(default=None)


def group_of(name: str) -> str:
    """The group of a parameter by its name in the HF (or PEFT) model."""
    for part, group in (("pause_row", "pause_embedding"), ("pause_head", "pause_head"), ("lora_", "lora")):
        if part in name:
            return group
    return "body"


def named_groups(model: Any) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(name, parameter, group) of every parameter once; tied matrices belong to ``lm_embeddings``."""
    base = _base(model)
    head, embeddings = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # the copy PEFT keeps of a modules_to_save module: never used, never trained
            continue
        if parameter is embeddings:
            yield name, parameter, "lm_embeddings"
        elif parameter is head:
            yield name, parameter, "lm_head"
        else:
            yield name, parameter, group_of(name)


def apply_policy(model: Any, policy: FreezePolicy) -> None:
    """Set ``requires_grad`` on every parameter of ``model`` (HF or PEFT); what trains becomes float32.

    Raises:
        UserError: nothing would train, or a switch a tied model cannot honour.
    """
    base = _base(model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if tied and policy.lm_head != policy.lm_embeddings:
        on, off = ("lm_head", "lm_embeddings") if policy.lm_head else ("lm_embeddings", "lm_head")
        raise UserError(
            f"model.freeze.{on} is true but model.freeze.{off} is false, and in this model they are one tied matrix: "
            "set both alike"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trains = 0
    present = set()
    for _, parameter, group in named_groups(model):
        present.add(group)
        if getattr(policy, group):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
            trains += 1
    if policy.body and "lora" in present and policy.lora:
        raise UserError("model.freeze.body trains all weights, so model.lora has nothing to add: switch one of them off")
    if not trains:
        raise UserError(
            f"nothing to train: this model has {', '.join(sorted(present))}, and model.freeze trains none of them"
        )


def add_lora(model: Any, settings: LoRA, base_path: str) -> Any:
    """Wrap a HF model into PEFT; the pause modules, where present, travel in the adapter.

    Raises:
        UserError: no layer has a name in ``target_modules``, or PEFT knows no default for the architecture.
    """
    import peft

    targets: Any = settings.target_modules
    if targets is None:
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = known.get(getattr(model.config, "base_model_type", model.config.model_type))
        if targets is None:
            raise UserError(f"model.lora.target_modules: name the layers, PEFT has no default for {type(model).__name__}")
    has_pause = any(any(part in name for part in PAUSE_MODULES) for name, _ in model.named_modules())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        modules_to_save=PAUSE_MODULES if has_pause else None,
        base_model_name_or_path=base_path,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    try:
        wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules {list(targets)}: {str(error).splitlines()[0]}") from None
    wrapped.peft_config["default"].base_model_name_or_path = base_path
    return wrapped


def trainable_table(model: Any) -> str:
    """The groups of a model, what trains and how much it is, as a text table."""
    rows: dict[tuple[str, bool, torch.dtype], list[int]] = {}
    for _, parameter, group in named_groups(model):
        entry = rows.setdefault((group, parameter.requires_grad, parameter.dtype), [0, 0])
        entry[0] += 1
        entry[1] += parameter.numel()
    lines = [f"{'group':<16} {'':<7} {'tensors':>7} {'parameters':>14}  dtype"]
    for (group, trains, dtype), (tensors, numbers) in sorted(rows.items(), key=lambda kv: GROUPS.index(kv[0][0])):
        state = "trains" if trains else "frozen"
        lines.append(f"{group:<16} {state:<7} {tensors:>7} {numbers:>14,}  {str(dtype).removeprefix('torch.')}")
    total = sum(n for _, n in rows.values())
    train = sum(n for (_, trains, _), (_, n) in rows.items() if trains)
    lines.append(f"{train:,} of {total:,} parameters train ({100 * train / total:.2f}%)")
    return "\n".join(lines)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
