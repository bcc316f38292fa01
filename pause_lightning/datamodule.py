"""Problems become token batches: splits, prompts, pause injection, the SFT data of an outer loop.

Lives here: ``GSM8KDataModule``. Where problems come from and how replies are graded is the task's (``tasks/``), how a
pause is injected ``pause/injection.py``'s, what rollouts teach the recipe's (``recipes/``), batches ``batches.py``'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from pause_lightning.batches import BucketBatches, PromptBatch, PromptLoader, ResumableLoader, collate, stable_seed
from pause_lightning.errors import UserError
from pause_lightning.pause.injection import PauseInjection, token_starts
from pause_lightning.recipes import Example, Recipe, STaR
from pause_lightning.rollouts.store import Rollout
from pause_lightning.tasks import GSM8K, Problem, Task, check_disjoint, dataset_hash, split_train_val
from pause_lightning.tasks.prompts import DEFAULT_PROMPT, format_prompt


@dataclass(frozen=True)
class Prompt:
    """A problem to be answered: ``ids`` is what the model sees."""

    problem: Problem
    ids: tuple[int, ...]


__all__ = ["GSM8KDataModule", "Prompt", "PromptBatch", "Unit"]


@dataclass(frozen=True)
class _Answer:
    problem: Problem
    prompt: tuple[int, ...]
    ids: list[int]
    starts: list[int]


@dataclass(frozen=True)
class Unit:
    """A fixed block of problems that is sampled, graded and stored together, whatever process does it."""

    index: int
    prompts: tuple[Prompt, ...]


class GSM8KDataModule(pl.LightningDataModule):
    """Data of the warm-up, the outer loop, validation, test and prediction.

    Args:
        task: where problems come from and how replies are graded; a class of pause_lightning.tasks or your own
        prompt_template: the prompt; {question} stands for the question
        pause_injection: pauses put into the warm-up answers as they are read; null: none
        batch_size: training examples per optimiser step and process (before gradient accumulation)
        eval_batch_size: problems per validation or test step
        val_fraction: share of the training questions held out for validation, when the task has no val split
        split_seed: seed of that split
        num_warmup_problems: the warm-up sees the answers of so many training problems; null: all. Rollouts see all
            problems, of the others the final answer only
        problems_per_loop: an outer loop samples replies to so many training problems, drawn anew; null: all
        problems_per_unit: problems sampled, graded and stored together
        recipe: what to learn from graded rollouts; default STaR
        predict_file: JSON lines with a "question" each, for predict; null: the test split
        seed: seed of injection, shuffling and drawing; on the command line it is seed_everything
    """

    def __init__(
        self,
        task: Task | None = None,
        prompt_template: str = DEFAULT_PROMPT,
        pause_injection: PauseInjection | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 42,
        num_warmup_problems: int | None = None,
        problems_per_loop: int | None = None,
        problems_per_unit: int = 64,
        recipe: Recipe | None = None,
        predict_file: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("problems_per_unit", problems_per_unit),
            ("num_warmup_problems", num_warmup_problems),
            ("problems_per_loop", problems_per_loop),
        ):
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        self.task = task or GSM8K()
        self.recipe = recipe or STaR()
        self.prompt_template, self.pause_injection = prompt_template, pause_injection
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.num_warmup_problems, self.problems_per_loop = num_warmup_problems, problems_per_loop
        self.problems_per_unit, self.predict_file, self.seed = problems_per_unit, predict_file, seed
        self.tokenizer: Any = None
        self.max_tokens: int | None = None
        self.splits: dict[str, list[Problem]] = {}
        self.outer: int | None = None
        self._train: list[Example] = []
        self._answers: dict[Any, _Answer] = {}
        # Rollouts may keep nothing: an epoch without batches is not an error.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    # ---- reading

    def setup(self, stage: str = "fit") -> None:
        """Read and split the task, once.

        Raises:
            UserError: whatever the task finds wrong with its data.
        """
        if self.splits:
            return
        if self.tokenizer is None:
            self.use(self.trainer.lightning_module.tokenizer, self.trainer.lightning_module.context_length)
        self.task.pause_token = self.tokenizer.pause_token_text
        splits = self.task.load()
        if "val" not in splits:
            splits["train"], splits["val"] = split_train_val(splits["train"], self.val_fraction, self.split_seed)
        if dropped := check_disjoint(splits):
            rank_zero_warn(f"{dropped} training problems dropped: their questions are in the test or val split too")
        for name in ("train", "val", "test"):
            if not splits.get(name):
                raise UserError(f"the {name} split of {type(self.task).__name__} is empty")
        injected = any(p.answer_ids is not None for p in splits["train"])
        if injected and self.pause_injection is not None:
            raise UserError("data.pause_injection: this data set has its pauses already; set it to null")
        if self.pause_injection is not None and self.tokenizer.pause_id is None:
            raise UserError("data.pause_injection is set, but the model has no pauses (model.pauses is false)")
        made_with = (getattr(self.task, "injection", None) or {}).get("tokenizer_sha256")
        if injected and made_with != self.tokenizer.sha256:
            raise UserError("the pauses of this data set were injected with another tokenizer: run inject again")
        self.splits = splits
        self.hash = dataset_hash(splits)

    def use(self, tokenizer: Any, max_tokens: int | None) -> None:
        """Set the tokenizer (of ``load_tokenizer``) and the longest sequence; done by the Trainer from the module."""
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    # ---- prompts and examples

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        ids = self.tokenizer(format_prompt(self.prompt_template, question))["input_ids"]
        return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids)

    def prompts(self, problems: list[Problem], split: str) -> list[Prompt]:
        """Prompts of ``problems``, each once; those that leave no room for a reply are skipped with a count.

        Raises:
            UserError: no prompt is left.
        """
        unique = list({p.id: p for p in problems}.values())
        made = [Prompt(p, self.prompt_ids(p.question)) for p in unique]
        return self._fitting(made, lambda p: len(p.ids) + 1, f"{split} prompts", quiet=split == "rollout")

    def warmup_examples(self, epoch: int) -> list[Example]:
        """The answers the warm-up trains on, with the pauses of ``epoch``."""
        problems = self.splits["train"]
        if self.num_warmup_problems is not None:
            first = set(list({p.id: None for p in problems})[: self.num_warmup_problems])
            problems = [p for p in problems if p.id in first]
        plain = [self._answer(problem) for problem in problems]
        if self.max_tokens is not None:  # decided without pauses, so that every epoch has the same examples
            fits = [len(a.prompt) + len(a.ids) + 1 <= self.max_tokens for a in plain]
            if not any(fits):
                raise UserError(f"all {len(fits)} warm-up answers are longer than the context of {self.max_tokens} tokens")
            if epoch == 0 and not all(fits):
                rank_zero_warn(f"{fits.count(False)} of {len(fits)} warm-up answers skipped: longer than the context")
            plain = [a for a, fit in zip(plain, fits) if fit]
        return [self._example(answer, index, epoch) for index, answer in enumerate(plain)]

    def _answer(self, problem: Problem) -> _Answer:
        key = (problem.id, problem.answer, problem.answer_ids)
        if key not in self._answers:
            if problem.answer_ids is None:
                ids, starts = token_starts(self.tokenizer, problem.answer)
            else:
                pause = self.tokenizer.pause_id
                ids, starts = [i for i in problem.answer_ids if pause is not None or i < len(self.tokenizer)], []
            self._answers[key] = _Answer(problem, self.prompt_ids(problem.question), ids, starts)
        return self._answers[key]

    def _example(self, answer: _Answer, index: int, epoch: int) -> Example:
        ids = answer.ids
        if self.pause_injection is not None:
            drawn = epoch if self.pause_injection.redraw else 0
            rng = random.Random(stable_seed(self.seed, "injection", drawn, index))
            ids = self.pause_injection.inject(ids, answer.problem.answer, answer.starts, self.tokenizer.pause_id, rng)
            if self.max_tokens is not None and len(answer.prompt) + len(ids) + 1 > self.max_tokens:
                ids = answer.ids  # no room for its pauses
        return Example(answer.problem.id, answer.prompt, (*ids, self.tokenizer.eos_token_id))

    def _fitting(self, items: list[Any], length: Callable[[Any], int], what: str, quiet: bool = False) -> list[Any]:
        if self.max_tokens is None:
            return items
        fitting = [item for item in items if length(item) <= self.max_tokens]
        skipped = len(items) - len(fitting)
        if items and not fitting:
            raise UserError(f"all {len(items)} {what} are longer than the model's context of {self.max_tokens} tokens")
        if skipped and not quiet:
            rank_zero_warn(f"{skipped} of {len(items)} {what} skipped: longer than the context of {self.max_tokens}")
        return fitting

    # ---- the outer loop

    def rollout_units(self, outer: int) -> list[Unit]:
        """The problems of outer loop ``outer``, in blocks defined by data and seed alone."""
        prompts = self.prompts(self.splits["train"], "rollout")
        if self.problems_per_loop is not None and self.problems_per_loop < len(prompts):
            rng = random.Random(stable_seed(self.seed, "problems", outer))
            prompts = rng.sample(prompts, self.problems_per_loop)
        size = self.problems_per_unit
        blocks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [Unit(index, tuple(block)) for index, block in enumerate(blocks)]

    def train_on_warmup(self) -> None:
        """The next ``train_dataloader`` is the warm-up's."""
        self.outer, self._train = None, self.warmup_examples(0)
        rank_zero_info(f"warm-up on {len(self._train)} answers")

    def train_on_rollouts(self, outer: int, rollouts: list[Rollout]) -> int:
        """The next ``train_dataloader`` is what the recipe keeps of ``rollouts``; returns how many examples."""
        truth = self.warmup_examples(outer + 1)
        kept = self.recipe.select(rollouts, truth, stable_seed(self.seed, "recipe", outer))
        self.outer, self._train = outer, self._fitting(kept, len, "kept replies")
        return len(self._train)

    # ---- loaders

    def train_dataloader(self) -> ResumableLoader:
        if not self._train and self.outer is None:
            self.train_on_warmup()
        trainer = self.trainer
        redraws = self.outer is None and self.pause_injection is not None and self.pause_injection.redraw
        batches = BucketBatches(
            lengths=[len(e) for e in self._train],
            batch_size=self.batch_size,
            seed=stable_seed(self.seed, "order", self.outer),
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return ResumableLoader(
            self._train,
            batches,
            collate_fn=lambda examples: collate(examples, self.tokenizer.pad_token_id),
            redraw=self.warmup_examples if redraws else None,
        )

    def val_dataloader(self) -> PromptLoader:
        return self._prompt_loader("val")

    def test_dataloader(self) -> PromptLoader:
        return self._prompt_loader("test")

    def predict_dataloader(self) -> PromptLoader:
        if self.predict_file is None:
            return self._prompt_loader("test")
        from pause_lightning.tasks.gsm8k import read_questions

        problems = read_questions(Path(self.predict_file))
        return self._loader(self.prompts(problems, "predict"))

    def _prompt_loader(self, split: str) -> PromptLoader:
        return self._loader(self.prompts(self.splits[split], split))

    def _loader(self, prompts: list[Prompt]) -> PromptLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return PromptLoader(prompts, self.eval_batch_size, rank, world)
