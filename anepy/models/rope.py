"""Rotary angles in files: the base of llama2.c's tables, the factors of GGUF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Llama 3.1's own numbers, which most files were made with that hold only what follows from them.
_LLAMA3, _LENGTH = (1.0, 4.0), 8192


def unscaled(theta: float, width: int) -> Array:
    """Return theta^(-2i / width) for each pair i."""
    return np.power(theta, -np.arange(0, width, 2, dtype=np.float64) / width)


def divisors(theta: float, width: int, scaling: Mapping[str, Any]) -> Array:
    """Return by what scaling "llama3" divides the frequency of each pair, (width / 2,).

    Pairs that turn at least `high_freq_factor` times within `original_max_position_embeddings`
    keep their frequency, those that turn at most `low_freq_factor` times are divided by `factor`,
    and between the kept share is linear in the turns (Meta's llama-models, Llama 3.1).
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = unscaled(theta, width) * scaling["original_max_position_embeddings"] / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    found: Array = 1.0 / (kept + (1.0 - kept) / scaling["factor"])
    return found


def scaling_of(found: Array, theta: float, length: int | None = None) -> dict[str, Any] | None:
    """Find the scaling whose `divisors` these are; its numbers need not be those of the maker.

    Args:
        found: (width / 2,), as GGUF's `rope_freqs.weight`.
        theta: the base.
        length: `original_max_position_embeddings`, if known.

    Raises:
        ValueError: no scaling of Llama 3's kind, nor a linear one, gives them.
    """
    slowest = float(found.max())
    if not (np.isfinite(found).all() and found.min() > 0.0):
        raise ValueError("they are not positive numbers")
    if _same(found, np.full_like(found, slowest)):
        return None if slowest == 1.0 else {"rope_type": "linear", "factor": slowest}
    if slowest > 1.0:
        plain = unscaled(theta, 2 * len(found))
        fitted = _bounds(plain, found, slowest, length or _LENGTH)
        short = (float(f"{fitted[0]:.4g}"), float(f"{fitted[1]:.4g}"))
        for low, high in (_LLAMA3, short, fitted):
            scaling = {
                "rope_type": "llama3",
                "factor": slowest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length or _LENGTH,
            }
            if low < high and _same(divisors(theta, 2 * len(found), scaling), found):
                return scaling
    raise ValueError("no linear scaling and none of Llama 3's kind gives them")


def _same(a: Array, b: Array) -> bool:
    # Files hold float32, some computed in float32.
    return bool(np.allclose(a, b, rtol=1e-5, atol=0.0))


def _bounds(plain: Array, found: Array, slowest: float, length: int) -> tuple[float, float]:
    """Fit the turns where scaling begins and ends: 1 / divisor is linear in them between."""
    kept = (1.0 / found - 1.0 / slowest) / (1.0 - 1.0 / slowest)
    between = (kept > 1e-5) & (kept < 1.0 - 1e-5)
    below, above = plain[kept <= 1e-5].max(), plain[kept >= 1.0 - 1e-5].min(initial=math.inf)
    if between.sum() >= 2:
        slope, start = np.polyfit(plain[between], kept[between], 1)
        below, above = -start / slope, (1.0 - start) / slope
    elif between.sum() == 1:
        at, share = float(plain[between][0]), float(kept[between][0])
        end = below + (at - below) / share
        if end > above:
            below = (at - share * above) / (1.0 - share)
        above = min(above, end)
    turns = length / (2 * math.pi)
    return float(below * turns), float(above * turns)


def theta_of(cosines: npt.NDArray[Any], sines: npt.NDArray[Any]) -> float:
    """Find the base of cosine and sine tables, as in llama2.c's version 0.

    Args:
        cosines: (positions, head_dim / 2).
        sines: of the same shape.

    Returns:
        the base; 10,000 if so few numbers do not tell.

    Raises:
        ValueError: they are of no base.
    """
    positions, pairs = cosines.shape
    theta = 10000.0
    if positions > 1 and pairs > 1 and not _tables_fit(cosines, sines, theta):
        angles = np.arctan2(sines[1], cosines[1]).astype(np.float64)
        if not (np.isfinite(angles).all() and angles.min() > 0.0):
            raise ValueError("they are of no base")
        # The slowest pair has the longest lever.
        exact = float(angles[-1] ** (-pairs / (pairs - 1)))
        theta = next(
            (
                t
                for t in (float(f"{exact:.{n}g}") for n in range(1, 9))
                if abs(t / exact - 1) < 1e-6
            ),
            exact,
        )
    if not _tables_fit(cosines, sines, theta):
        raise ValueError("they are of no base")
    return theta


def _tables_fit(cosines: npt.NDArray[Any], sines: npt.NDArray[Any], theta: float) -> bool:
    positions = np.arange(len(cosines))
    angles = np.outer(positions, unscaled(theta, 2 * cosines.shape[1]))
    # Tables made in float32 have angles rounded to float32, their frequencies too.
    allowed = 1e-6 + 3e-7 * positions[:, None]
    return bool(
        (np.abs(cosines - np.cos(angles)) <= allowed).all()
        and (np.abs(sines - np.sin(angles)) <= allowed).all()
    )
