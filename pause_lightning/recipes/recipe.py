"""What a recipe is: graded rollouts go in, training examples come out. Knows no model, no file, no Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pause_lightning.rollouts.store import Rollout


@dataclass(frozen=True)
class Example:
    """One training example, as ids: the loss is on ``reply_ids`` (EOS included), given ``prompt_ids``."""

    problem_id: str
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


class Recipe:
    """Base of the recipes. Subclass it in one file, and name its class path in ``data.recipe``."""

    def select(self, rollouts: Sequence[Rollout], ground_truth: Sequence[Example], seed: int) -> list[Example]:
        """The examples to train on in the SFT epochs of one outer loop.

        ``ground_truth``: the examples of the warm-up (with their pauses). Must be a function of its arguments alone.
        """
        raise NotImplementedError
