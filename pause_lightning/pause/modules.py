"""The two modules that make a causal LM able to pause: its own embedding row and its own head.

Lives here: ``PauseEmbedding`` and ``PauseLMHead``. They take over the Parameter objects of the modules they replace,
so weight tying survives. Which class of model they are put into, and how it is saved, is in ``model.py``.

The *gate logit* g of a position is the log-odds of pausing: p(pause) = sigmoid(g), and every other token v has
p(v) = (1 - p(pause)) * softmax(z without the pause column)[v]. Both heads are described by it:

* ``gate``: g is the output of the pause head; the column written into the logits is g + logsumexp(z without pause),
  which is exactly the law above under an ordinary softmax (reference.md 2.2).
* ``row``: the pause head is one more row of the LM head, z_pause = w . h, so g = z_pause - logsumexp(z without pause).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

HeadKind = Literal["gate", "row"]
DEFAULT_PAUSE_RATE = 0.05


class PauseEmbedding(nn.Embedding):
    """The LM's embedding, with row ``pause_id`` replaced by the module ``pause_row``.

    ``pause_row`` is a ``Linear(1, H)`` fed with 1, because PEFT can save, load and merge a Linear by name.
    """

    pause_id: int
    pause_row: nn.Linear

    @classmethod
    def adopt(cls, old: nn.Embedding, pause_id: int) -> PauseEmbedding:
        new = _adopt(cls, old)
        new.pause_id = pause_id
        new.pause_row = nn.Linear(1, old.embedding_dim, bias=False, device=old.weight.device, dtype=torch.float32)
        return new

    @torch.no_grad()
    def reset_pause(self) -> None:
        """A pause starts as the average token."""
        self.pause_row.weight.copy_(self.weight.float().mean(0).unsqueeze(1))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> embeddings [..., H] in the dtype of the LM's own table."""
        embedded = super().forward(ids)
        # The width of a merged or loaded pause_row may be the model's dtype; compute in whatever it holds.
        one = torch.ones(1, dtype=_weight(self.pause_row).dtype, device=embedded.device)
        return torch.where((ids == self.pause_id).unsqueeze(-1), self.pause_row(one).to(embedded.dtype), embedded)


class PauseLMHead(nn.Linear):
    """The LM's head, with column ``pause_id`` of the logits computed by the module ``pause_head``.

    ``detach``: the pause head sees detached inputs, so the loss of pausing trains the pause head alone.
    """

    pause_id: int
    kind: HeadKind
    detach: bool
    pause_head: nn.Linear

    @classmethod
    def adopt(cls, old: nn.Linear, pause_id: int, kind: HeadKind, detach: bool) -> PauseLMHead:
        new = _adopt(cls, old)
        new.pause_id, new.kind, new.detach = pause_id, kind, detach
        # A row has no bias, as the rows of a stock LM head have none: so it folds into a plain HF model.
        new.pause_head = nn.Linear(old.in_features, 1, bias=kind == "gate", device=old.weight.device, dtype=torch.float32)
        return new

    @torch.no_grad()
    def reset_pause(self, pause_rate: float = DEFAULT_PAUSE_RATE) -> None:
        """gate: pauses at ``pause_rate`` (0..1) everywhere. row: the average row, about 1/V."""
        if self.kind == "gate":
            self.pause_head.weight.zero_()
            self.pause_head.bias.fill_(math.log(pause_rate / (1 - pause_rate)))
        else:
            self.pause_head.weight.copy_(self.weight.float().mean(0, keepdim=True))

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [..., H] -> (z [..., V] with -inf in the pause column, gate logit [...]), both float32."""
        z = super().forward(hidden).float()
        z = z.masked_fill(self._column(z), float("-inf"))
        own = self._own_logit(hidden)
        if self.kind == "gate":
            return z, own
        others = z.logsumexp(-1)
        return z, own - (others.detach() if self.detach else others)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V]; an ordinary softmax over them is the law of the module docstring."""
        z = super().forward(hidden)
        own = self._own_logit(hidden)
        column = self._column(z)
        if self.kind == "gate" or (self.detach and torch.is_grad_enabled()):
            others = z.float().masked_fill(column, float("-inf")).logsumexp(-1)
            # row + detach: the value is the row's own; the gradient through the denominator goes.
            own = own + others if self.kind == "gate" else own + (others - others.detach())
        if not torch.is_grad_enabled():
            z[..., self.pause_id] = own.to(z.dtype)
            return z
        return torch.where(column, own.unsqueeze(-1).to(z.dtype), z)

    def _own_logit(self, hidden: Tensor) -> Tensor:
        x = hidden.detach() if self.detach else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            return self.pause_head(x.to(_weight(self.pause_head).dtype)).float().squeeze(-1)

    def _column(self, z: Tensor) -> Tensor:
        return torch.arange(z.shape[-1], device=z.device) == self.pause_id


def _adopt(cls, old):
    """A ``cls`` that holds the very Parameters and settings of ``old`` (in_features, padding_idx, ...)."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    new.__dict__.update({k: v for k, v in old.__dict__.items() if not k.startswith("_")})
    new._parameters.update(old._parameters)
    return new


def _weight(module: nn.Module) -> Tensor:
    """The weight a forward will use, also when PEFT has wrapped the module (modules_to_save)."""
    active = getattr(module, "modules_to_save", None)
    if active is not None:
        return next(iter(active.values())).weight
    return module.weight
