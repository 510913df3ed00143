"""The public objects over the native step engine."""

from .engine import (
    Decoder,
    Engine,
    StepStats,
    UpdateStats,
    library_info,
    switch_names,
    variant_switches,
)

__all__ = [
    "Decoder",
    "Engine",
    "StepStats",
    "UpdateStats",
    "library_info",
    "switch_names",
    "variant_switches",
]
