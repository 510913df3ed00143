"""Train Llama-2 models on the Apple Neural Engine, or on any CPU, from plain Python.

Importing this package loads nothing heavy: names are imported, and the native library found, when
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOMES = {
    "AnepyError": "errors",
    "CompareConfig": "comparing.config",
    "Comparison": "comparing.result",
    "CompileBudgetError": "errors",
    "Engine": "engine.engine",
    "MilError": "errors",
    "Model": "models.model",
    "ModelConfig": "models.model",
    "PRESETS": "models.model",
    "Program": "hardware.program",
    "RopeScaling": "models.model",
    "StepReport": "training.reports",
    "StepStats": "engine.stats",
    "TokenData": "text.data",
    "Tokenizer": "text.tokenizer",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "UpdateStats": "engine.stats",
    "compare": "comparing.session",
    "devices": "engine.device",
    "generate": "text.generation",
    "prepare": "text.prepare",
    "stream": "text.generation",
    "variants": "engine.variants",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .comparing.config import CompareConfig
    from .comparing.result import Comparison
    from .comparing.session import compare
    from .engine.device import devices
    from .engine.engine import Engine
    from .engine.stats import StepStats, UpdateStats
    from .engine.variants import variants
    from .errors import AnepyError, CompileBudgetError, MilError
    from .hardware.program import Program
    from .models.model import PRESETS, Model, ModelConfig, RopeScaling
    from .text.data import TokenData
    from .text.generation import generate, stream
    from .text.prepare import prepare
    from .text.tokenizer import Tokenizer
    from .training.config import TrainConfig
    from .training.reports import StepReport
    from .training.trainer import Trainer


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
