"""What several processes have to agree on, and how they share work.

Lives here: ``first_decides`` (before Lightning has connected them), ``any_of`` and ``gather`` (afterwards), ``WorkQueue``
(who takes which unit). Everything is a no-op with one process. Knows no run, no model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
DECISION = "PAUSE_LIGHTNING_DECISION"
_PATIENCE = timedelta(minutes=30)


def rank() -> int:
    """The number of this process among all of the run; 0 is the first. Known before Lightning starts."""
    in_slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    for name in ("RANK", "SLURM_PROCID" if in_slurm else "RANK", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def expected(accelerator: str, devices: Any, num_nodes: int) -> int:
    """How many processes a run will have, by its settings and who starts it."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(name, 1)) > 1:
            return int(os.environ[name])
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, (list, tuple)):
        return len(devices) * num_nodes
    if isinstance(devices, int) and devices >= 0:
        return max(devices, 1) * num_nodes
    import torch

    here = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 1
    return max(here, 1) * num_nodes


def first_decides(decide: Callable[[], Any]) -> Any:
    """What ``decide`` returns (JSON) in the first process, in all of them; the others do not call it.

    Processes that Lightning starts inherit it through the environment; those of torchrun and SLURM ask the first one.
    """
    if DECISION in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return json.loads(os.environ[DECISION])
    environment = _started_from_outside()
    if environment is None:
        decision = decide()
        os.environ[DECISION] = json.dumps(decision)
        return decision
    import torch.distributed as dist

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    names = {"RANK": environment.global_rank(), "WORLD_SIZE": environment.world_size()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(value) for name, value in names.items()})
    store, me, _ = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
    key = f"{DECISION}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
    if me == 0:
        try:
            decision = decide()
        except BaseException as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        store.set(key, json.dumps({"decision": decision}))
    told = json.loads(store.get(key))
    if "error" in told:
        raise SystemExit(2)  # the first process has said why
    _keep.append(store)  # the first process serves it until all are connected
    return told["decision"]


_keep: list[Any] = []


def first_has_ended(seconds: float = 30.0) -> bool:
    """In another process than the first: wait for it to end, and say what it has to say; False if it goes on.

    Lightning kills the first process when one that it started ends before it.
    """
    parent, until = os.getppid(), time.monotonic() + seconds
    while DECISION in os.environ and os.getppid() == parent:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _started_from_outside() -> Any:
    """The cluster environment, when another program has started several processes of this run."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            environment: Any = kind()
            return environment if environment.world_size() > 1 else None
    return None


def any_of(trainer: Any, *flags: bool) -> list[bool]:
    """For each flag, whether any process has it set. All processes call this at the same point."""
    if trainer.world_size == 1:
        return list(flags)
    import torch
    import torch.distributed as dist

    votes = torch.tensor(flags, dtype=torch.int32, device=trainer.strategy.root_device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(v) for v in votes.tolist()]


def gather(trainer: Any, rows: list[T]) -> list[T]:
    """The rows of all processes, process by process."""
    if trainer.world_size == 1:
        return rows
    import torch.distributed as dist

    parts: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


class WorkQueue:
    """Deals ``items`` out to the processes: whoever is free takes the next one, so nobody waits for a slow one.

    Which process takes an item must not matter for its result. ``in_step``: for engines in which all processes must
    work side by side: equal turns for all, filled up with None.
    """

    _opened = 0

    def __init__(self, trainer: Any, items: Sequence[T], in_step: bool = False) -> None:
        self.trainer, self.items, self.in_step = trainer, items, in_step
        WorkQueue._opened += 1
        self.key = f"pause_lightning/queue/{WorkQueue._opened}"

    def __iter__(self) -> Iterator[Any]:
        size, me = self.trainer.world_size, self.trainer.global_rank
        if size == 1:
            yield from self.items
        elif self.in_step:
            for start in range(0, len(self.items), size):
                yield self.items[start + me] if start + me < len(self.items) else None
        else:
            from torch.distributed.distributed_c10d import _get_default_store

            store = _get_default_store()
            while (taken := store.add(self.key, 1) - 1) < len(self.items):
                yield self.items[taken]
