"""Figures and facts in words, for every place that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def engine_text(engine: Mapping[str, Any]) -> str:
    """Describe device, instruction set, threads and precision in one line.

    Args:
        engine: these four, and perhaps `precision_note`: why "auto" took the precision.
    """
    threads = engine["threads"]
    plural = "" if threads == 1 else "s"
    text = f"{engine['device']}, {engine['isa']}, {threads} thread{plural}, {engine['precision']}"
    why = engine.get("precision_note")
    return f"{text} (chosen automatically: {why})" if why else text


def perplexity(loss: float) -> float:
    """Return e to the loss, infinite where that does not fit."""
    return math.exp(loss) if loss < 700 else math.inf


def duration(seconds: float) -> str:
    """Format a duration: 0:07, 12:34 or 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"


def milliseconds(value: float) -> str:
    """Format milliseconds with three figures or so."""
    return (
        f"{value:,.0f} ms"
        if value >= 100
        else f"{value:.1f} ms"
        if value >= 1
        else f"{value:.2f} ms"
    )


def quantity(count: int) -> str:
    """Format a large count: 109.5 M, 260 K, 12."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return (
                f"{count / limit:.3g} {unit}"
                if count < 100 * limit
                else f"{count / limit:.1f} {unit}"
            )
    return str(count)


def size(nbytes: int) -> str:
    """Format a size in bytes: 438 MB, 6.2 kB, 12 B."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            value = nbytes / limit
            return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
    return f"{nbytes} B"
