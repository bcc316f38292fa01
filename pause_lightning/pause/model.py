"""Pause models as ordinary HF causal LMs: classes, construction from a plain LM, and the loss.

Lives here: the class factory (``pause_classes``), ``add_pause`` that turns a loaded LM into a pause model in place, and
``reply_loss``. Not here: what trains (``freeze.py``), sampling controls (``logits.py``), Lightning.

A pause model is ``Pause<X>ForCausalLM``, a subclass of ``<X>ForCausalLM`` whose embedding and head are the modules of
``modules.py``; the pause id lies inside ``config.vocab_size``. So ``generate``, the KV cache, PEFT, ``save_pretrained``
and ``AutoModelForCausalLM.from_pretrained`` (after ``import pause_lightning``) work as for any other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pause_lightning.errors import UserError
from pause_lightning.pause.config import MODEL_TYPE, register
from pause_lightning.pause.modules import DEFAULT_PAUSE_RATE, HeadKind, PauseEmbedding, PauseLMHead

_CLASSES: dict[str, tuple[Any, Any]] = {}


def pause_classes(base_model_type: str) -> tuple[Any, Any]:
    """(configuration class, model class) of the pause variant of an architecture, e.g. ``"llama"``; made once.

    Raises:
        UserError: transformers has no causal LM of that type.
    """
    if base_model_type in _CLASSES:
        return _CLASSES[base_model_type]
    try:
        base_config = CONFIG_MAPPING[base_model_type]
        base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    except KeyError:
        raise UserError(f"transformers has no causal LM of model_type {base_model_type!r}") from None

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _attach(self)
        self.post_init()

    def init_weights(self: Any, module: nn.Module) -> None:
        # transformers calls this for every module without loaded weights, children first; its own rule would start a
        # gate at p(pause) = 0.5.
        if getattr(module, "is_pause_part", False):
            return
        base._init_weights(self, module)
        if isinstance(module, (PauseEmbedding, PauseLMHead)):
            loaded = all(
                getattr(p, "_is_hf_initialized", False) for n, p in module.named_parameters() if n.startswith("pause_")
            )
            if not loaded:
                module.reset_pause()

    stem = base.__name__
    config_class = type(
        f"Pause{base_config.__name__}",
        (base_config,),
        {"model_type": MODEL_TYPE, "base_model_type": base_model_type, "__module__": __name__, "__annotations__": {}},
    )
    model_class = type(
        f"Pause{stem}",
        (base,),
        {
            "__init__": init,
            "_init_weights": init_weights,
            "config_class": config_class,
            "_keep_in_fp32_modules_strict": [
                *(getattr(base, "_keep_in_fp32_modules_strict", None) or []),
                "pause_row",
                "pause_head",
            ],
            "__module__": __name__,
        },
    )
    globals()[config_class.__name__], globals()[model_class.__name__] = config_class, model_class  # picklable
    register()
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    _CLASSES[base_model_type] = (config_class, model_class)
    return config_class, model_class


def is_pause_model(model: Any) -> bool:
    """Whether ``model`` (a HF model, not a PEFT wrapper) has pause modules."""
    return isinstance(model.get_output_embeddings(), PauseLMHead)


def add_pause(
    model: Any,
    pause_token_id: int,
    *,
    pause_token: str = "<|pause|>",
    head: HeadKind = "gate",
    detach_head: bool = True,
    init_pause_rate: float | None = None,
) -> Any:
    """Turn a loaded HF causal LM into a pause model, in place; returns it.

    The vocabulary grows only when ``pause_token_id`` lies outside it (padded vocabularies have room). The pause
    embedding starts as the mean embedding; a gate starts at ``init_pause_rate`` everywhere (5% unless given).

    Raises:
        UserError: an architecture whose logits are not ``lm_head(hidden)``, a rate outside (0, 1) or for a ``row``.
    """
    if init_pause_rate is not None:
        if head == "row":
            raise UserError("model.init_pause_rate: a row head has no bias to set a rate with; use head: gate or null")
        if not 0 < init_pause_rate < 1:
            raise UserError(f"model.init_pause_rate must lie between 0 and 1, got {init_pause_rate}")
    config = model.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} rescales its logits ({name}): the pause head needs plain logits")
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or output.bias is not None:
        raise UserError(f"{type(model).__name__} has no bias-free linear LM head: pauses cannot be added")
    if pause_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(pause_token_id + 1, mean_resizing=False)

    config_class, model_class = pause_classes(config.model_type)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    new_config = config_class.from_dict(fields)
    new_config.pause_token_id, new_config.pause_token = pause_token_id, pause_token
    new_config.pause_head, new_config.pause_detach_head = head, detach_head
    new_config.base_model_type = config.model_type
    new_config._name_or_path = getattr(config, "_name_or_path", "")
    new_config._attn_implementation = config._attn_implementation
    # The modules below (attention, norms) keep the configuration object they were built with; share one object.
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = new_config
    model.__class__ = model_class
    _attach(model)
    model.get_input_embeddings().reset_pause()
    model.get_output_embeddings().reset_pause(init_pause_rate or DEFAULT_PAUSE_RATE)
    return model


def _attach(model: Any) -> None:
    config = model.config
    if getattr(config, "pause_token_id", None) is None:
        raise UserError("the configuration of this pause model has no pause_token_id; build it with add_pause")
    embedding = PauseEmbedding.adopt(model.get_input_embeddings(), config.pause_token_id)
    head = PauseLMHead.adopt(
        model.get_output_embeddings(), config.pause_token_id, config.pause_head, config.pause_detach_head
    )
    embedding.pause_row.is_pause_part = head.pause_head.is_pause_part = True
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)


@dataclass
class ReplyLoss:
    """Scalars, means over a batch. ``loss = pause_loss + lm_loss * (share of labels that are not pauses)``."""

    loss: Tensor
    lm_loss: Tensor
    pause_loss: Tensor
    num_labels: int


def reply_loss_terms(
    self: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of the training loss as sums over the label positions, so that batches and processes can be averaged.

    A method of every policy (``load_model`` binds it to the HF model, under PEFT: to ``get_base_model()``), with or
    without pauses. input_ids, attention_mask, labels: [B, T]; labels are the ids themselves, -100 where nothing is
    learned. The LM head runs at label positions only. Returns scalars: NLL of the tokens that are not pauses, NLL of
    the pause decisions (0 without pauses), number of the former, number of label positions. Raises: UserError if no
    position has a label.
    """
    hidden = getattr(self, self.base_model_prefix)(input_ids=input_ids, attention_mask=attention_mask)[0][:, :-1]
    targets = labels[:, 1:]
    keep = targets != -100
    hidden, targets = hidden[keep], targets[keep]
    if len(targets) == 0:
        raise UserError("a training batch has no label: every reply in it is empty")
    head = self.get_output_embeddings()
    zero = hidden.new_zeros((), dtype=torch.float32)
    num = zero + len(targets)
    if not isinstance(head, PauseLMHead):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum"), zero, num, num
    z, gate = head.split(hidden)
    is_pause = targets == head.pause_id
    pause_nll = F.binary_cross_entropy_with_logits(gate, is_pause.float(), reduction="sum")
    lm_nll = F.cross_entropy(z[~is_pause], targets[~is_pause], reduction="sum") if not is_pause.all() else zero
    return lm_nll, pause_nll, zero + (~is_pause).sum(), num


def reply_loss(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> ReplyLoss:
    """The training loss of one batch (reference.md 2.3): token mean of gate NLL + NLL of the tokens that are not pauses.

    Arguments and errors as ``reply_loss_terms``. Equals the model's own ``forward(labels=...)``.
    """
    lm_nll, pause_nll, num_lm, num = reply_loss_terms(model, input_ids, attention_mask, labels)
    n = int(num)
    return ReplyLoss((pause_nll + lm_nll) / n, (lm_nll / max(int(num_lm), 1)).detach(), (pause_nll / n).detach(), n)


def context_length(config: Any) -> int | None:
    """Most tokens the model can hold, or None when its configuration does not say."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
