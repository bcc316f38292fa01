"""``OuterLoopTrainer``: Lightning's Trainer whose fit alternates rollouts and SFT, plus ``rollout`` (sample and store).

Lives here: the constructor's defaults and the extra stage. The loop itself is ``loops.py``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from pause_lightning.checkpoints import CheckpointFile
from pause_lightning.loops import OuterLoopLoop
from pause_lightning.schedule import OuterLoop
from pause_lightning.strategies import FSDP2Strategy


class OuterLoopTrainer(pl.Trainer):
    """A Lightning Trainer with a schedule of warm-up epochs and outer loops.

    ``max_epochs`` follows from ``outer_loop``; ``max_steps`` still ends a run early (after a last validation).

    Args:
        outer_loop: the schedule
    """

    def __init__(self, *args: Any, outer_loop: OuterLoop = OuterLoop(), **kwargs: Any) -> None:  # noqa: B008
        kwargs["max_epochs"] = outer_loop.epochs
        kwargs["use_distributed_sampler"] = False
        if kwargs.get("num_sanity_val_steps") is None:
            kwargs["num_sanity_val_steps"] = 0
        if kwargs.get("log_every_n_steps") is None:
            kwargs["log_every_n_steps"] = 10
        if kwargs.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # the freeze policy's table says more
        kwargs["plugins"] = [*_as_list(kwargs.get("plugins")), CheckpointFile()]
        if kwargs.get("strategy") == "fsdp2" or isinstance(kwargs.get("strategy"), FSDP2Strategy):
            kwargs["inference_mode"] = False  # sharded parameters cannot be gathered under it
        super().__init__(*args, **kwargs)
        self.rollout_only = False
        OuterLoopLoop.install(self, outer_loop)

    def rollout(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule, ckpt_path: str | None = None
    ) -> dict[str, float] | None:
        """Sample, grade and store replies to the training problems, without training.

        Args:
            ckpt_path: checkpoint of a run whose weights to use; null: the model as it is
        """
        self.rollout_only = True
        try:
            self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)
        finally:
            self.rollout_only = False
        return self.rollout_metrics

    def _run_stage(self) -> Any:
        if not self.rollout_only:
            return super()._run_stage()
        loop: Any = self.fit_loop
        self.rollout_metrics = loop.rollout_loop.run(0)
        return None


def _as_list(plugins: Any) -> list[Any]:
    return [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
