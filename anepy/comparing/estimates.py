"""What repeated measurements say: spreads, ratios with intervals, whether loss curves agree.

Times of a busy machine have heavy tails and drift. So a ratio is taken between turns that stood
side by side (one round), the rounds are summed up by an estimator that a few odd ones cannot move,
and how well it is known follows from resampling the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 4000
# Below this an interval from resampling is too narrow: simulated coverage 0.92 at 5 rounds, 0.73 at
# 3 (normal and one-in-ten-spiky noise).
TRUSTED_ROUNDS = 5
# Steps whose mean is a point of a loss curve.
LOSS_WINDOW = 10

# How far two loss curves of one seed may be apart at any step, relative to the loss, to be the same
# training; a curve is the mean of the last ten losses, as single sequences scatter. They start with
# equal weights; what differs is the order of sums, and AdamW turns the rounding of a gradient near
# zero into a whole step of the learning rate, so curves part slowly.
LOSS_TOLERANCE: Mapping[str, float] = MappingProxyType(
    {
        # 5e-6 was seen in 50 updates of stories260K at learning rate 1e-3; room for long runs.
        "fp32": 1e-3,
        # Eight bits of mantissa in the factors of products: 8e-3 was seen there, 1e-3 at rate 3e-4.
        "bf16": 1e-2,
        # Eleven bits at every program boundary: 3e-3 was seen in the same 50 updates.
        "fp16": 1e-2,
    }
)

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values."""

    median: float
    q1: float
    q3: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Sum up values that may scatter; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    q1, median, q3 = (float(value) for value in np.percentile(finite, [25, 50, 75]))
    return Spread(median, q1, q3, len(finite))


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes relative to another.

    Attributes:
        value: below 1 is faster.
        low: lower bound of the 95 % interval; None with a single round.
        high: upper bound of the 95 % interval; None with a single round.
        rounds: how many rounds stand behind it.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int

    def inverse(self) -> Ratio:
        """Return the ratio the other way round."""
        low, high = self.low, self.high
        return Ratio(
            1 / self.value, 1 / high if high else None, 1 / low if low else None, self.rounds
        )

    @property
    def verdict(self) -> str:
        """Say "faster", "slower", "no difference shown" (interval includes 1) or "unknown"."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference shown"


def paired_ratio(first: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio | None:
    """Estimate other / first from rounds in which both had their turn.

    The estimate is the Hodges-Lehmann median (of the means of all pairs, Hodges & Lehmann, Annals
    of Mathematical Statistics 34, 1963) of the logarithms of the rounds' ratios: exchanging the two
    gives exactly the inverse. The interval is the percentile bootstrap over rounds (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), widened for few rounds as in
    Hesterberg, The American Statistician 69 (2015), "expanded percentile"; without that it covers
    90 instead of 95 % at 8 rounds.

    Args:
        first: positive times of one thing, one per round.
        other: positive times of the other thing in the same rounds.
        seed: of the resampling; the same input gives the same interval everywhere.

    Returns:
        The ratio; None if there is no round.
    """
    rounds = min(len(first), len(other))
    if rounds == 0:
        return None
    logs = np.log(np.asarray(other[:rounds]) / np.asarray(first[:rounds]))
    if rounds == 1:
        return Ratio(math.exp(logs[0]), None, None, 1)
    draws = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    low, high = np.quantile(_hodges_lehmann(logs[draws]), _tails(rounds))
    value = float(_hodges_lehmann(logs[np.newaxis])[0])
    return _ratio(value, float(low), float(high), rounds)


def unpaired_ratio(first: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio | None:
    """Estimate other / first from rounds that have nothing to do with each other.

    The estimate is the median of the differences of logarithms of all pairs of rounds, and the two
    sides are resampled independently. The interval is made as in `paired_ratio`; it does
    not hold what changed on the machine between the two sessions.

    Args:
        first: positive times of one thing, one per round.
        other: positive times of the other thing; any number of rounds.
        seed: of the resampling; the same input gives the same interval everywhere.

    Returns:
        The ratio; None if a side has no round.
    """
    a, b = np.log(np.asarray(first)), np.log(np.asarray(other))
    rounds = min(len(a), len(b))
    if rounds == 0:
        return None
    value = float(np.median(b[:, np.newaxis] - a))
    if rounds == 1:
        return Ratio(math.exp(value), None, None, 1)
    random = np.random.default_rng(seed)
    draws_a = a[random.integers(0, len(a), (RESAMPLES, len(a)))]
    draws_b = b[random.integers(0, len(b), (RESAMPLES, len(b)))]
    differences = draws_b[:, :, np.newaxis] - draws_a[:, np.newaxis, :]
    medians = np.median(differences.reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, _tails(rounds))
    return _ratio(value, float(low), float(high), rounds)


def _ratio(value: float, low: float, high: float, rounds: int) -> Ratio:
    # With two or three rounds the estimate can fall outside by rounding.
    return Ratio(math.exp(value), math.exp(min(low, value)), math.exp(max(high, value)), rounds)


def _hodges_lehmann(rows: _Floats) -> _Floats:
    """Return the median of pairwise means (a value with itself included) of every row."""
    i, j = np.triu_indices(rows.shape[1])
    result: _Floats = np.median((rows[:, i] + rows[:, j]) / 2, axis=1)
    return result


def _tails(count: int) -> tuple[float, float]:
    """Return the quantiles that make a percentile interval as wide as Student's for the mean."""
    z = math.sqrt(count / (count - 1)) * _student(count - 1)
    tail = 0.5 * math.erfc(z / math.sqrt(2))
    return tail, 1 - tail


def _student(freedom: int) -> float:
    """Return the quantile of Student's t that leaves half of 1 - CONFIDENCE above it.

    With t = sqrt(freedom) tan(angle) the density becomes cos(angle)^(freedom - 1), which the
    trapezoidal rule integrates.
    """
    angle = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(CONFIDENCE * area[-1], area, angle)))


@dataclass(frozen=True)
class Agreement:
    """How two loss curves compare.

    Attributes:
        identical: every loss has the same bits.
        agrees: the curves are nowhere further apart than the tolerance; None without a common
            step.
        worst: largest relative difference of the curves.
        step: number of the step with that difference, from 1.
        steps: steps compared.
        tolerance: the largest relative difference with which curves agree.
    """

    identical: bool
    agrees: bool | None
    worst: float
    step: int
    steps: int
    tolerance: float


def agreement(first: Sequence[float], other: Sequence[float], tolerance: float) -> Agreement:
    """Compare the losses of the same steps; a loss that is not finite agrees with nothing.

    Args:
        first: losses of one run, by step.
        other: losses of another run, by step.
        tolerance: largest relative difference that counts as agreement, of `LOSS_TOLERANCE`.
    """
    steps = min(len(first), len(other))
    a, b = np.asarray(first[:steps], np.float64), np.asarray(other[:steps], np.float64)
    if steps == 0:
        return Agreement(False, None, 0.0, 0, 0, tolerance)
    apart = relative_differences(a, b)
    step = int(np.argmax(apart))
    worst = float(apart[step])
    identical = bool(np.array_equal(a, b))
    return Agreement(identical, worst <= tolerance, worst, step + 1, steps, tolerance)


def relative_differences(first: Any, other: Any) -> _Floats:
    """Return |other - first| / |first| of two loss curves, by step.

    A curve is the mean of the losses of up to ten steps before and at a step. Infinite where one
    is not finite.
    """
    a, b = _curve(first), _curve(other)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart: _Floats = np.where(a == b, 0.0, np.abs(b - a) / np.abs(a))
    apart[~np.isfinite(apart) | ~np.isfinite(a) | ~np.isfinite(b)] = math.inf
    return apart


def _curve(losses: Any) -> _Floats:
    values = np.asarray(losses, np.float64)
    means = [values[max(0, at - LOSS_WINDOW) : at].mean() for at in range(1, len(values) + 1)]
    return np.asarray(means, np.float64)
