"""The policy as a LightningModule: which model, what trains, the loss, the optimiser, replies and their grades.

Lives here: ``PauseLitModule`` and ``Optimizer`` (settings). The model's parts are in ``pause/``, sampling engines in
``rollouts/``, grading in ``tasks/``; when each method is called is ``loops.py``'s business.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pause_lightning.batches import stable_seed
from pause_lightning.errors import RunStopped, UserError
from pause_lightning.metrics import ReplyMetrics
from pause_lightning.pause.freeze import FreezePolicy, LoRA, apply_policy, trainable_table
from pause_lightning.rollouts.hf import HFSampler
from pause_lightning.rollouts.sampler import Sampler, SamplingSettings
from pause_lightning.rollouts.store import Rollout

if TYPE_CHECKING:
    from pause_lightning.datamodule import Prompt, Unit


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
        self.sampler = sampler or HFSampler()
        self.model: Any = None
        self.results: list[dict[str, Any]] = []
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
        from pause_lightning.pause.model import context_length

        self.configure_model()
        return context_length(self.hf_model.config)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from pause_lightning.pause.load import load_model

        self.model = load_model(
            path=self.path,
            from_scratch=self.from_scratch,
            tokenizer=self.tokenizer,
            dtype=getattr(torch, self.dtype_name),
            pause_token=self.pause_token,
            head=self.head,
            detach_head=self.detach_head,
            init_pause_rate=self.init_pause_rate,
            lora=self.lora,
        )
        apply_policy(self.model, self.freeze_policy)
        if self.gradient_checkpointing:
            self.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        if self.init_from is not None:
            self.load_trained(self.init_from)

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

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        from pause_lightning.pause.model import reply_loss

        loss = reply_loss(self.hf_model, **batch)
        if not torch.isfinite(loss.loss):
            raise RunStopped(
                f"the loss is {loss.loss.item()} at step {self.global_step}: stopped before the weights are touched; "
                f"the checkpoints in {Path(self.trainer.default_root_dir) / 'checkpoints'} are from before. "
                "Lower model.optimizer.lr or set trainer.gradient_clip_val"
            )
        self.log("train/loss", loss.loss.detach(), prog_bar=True)
        self.log("train/lm_loss", loss.lm_loss)
        self.log("train/pause_loss", loss.pause_loss)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss.loss

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

    def reply(
        self,
        prompts: list[Prompt],
        settings: SamplingSettings,
        seed: int,
        samples: int = 1,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Sample ``samples`` replies to each prompt and grade them; the fields of ``Rollout`` but unit and seed."""
        repeated = [p for p in prompts for _ in range(samples)]
        replies = self.sampler.sample(
            self.hf_model,
            [p.ids for p in repeated],
            settings,
            seed,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            on_progress=on_progress,
        )
        silent = {self.tokenizer.pause_id, self.tokenizer.eos_token_id}
        graded = []
        for i, (prompt, reply) in enumerate(zip(repeated, replies)):
            spoken = self.tokenizer.decode([t for t in reply.ids if t not in silent])
            grade = self.trainer.datamodule.task.grade(spoken, prompt.problem.answer)
            graded.append(
                {
                    "problem_id": prompt.problem.id,
                    "sample": i % samples,
                    "prompt_ids": list(prompt.ids),
                    "reply_ids": reply.ids,
                    "text": self.tokenizer.decode(reply.ids),
                    "answer": grade.answer,
                    "reward": grade.reward,
                    "correct": grade.correct,
                    "reference_correct": grade.reference_correct,
                    "pauses": reply.ids.count(self.tokenizer.pause_id),
                    "finish_reason": reply.finish_reason,
                    "logprobs": [round(p, 5) for p in reply.logprobs],
                }
            )
        return graded

    def rollout_unit(
        self, unit: Unit, samples: int, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """The graded replies of one block of problems; a function of (weights, unit, samples, seed)."""
        graded = self.reply(list(unit.prompts), self.rollout_sampling, seed, samples, on_progress)
        return [Rollout(unit=unit.index, unit_size=len(graded), seed=seed, **fields) for fields in graded]

    def policy_fingerprint(self) -> str:
        """sha256 of what trains (the rest is named by the configuration)."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ---- validation, test, predict

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def on_predict_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.test_name)

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        graded = self.reply(batch, self.eval_sampling, stable_seed(self._seed, "predict", self.global_rank, batch_idx))
        self.results += [
            {"question": p.problem.question, "reply": g["text"], "answer": g["answer"], "pauses": g["pauses"]}
            for p, g in zip(batch, graded)
        ]
        return graded

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation(self.test_name)

    def _start_evaluation(self) -> None:
        self.results, self.measured = [], ReplyMetrics().to(self.device)
        # progress and the finished line are a callback's; it reads `measured`

    def _evaluate(self, batch: list[Prompt], batch_idx: int, name: str) -> None:
        graded = self.reply(batch, self.eval_sampling, stable_seed(self._seed, name, self.global_rank, batch_idx))
        for prompt, g in zip(batch, graded):
            self.measured.update(
                correct=g["correct"],
                reference_correct=g["reference_correct"],
                pauses=g["pauses"],
                tokens=len(g["reply_ids"]),
                finished=g["finish_reason"] == "eos",
                answered=g["answer"] is not None,
            )
            prompt_text = self.tokenizer.decode(g["prompt_ids"])
            # The schema of reference.md 5, plus pauses, finish_reason, the answer and the reference rule's verdict.
            self.results.append(
                {
                    "problem_id": g["problem_id"],
                    "generated_text": prompt_text + g["text"],
                    "tokenized_text": g["prompt_ids"] + g["reply_ids"],
                    "input": prompt.problem.question,
                    "predicted_output": g["text"],
                    "ground_truth": prompt.problem.answer + self.tokenizer.eos_token,
                    f"{name}/accuracy": g["correct"],
                    f"{name}/reference_accuracy": g["reference_correct"],
                    "answer": g["answer"],
                    "pauses": g["pauses"],
                    "finish_reason": g["finish_reason"],
                }
            )

    def _finish_evaluation(self, name: str) -> None:
        metrics = self.measured.compute()
        self.metrics_of = {**getattr(self, "metrics_of", {}), name: metrics}
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
            UserError: no such file, not a checkpoint, or one of another model.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except FileNotFoundError:
            raise UserError(f"no checkpoint {path}") from None
        except Exception as error:
            raise UserError(f"{path} is no checkpoint of ours: {type(error).__name__}") from None
        self._check_same_model(state, str(path))
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
