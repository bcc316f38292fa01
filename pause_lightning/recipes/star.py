"""STaR (Zelikman et al. 2022; reference.md 4.2): train on one's own replies that reached the right answer.

Unlike the reference, a reply that was cut off before its EOS is never kept (its defect 7).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from pause_lightning.errors import UserError
from pause_lightning.recipes.recipe import Example, Recipe
from pause_lightning.rollouts.store import Rollout


class STaR(Recipe):
    """Keep correct, finished replies.

    Args:
        max_per_problem: keep at most so many replies of a problem, drawn at random; null keeps all
        distinct: drop a reply that has the same ids as another one to the same problem
        ground_truth: add warm-up examples, so many per kept reply (0.5: one for every two)
    """

    def __init__(self, max_per_problem: int | None = None, distinct: bool = False, ground_truth: float = 0.0) -> None:
        if max_per_problem is not None and max_per_problem < 1:
            raise UserError(f"data.recipe.max_per_problem must be at least 1, got {max_per_problem}")
        if ground_truth < 0:
            raise UserError(f"data.recipe.ground_truth must not be negative, got {ground_truth}")
        self.max_per_problem, self.distinct, self.ground_truth = max_per_problem, distinct, ground_truth

    def select(self, rollouts: Sequence[Rollout], ground_truth: Sequence[Example], seed: int) -> list[Example]:
        rng = random.Random(seed)
        by_problem: dict[str, list[Example]] = defaultdict(list)
        for rollout in rollouts:
            if rollout.correct and rollout.finish_reason == "eos":
                example = Example(rollout.problem_id, tuple(rollout.prompt_ids), tuple(rollout.reply_ids))
                if not (self.distinct and example in by_problem[rollout.problem_id]):
                    by_problem[rollout.problem_id].append(example)
        kept: list[Example] = []
        for examples in by_problem.values():
            if self.max_per_problem is not None and len(examples) > self.max_per_problem:
                examples = rng.sample(examples, self.max_per_problem)
            kept += examples
        if ground_truth and kept and self.ground_truth:
            wanted = round(self.ground_truth * len(kept))
            rounds, rest = divmod(wanted, len(ground_truth))
            kept += [*ground_truth] * rounds + rng.sample(list(ground_truth), rest)
        return kept
