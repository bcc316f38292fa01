"""What happens over a run: its phases and its learning rate. Lives here: the settings ``OuterLoop`` and ``Optimizer``.

Nothing here imports torch; ``loops.py`` and ``module.py`` read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pause_lightning.errors import UserError


@dataclass
class OuterLoop:
    """The schedule: warm-up epochs, then num_outer_loops times (rollouts, then SFT epochs on what is kept).

    Args:
        warmup_epochs: SFT epochs on the answers of the data set; 0 starts from the model as it is
        num_outer_loops: rounds of rollouts and SFT; 0 is plain SFT
        sft_epochs: SFT epochs on the kept replies of one outer loop
        samples_per_problem: replies sampled to each problem in an outer loop
        restart: what starts anew before the SFT of every outer loop: nothing, the optimizer, or also the weights
            (those from before the first outer loop, as in the STaR paper)
        test_after_fit: test the best checkpoint, and the weights from before the first outer loop, when fit ends
        keep_loops: keep the rollouts and validation replies of so many outer loops; older ones are deleted. null: all
        seed: seed of sampling; on the command line it is seed_everything
    """

    warmup_epochs: int = 1
    num_outer_loops: int = 10
    sft_epochs: int = 1
    samples_per_problem: int = 1
    restart: Literal["nothing", "optimizer", "weights"] = "nothing"
    test_after_fit: bool = True
    keep_loops: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in (
            ("warmup_epochs", 0),
            ("num_outer_loops", 0),
            ("sft_epochs", 1),
            ("samples_per_problem", 1),
            ("keep_loops", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"trainer.outer_loop.{name} must be at least {least}, got {value}")
        if self.warmup_epochs + self.num_outer_loops == 0:
            raise UserError("nothing to do: trainer.outer_loop.warmup_epochs and num_outer_loops are both 0")

    @property
    def epochs(self) -> int:
        return self.warmup_epochs + self.num_outer_loops * self.sft_epochs


@dataclass
class Optimizer:
    """AdamW and its learning rate.

    Args:
        lr: learning rate of the warm-up (or of plain SFT), after lr_warmup_steps
        outer_lr: learning rate of the outer loops' SFT; null: lr
        schedule: of lr over the warm-up: constant, or down to 0 linearly or as a cosine
        outer_schedule: the same of outer_lr, over the SFT of each outer loop
        lr_warmup_steps: steps from 0 to lr at the start of the warm-up
        weight_decay: on matrices; never on vectors and pause modules
        betas: AdamW's
    """

    lr: float = 5e-5
    outer_lr: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    outer_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def at(self, in_warmup: bool, step: int, steps: int) -> float:
        """The learning rate of optimiser step ``step`` (from 0) of a phase of ``steps``."""
        peak, schedule, ramp = self.lr, self.schedule, self.lr_warmup_steps
        if not in_warmup:
            peak, schedule, ramp = (self.lr if self.outer_lr is None else self.outer_lr), self.outer_schedule, 0
        if step < ramp:
            return peak * (step + 1) / ramp
        done = min(1.0, (step - ramp) / max(1, steps - ramp))
        shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return peak * shapes[schedule]
