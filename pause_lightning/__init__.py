"""pause_lightning: train language models to pause, and expert iteration (STaR) on verifiable tasks, on Lightning.

Importing it is free (no torch, no transformers). After it, ``transformers.AutoModelForCausalLM.from_pretrained`` loads
pause models: their classes are registered the moment transformers' Auto classes are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "PauseLitModule": "pause_lightning.module",
    "GSM8KDataModule": "pause_lightning.datamodule",
    "OuterLoopTrainer": "pause_lightning.trainer",
    "OuterLoopLoop": "pause_lightning.loops",
    "FreezePolicy": "pause_lightning.pause.freeze",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pause_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Runs ``pause.config.register`` right after transformers' Auto configuration module has been imported."""

    TARGET = "transformers.models.auto.configuration_auto"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.modules[fullname] = module
            from pause_lightning.pause.config import register

            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _RegisterWithTransformers.TARGET in sys.modules:
    from pause_lightning.pause.config import register

    register()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
