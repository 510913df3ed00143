"""Train models of the Llama family from plain Python, on the Apple Neural Engine or any CPU.

Importing this package loads nothing heavy: names are imported, and the native library found, when
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .system.version import __version__

_HOMES = {
    "AbiMismatchError": "errors",
    "AnepyError": "errors",
    "BusyError": "errors",
    "CheckpointError": "errors",
    "ChecksumError": "errors",
    "ClosedError": "errors",
    "CompareConfig": "comparing.config",
    "Comparison": "comparing.result",
    "CompileBudgetError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Decoder": "engine.decoder",
    "DeviceInfo": "engine.device",
    "DivergedError": "errors",
    "DownloadError": "errors",
    "Engine": "engine.engine",
    "LibraryBuildError": "errors",
    "LibraryNotFoundError": "errors",
    "Lora": "models.lora",
    "Measured": "comparing.result",
    "MilError": "errors",
    "Model": "models.model",
    "ModelConfig": "models.model",
    "ModelError": "errors",
    "NativeError": "errors",
    "OfflineError": "errors",
    "PHASES": "engine.stats",
    "PRESETS": "models.model",
    "PieceTokenizer": "text.tokenizer_pieces",
    "Program": "hardware.program",
    "Progress": "comparing.session",
    "Ranks": "training.ranks",
    "Ratio": "comparing.estimates",
    "Sampler": "text.data",
    "RopeScaling": "models.model",
    "StepReport": "training.reports",
    "StepStats": "engine.stats",
    "Summary": "training.reports",
    "TokenData": "text.data",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "errors",
    "TrainConfig": "training.config",
    "Traffic": "training.reports",
    "Trainer": "training.trainer",
    "UnsupportedError": "errors",
    "UnsupportedPlatformError": "errors",
    "UpdateStats": "engine.stats",
    "compare": "comparing.session",
    "devices": "engine.device",
    "flops_per_step": "engine.flops",
    "generate": "text.generation",
    "library_info": "native.info",
    "prepare": "text.prepare",
    "stream": "text.generation",
    "variant_switches": "engine.variants",
    "variants": "engine.variants",
    "windows": "text.data",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .comparing.config import CompareConfig
    from .comparing.estimates import Ratio
    from .comparing.result import Comparison, Measured
    from .comparing.session import Progress, compare
    from .engine.decoder import Decoder
    from .engine.device import DeviceInfo, devices
    from .engine.engine import Engine
    from .engine.flops import flops_per_step
    from .engine.stats import PHASES, StepStats, UpdateStats
    from .engine.variants import variant_switches, variants
    from .errors import (
        AbiMismatchError,
        AnepyError,
        BusyError,
        CheckpointError,
        ChecksumError,
        ClosedError,
        CompileBudgetError,
        ConfigError,
        DataError,
        DivergedError,
        DownloadError,
        LibraryBuildError,
        LibraryNotFoundError,
        MilError,
        ModelError,
        NativeError,
        OfflineError,
        TokenizerError,
        UnsupportedError,
        UnsupportedPlatformError,
    )
    from .hardware.program import Program
    from .models.lora import Lora
    from .models.model import PRESETS, Model, ModelConfig, RopeScaling
    from .native.info import library_info
    from .text.data import Sampler, TokenData, windows
    from .text.generation import generate, stream
    from .text.prepare import prepare
    from .text.tokenizer import Tokenizer
    from .text.tokenizer_pieces import PieceTokenizer
    from .training.config import TrainConfig
    from .training.ranks import Ranks
    from .training.reports import StepReport, Summary, Traffic
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
