"""``--trainer.strategy fsdp2``: parameters, gradients and optimizer states sharded over the processes (FSDP2).

Lives here: ``FSDP2Strategy`` and how it shards, gathers and generates. CPU (gloo) is tested; CUDA (NCCL) runs the same
code and is untested by us. Measured facts and traps: lightning-notes.md 2. A checkpoint written here has the format of
every other strategy, so a run may go on with another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn


class FSDP2Strategy(ModelParallelStrategy):
    """Pure data-parallel sharding of the module's HF model, layer by layer, one checkpoint file from the first process.

    Args:
        generate_sharded: for models that do not fit into one device's memory: weights stay sharded while replies are
            sampled, all processes step side by side (slow). Otherwise weights are gathered once per phase
        cpu_offload: keep the shards in CPU memory, bring a layer at a time to the device
        timeout_minutes: how long a process waits for the others; rollouts count, so not below the time of one unit
    """

    def __init__(self, generate_sharded: bool = False, cpu_offload: bool = False, timeout_minutes: float = 60.0) -> None:
        from datetime import timedelta

        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            # offloaded shards are gathered and reduced on the CPU
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.generate_sharded, self.cpu_offload = generate_sharded, cpu_offload

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # ---- sharding

    def shard(self, model: Any, weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """Shard ``model`` (a HF or PEFT model on the meta device) in place and fill it with the first process's weights.

        ``weights`` (its state dict) and ``buffers`` (those no state dict holds) are read on the first process only.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        hf = model.get_base_model() if hasattr(model, "get_base_model") else model
        policy = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        settings: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "offload_policy": policy}
        for layer in decoder_layers(hf):
            fully_shard(layer, **settings)
        # The HF model itself is the root, not PEFT's wrapper: generate() bypasses the wrapper's forward.
        fully_shard(hf, **settings)
        register_fsdp_forward_method(hf, "reply_loss_terms")
        model.to_empty(device="cpu" if self.cpu_offload else self.root_device)
        hf.tie_weights()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, weights, options=options)
        for name, buffer in model.named_buffers():
            if self.global_rank == 0:
                buffer.copy_(buffers[name])
            torch.distributed.broadcast(buffer, 0)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """While it is open every process holds all weights, so that each can generate at its own pace."""
        from torch.distributed.fsdp import FSDPModule

        assert self.model is not None
        modules: list[Any] = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        if self.generate_sharded or not modules:
            yield
            return
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for i, module in enumerate(modules):
                module.reshard()
                module.set_reshard_after_forward(i != 0, recurse=False)

    # ---- checkpoints: whole tensors, in the format of an unsharded run

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, gathered; on the first process only (the others get an empty dictionary)."""
        assert self.lightning_module is not None
        trained = {name for name, p in self.lightning_module.named_parameters(remove_duplicate=False) if p.requires_grad}
        return self.gather({k: v for k, v in self.lightning_module.state_dict().items() if k in trained})

    def gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors on the CPU, one after the other; on the first process only. All processes must call it."""
        whole: dict[str, Any] = {}
        for name, value in state.items():
            tensor = full(value)
            if self.global_rank == 0:
                whole[name] = tensor.cpu() if isinstance(tensor, Tensor) else tensor
        return whole

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.load_weights(checkpoint["state_dict"])

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy whole tensors into the sharded module."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, value in state.items():
            own[name].copy_(like(value, own[name]))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        whole = {index: {k: full(v) for k, v in entry.items()} for index, entry in state["state"].items()}
        moved = {i: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in e.items()} for i, e in whole.items()}
        return {**state, "state": moved} if self.global_rank == 0 else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            sharded = {
                index: {k: like(v, parameters[index]) if k != "step" else v for k, v in entry.items()}
                for index, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})


def full(value: Any) -> Any:
    """A DTensor as a whole tensor (a collective); anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like(value: Tensor, own: Any) -> Any:
    """A whole tensor as ``own`` is kept: sharded, if that is a DTensor."""
    if not hasattr(own, "device_mesh"):
        return value.to(own.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def decoder_layers(hf: Any) -> list[nn.Module]:
    """The repeated blocks of a HF causal LM: its longest ModuleList."""
    lists = [m for m in hf.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=lambda m: (len(m), math.fsum(p.numel() for p in m.parameters())), default=None)
    return [] if longest is None else list(longest)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 on torch's fully_shard")
