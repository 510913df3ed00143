"""The public objects over the native step engine."""

from .decoder import Decoder
from .engine import Engine
from .stats import StepStats, UpdateStats

__all__ = ["Decoder", "Engine", "StepStats", "UpdateStats"]
