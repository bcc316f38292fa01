"""The policy as a LightningModule: which model, what trains, the loss, the optimiser, replies and their grades.

Lives here: ``PauseLitModule``. The model's parts are in ``pause/``, sampling engines in ``rollouts/``, graded replies in
``replies.py``; when each method is called is ``loops.py``'s business.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pause_lightning.batches import stable_seed
from pause_lightning.checkpoints import read_checkpoint
from pause_lightning.errors import RunStopped, UserError
from pause_lightning.metrics import ReplyMetrics
from pause_lightning.pause.freeze import FreezePolicy, LoRA, apply_policy, trainable_table
from pause_lightning.replies import count, result_row, sample_and_grade
from pause_lightning.rollouts.continuous import ContinuousSampler
from pause_lightning.rollouts.sampler import Sampler, SamplingSettings
from pause_lightning.rollouts.store import Rollout
from pause_lightning.schedule import Optimizer
from pause_lightning.strategies import FSDP2Strategy, full

if TYPE_CHECKING:
    from pause_lightning.datamodule import Prompt, PromptBatch, Unit


class PauseLitModule(pl.LightningModule):
    """A causal LM that may pause, how it is trained and how it replies.

    Args:
        path: HF folder, hub name or PEFT adapter folder of the model to start from
        from_scratch: instead of path, a new model: model_type and its HF configuration, e.g.
            {model_type: llama, hidden_size: 128, ...}
        tokenizer: HF folder or hub name; null: path. "quickstart" is the small one this package brings along
        init_from: checkpoint (.ckpt of a run) whose trained weights to start from, with a fresh optimizer
        pauses: give the model a pause token; false is the baseline without
        pause_token: text of the pause token
        head: gate: p(pause) = sigmoid(head), the rest shares 1 - p; row: one more row of the softmax
        detach_head: the loss of pausing trains the pause head alone
        init_pause_rate: p(pause) of a new gate, everywhere; null: 0.05
        freeze: which groups of parameters train
        lora: LoRA adapters; null: none
        dtype: of the frozen weights; what trains is float32
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower
        optimizer: AdamW and its learning rate
        rollout_sampling: how training replies are drawn
        eval_sampling: how validation, test and predict replies are drawn
        sampler: the engine that draws them
    """

    strict_loading = False  # checkpoints hold what trains, nothing else

    def __init__(
        self,
        path: str | None = None,
        from_scratch: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        init_from: str | None = None,
        pauses: bool = True,
        pause_token: str = "<|pause|>",
        head: Literal["gate", "row"] = "gate",
        detach_head: bool = True,
        init_pause_rate: float | None = None,
        freeze: FreezePolicy = FreezePolicy(),  # noqa: B008
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        rollout_sampling: SamplingSettings = SamplingSettings(),  # noqa: B008
        eval_sampling: SamplingSettings = SamplingSettings(temperature=0.0),  # noqa: B008
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        rollout_sampling.check("model.rollout_sampling")
        eval_sampling.check("model.eval_sampling")
        self.path, self.from_scratch, self.init_from = path, from_scratch, init_from
        self.tokenizer_path = tokenizer or path
        self.pauses, self.pause_token, self.head = pauses, pause_token, head
        self.detach_head, self.init_pause_rate = detach_head, init_pause_rate
        self.freeze_policy, self.lora, self.dtype_name = freeze, lora, dtype
        self.gradient_checkpointing, self.optimizer_settings = gradient_checkpointing, optimizer
        self.rollout_sampling, self.eval_sampling = rollout_sampling, eval_sampling
        self.sampler = sampler or ContinuousSampler()
        self.model: Any = None
        self.results: list[tuple[int, list[dict[str, Any]]]] = []  # (number of the batch, its rows)
        self.metrics_of: dict[str, dict[str, float]] = {}
        self.test_name = "test"

    # ---- the model

    @cached_property
    def tokenizer(self) -> Any:
        from pause_lightning.pause.load import load_tokenizer

        if self.tokenizer_path is None:
            raise UserError("give model.path (a HF folder or hub name), or model.from_scratch with model.tokenizer")
        return load_tokenizer(self.tokenizer_path, self.pause_token if self.pauses else None)

    @property
    def hf_model(self) -> Any:
        """The HF model itself, also under PEFT."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def context_length(self) -> int | None:
        """Most tokens the model can hold, by its configuration alone: the model need not exist yet."""
        from pause_lightning.pause.load import load_config
        from pause_lightning.pause.model import context_length

        return context_length(load_config(self.path, self.from_scratch, self.tokenizer))

    def configure_model(self) -> None:
        if self.model is not None:
            return
        strategy = self._strategy
        if isinstance(strategy, FSDP2Strategy):
            whole = self.build(weights=True) if strategy.global_rank == 0 else None  # it alone reads the base
            self.model = self.build(weights=False)
            state = {} if whole is None else whole.state_dict()
            strategy.shard(self.model, state, {} if whole is None else dict(whole.named_buffers()))
        else:
            self.model = self.build(weights=True)
        self.model.train()
        if self.init_from is not None:
            self.load_trained(self.init_from)

    def build(self, weights: bool) -> Any:
        """The policy under its freeze policy. Without ``weights`` on the meta device: shapes only."""
        from pause_lightning.pause.load import load_model

        model = load_model(
            path=self.path,
            from_scratch=self.from_scratch,
            tokenizer=self.tokenizer,
            dtype=getattr(torch, self.dtype_name),
            pause_token=self.pause_token,
            head=self.head,
            detach_head=self.detach_head,
            init_pause_rate=self.init_pause_rate,
            lora=self.lora,
            weights=weights,
        )
        apply_policy(model, self.freeze_policy)
        if self.gradient_checkpointing:
            hf = model.get_base_model() if hasattr(model, "get_base_model") else model
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    @property
    def _strategy(self) -> Any:
        return None if self._trainer is None else self._trainer.strategy

    def on_fit_start(self) -> None:
        table = trainable_table(self.model)
        say(table)
        for logger in self.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):
                experiment.add_text("model/trains", f"```\n{table}\n```")
            elif hasattr(experiment, "summary") and rank_zero_only.rank == 0:
                experiment.summary["model/trains"] = table

    # ---- SFT

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout of a step is a function of (seed, process, step), so that a resumed run repeats it exactly.
        torch.manual_seed(stable_seed("step", self._seed, self.global_rank, self.trainer.fit_loop.total_batch_idx))
        progress = getattr(self.trainer.fit_loop, "phase_progress", None)
        in_warmup, step, steps = (
            progress() if progress else (True, self.global_step, int(self.trainer.estimated_stepping_batches))
        )
        rate = self.optimizer_settings.at(in_warmup, step, steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Prompts are not tensors; the sampler moves what it needs.
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if isinstance(batch, dict) else batch

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        lm_nll, pause_nll, lm_labels, labels = self.hf_model.reply_loss_terms(**batch)
        sums = torch.stack([lm_nll.detach(), pause_nll.detach(), lm_labels, labels]).double()
        world = self.trainer.world_size
        if world > 1:
            torch.distributed.all_reduce(sums)
        lm, pause, num_lm, num = sums.tolist()
        # The mean over the labels of all processes; the strategy averages gradients over processes.
        loss = (pause_nll + lm_nll) / num * world if world > 1 else (pause_nll + lm_nll) / num
        if not torch.isfinite(sums).all():
            raise RunStopped(
                f"the loss is {(lm + pause) / num} at step {self.global_step}: stopped before the weights are touched; "
                f"the checkpoints in {Path(self.trainer.default_root_dir) / 'checkpoints'} are from before. "
                "Lower model.optimizer.lr or set trainer.gradient_clip_val"
            )
        self.log("train/loss", (lm + pause) / num, prog_bar=True)
        self.log("train/lm_loss", lm / max(num_lm, 1))
        self.log("train/pause_loss", pause / num)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return {"loss": loss, "mean_loss": (lm + pause) / num}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.optimizer_settings
        decayed: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim < 2 or "pause_" in name else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": s.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        # Lightning does not clip the gradients of a fused optimizer under mixed precision.
        fused = "mixed" not in str(self.trainer.precision)
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=s.lr, betas=s.betas, fused=fused)

    @property
    def _seed(self) -> int:
        return getattr(getattr(self.trainer, "datamodule", None), "seed", 0)

    # ---- replies

    @property
    def in_step(self) -> bool:
        """Whether all processes must generate side by side, as the weights of each step are gathered from all."""
        return bool(getattr(self._strategy, "generate_sharded", False))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around every phase that samples replies: eval mode, and weights in place (FSDP2)."""
        was_training = self.training
        self.eval()
        precision = self.trainer.precision_plugin.forward_context()  # Lightning enters it for its own steps only
        with getattr(self._strategy, "whole_weights", nullcontext)(), precision:
            try:
                yield
            finally:
                self.train(was_training)

    def reply(
        self,
        prompts: list[Prompt],
        settings: SamplingSettings,
        seed: int,
        samples: int = 1,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Sample ``samples`` replies to each prompt and grade them; the fields of ``Rollout`` but unit, place and seed."""
        if not prompts and not self.in_step:
            return []
        grade = self.trainer.datamodule.task.grade
        more = {"in_step": True} if self.in_step else {}
        if more and "in_step" not in inspect.signature(self.sampler.sample).parameters:
            raise UserError(
                f"trainer.strategy.generate_sharded: {type(self.sampler).__name__} cannot generate in step; use "
                "--model.sampler pause_lightning.rollouts.hf.HFSampler"
            )
        return sample_and_grade(
            self.hf_model, self.sampler, self.tokenizer, grade, prompts, settings, seed, samples, on_progress, **more
        )

    def rollout_unit(
        self, unit: Unit | None, samples: int, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """The graded replies of one block of problems; a function of (weights, unit, samples, seed).

        None: only generate in step with the other processes.
        """
        prompts = [] if unit is None else list(unit.prompts)
        graded = self.reply(prompts, self.rollout_sampling, seed, samples, on_progress)
        number = -1 if unit is None else unit.index
        return [Rollout(unit=number, unit_size=len(graded), place=i, seed=seed, **g) for i, g in enumerate(graded)]

    def policy_fingerprint(self) -> str:
        """sha256 of what trains (the rest is named by the configuration)."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                digest.update(name.encode())
                whole = full(parameter.detach()).float().cpu().contiguous()
                digest.update(whole.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ---- validation, test, predict

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def on_predict_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_name)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        graded = self._graded(batch, "predict")
        rows = [
            {"question": p.problem.question, "reply": g["text"], "answer": g["answer"], "pauses": g["pauses"]}
            for p, g in zip(batch.prompts, graded)
        ]
        self.results.append((batch.index, rows))
        return graded

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation(self.test_name)

    def on_predict_epoch_end(self) -> None:
        self._generating.close()

    def _start_evaluation(self) -> None:
        # `measured` is shown while it grows by a callback
        self.results, self.measured = [], ReplyMetrics().to(self.device)
        self._generating = ExitStack()
        self._generating.enter_context(self.generating())

    def _graded(self, batch: PromptBatch, name: str) -> list[dict[str, Any]]:
        seed = stable_seed(self._seed, name, batch.index)
        stop = None if self.in_step else getattr(self.trainer, "stop", None)  # a stock Trainer may validate and test, too
        graded = self.reply(list(batch.prompts), self.eval_sampling, seed, on_progress=stop and stop.check)
        if stop:
            stop.check()
        return graded

    def _evaluate(self, batch: PromptBatch, name: str) -> None:
        graded = self._graded(batch, name)
        for g in graded:
            count(self.measured, g)
        rows = [result_row(name, p.problem, g, self.tokenizer) for p, g in zip(batch.prompts, graded)]
        self.results.append((batch.index, rows))

    def _finish_evaluation(self, name: str) -> None:
        self._generating.close()
        metrics = self.measured.compute()
        self.metrics_of[name] = metrics
        # computed over all processes already
        self.log_dict({f"{name}/{k}": v for k, v in metrics.items()}, rank_zero_only=False)

    # ---- checkpoints: what trains, nothing else

    def trained_state(self) -> dict[str, torch.Tensor]:
        names = {f"model.{n}" for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self.trained_state()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_same_model(checkpoint["state_dict"], "the checkpoint")

    def load_trained(self, path: str | Path) -> None:
        """Load the trained weights of a checkpoint of ours, and nothing else of it.

        Raises:
            UserError: no such file, damaged, not a checkpoint, or one of another model.
        """
        state = read_checkpoint(Path(path), "model.init_from" if path == self.init_from else "the checkpoint")["state_dict"]
        self._check_same_model(state, str(path))
        if isinstance(self._strategy, FSDP2Strategy):
            self._strategy.load_weights(state)
        else:
            self.load_state_dict(state, strict=False)

    def _check_same_model(self, state: dict[str, torch.Tensor], source: str) -> None:
        own = self.trained_state()
        missing, unknown = own.keys() - state.keys(), state.keys() - self.state_dict().keys()
        shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape of", shapes)):
            if names:
                raise UserError(
                    f"{source} is of another model: it {what} {sorted(names)[0]} ({len(names)} in all); "
                    "use the model and freeze settings it was made with (config.yaml of its run)"
                )


def say(text: str) -> None:
    """A line for the person at the terminal, from the first process only."""
    if rank_zero_only.rank == 0:
        print(text, file=sys.stdout, flush=True)
