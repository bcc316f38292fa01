"""Batches of token ids: length buckets, padding, and loaders that can resume in the middle of an epoch.

Lives here: ``BucketBatches`` (which examples form a batch), ``ResumableLoader``, ``PromptLoader``, ``collate``,
``stable_seed``. Knows no problems and no model. Rules the loaders keep for Lightning: lightning-notes.md 1.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pause_lightning.recipes import Example

IGNORE = -100
POOL = 50


def stable_seed(*parts: object) -> int:
    """A 32-bit seed that is a function of ``parts`` alone (unlike ``hash``)."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:4], "big")


class BucketBatches:
    """Batch sampler: shuffled, similar lengths together (sorted inside pools of 50 batches), the same on every run.

    The order is a function of (seed, epoch). Each of ``world_size`` processes gets batches of the same step side by
    side; the list is filled up from its start so that all have equally many.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.skip = 0, 0

    @property
    def sampler(self) -> BucketBatches:
        """Lightning looks for ``batch_sampler.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = -(-len(self.lengths) // self.batch_size)
        return -(-batches // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = POOL * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            pooled = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
            batches += [pooled[i : i + self.batch_size] for i in range(0, len(pooled), self.batch_size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        shuffled = list(islice(cycle(shuffled), len(self) * self.world_size))  # every process gets equally many
        skip, self.skip = self.skip, 0
        yield from shuffled[self.rank :: self.world_size][skip:]


class ResumableLoader(DataLoader):
    """A DataLoader over examples that can start in the middle of an epoch (``skip``).

    ``redraw(epoch)``: makes the examples of an epoch anew (same problems, same order), for pauses drawn per epoch.
    """

    def __init__(
        self,
        examples: list[Example],
        batches: BucketBatches,
        collate_fn: Callable[[list[Example]], dict[str, Tensor]],
        redraw: Callable[[int], list[Example]] | None = None,
    ) -> None:
        self.redraw = redraw
        self.examples, self.drawn = examples, 0
        self.batches = batches
        super().__init__(examples, batch_sampler=batches, collate_fn=collate_fn)

    def skip(self, batches: int) -> None:
        """Leave out so many batches of the next epoch: they have been trained on."""
        self.batches.skip = batches

    def __iter__(self) -> Iterator[Any]:
        for number, indices in enumerate(self.batches):
            if number == 0 and self.redraw is not None and self.drawn != self.batches.epoch:
                self.examples, self.drawn = self.redraw(self.batches.epoch), self.batches.epoch
            yield self.collate_fn([self.examples[i] for i in indices])


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together. ``index``: its number among the batches of all processes."""

    index: int
    prompts: tuple[Any, ...]


class PromptLoader:
    """Batches of prompts for one process; every prompt is in one batch of one process.

    The batches do not depend on the number of processes. All processes get equally many, the last of some is empty.
    """

    def __init__(self, prompts: Sequence[Any], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        starts = range(0, len(prompts), batch_size)
        batches = [PromptBatch(i, tuple(prompts[s : s + batch_size])) for i, s in enumerate(starts)]
        batches += [PromptBatch(i, ()) for i in range(len(batches), -(-len(batches) // world_size) * world_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter(self.batches)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask, labels, each [B, T] int64; labels are -100 on prompt and padding."""
    width = max(map(len, examples))
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        prompt, end = len(example.prompt_ids), len(example)
        ids[row, :end] = torch.tensor(example.prompt_ids + example.reply_ids)
        mask[row, :end] = 1
        labels[row, prompt:end] = ids[row, prompt:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
