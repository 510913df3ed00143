"""Train Llama-2 models on the Apple Neural Engine, or on any CPU, from plain Python.

Importing this package loads nothing heavy: names are imported, and the native library found, when
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOMES = {
    "AnepyError": "errors",
    "CompareConfig": "compare_config",
    "Comparison": "comparison",
    "CompileBudgetError": "errors",
    "Engine": "engine",
    "MilError": "errors",
    "Model": "model",
    "ModelConfig": "model",
    "PRESETS": "model",
    "Program": "program",
    "StepReport": "reports",
    "StepStats": "engine",
    "TokenData": "data",
    "Tokenizer": "tokenizer",
    "TrainConfig": "train_config",
    "Trainer": "trainer",
    "UpdateStats": "engine",
    "compare": "measuring",
    "devices": "device",
    "generate": "generation",
    "prepare": "data",
    "stream": "generation",
    "variants": "engine",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .compare_config import CompareConfig
    from .comparison import Comparison
    from .data import TokenData, prepare
    from .device import devices
    from .engine import Engine, StepStats, UpdateStats, variants
    from .errors import AnepyError, CompileBudgetError, MilError
    from .generation import generate, stream
    from .measuring import compare
    from .model import PRESETS, Model, ModelConfig
    from .program import Program
    from .reports import StepReport
    from .tokenizer import Tokenizer
    from .train_config import TrainConfig
    from .trainer import Trainer


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    # Importing a submodule binds its name here; `generate` must stay the function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
