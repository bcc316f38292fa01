"""The HF configuration of a pause model, and the registration with transformers' Auto classes.

Lives here: ``PauseConfig``, the one ``model_type`` ("pause") that every pause model has on disk. Its ``config.json``
is that of the base architecture plus ``base_model_type`` and the pause fields, so reading one picks the architecture
and makes (and registers) its classes on demand, for any architecture transformers knows. Registered as soon as
transformers' Auto classes are imported (``pause_lightning/__init__.py``).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

MODEL_TYPE = "pause"


class PauseConfig(PretrainedConfig):
    """Reads the ``config.json`` of a pause model into the pause configuration of its architecture."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not PauseConfig:
            return super().from_dict(config_dict, **kwargs)
        if "base_model_type" not in config_dict:
            raise ValueError("config.json has model_type 'pause' but no 'base_model_type'")
        from pause_lightning.pause.model import pause_classes

        config_class, _ = pause_classes(config_dict["base_model_type"])
        return config_class.from_dict(config_dict, **kwargs)


def register() -> None:
    """Make ``AutoConfig`` know pause models. Idempotent."""
    AutoConfig.register(MODEL_TYPE, PauseConfig, exist_ok=True)
