"""Intervals against known cases; agreement of loss curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anepy.comparing import estimates
from anepy.comparing.estimates import Ratio, agreement, paired_ratio, spread, unpaired_ratio

RNG = np.random.default_rng


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found is not None
    assert (found.median, found.q1, found.q3, found.count) == (3.0, 2.0, 4.0, 5)
    assert spread([]) is None and spread([math.nan]) is None


def test_paired_ratio_sees_through_drift() -> None:
    """The machine gets three times slower on the way; both sides alike."""
    drift = np.linspace(100, 300, 8)
    found = paired_ratio(drift, 0.8 * drift)
    assert found is not None and found.rounds == 8
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8, 0.8), rel=1e-12)
    assert found.verdict == "faster"
    apart = unpaired_ratio(drift, 0.8 * drift)
    assert apart is not None and apart.value == pytest.approx(0.8)
    assert apart.low is not None and apart.high is not None
    assert apart.low < 0.6 and apart.high > 1 and apart.verdict == "no difference shown"


def test_paired_ratio_is_hodges_lehmann() -> None:
    """Logs 0, 1, 5: means of pairs 0, .5, 1, 2.5, 3, 5, the median of which is 1.75."""
    found = paired_ratio([1.0, 1.0, 1.0], np.exp([0.0, 1.0, 5.0]))
    assert found is not None and found.value == pytest.approx(math.exp(1.75))


def test_paired_ratio_exchanged_is_the_inverse() -> None:
    a, b = RNG(0).lognormal(0, 0.1, (2, 9))
    forth, back = paired_ratio(a, b), paired_ratio(b, a)
    assert forth is not None and back is not None
    assert forth.value == pytest.approx(1 / back.value)
    assert forth.inverse().inverse().value == pytest.approx(forth.value)
    assert forth.inverse().low == pytest.approx(back.low, rel=0.02)


def test_paired_ratio_one_odd_round_hardly_matters() -> None:
    times = np.full(8, 100.0) * RNG(1).normal(1, 0.01, 8)
    other = 0.9 * times * RNG(2).normal(1, 0.01, 8)
    other[3] *= 6
    found = paired_ratio(times, other)
    assert found is not None and found.value == pytest.approx(0.9, rel=0.02)


def test_ratio_with_few_rounds() -> None:
    assert paired_ratio([], []) is None and unpaired_ratio([], [1.0]) is None
    for estimate in (paired_ratio, unpaired_ratio):
        one = estimate([2.0], [1.0])
        assert one == Ratio(0.5, None, None, 1) and one.verdict == "unknown"
    two = paired_ratio([1.0, 1.0], [0.8, 0.9])
    assert two is not None and two.low == pytest.approx(0.8) and two.high == pytest.approx(0.9)


def test_ratio_same_seed_same_interval() -> None:
    a, b = RNG(3).lognormal(0, 0.1, (2, 8))
    assert paired_ratio(a, b, 1) == paired_ratio(a, b, 1) != paired_ratio(a, b, 2)
    assert unpaired_ratio(a, b, 1) == unpaired_ratio(a, b, 1) != unpaired_ratio(a, b, 2)


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])
@pytest.mark.parametrize("spikes", [0.0, 0.1], ids=["normal", "spiky"])
def test_interval_covers_the_truth_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch, spikes: float, paired: bool
) -> None:
    """95 % of the time, give or take three standard errors of the simulation (2.2 % each)."""
    monkeypatch.setattr(estimates, "RESAMPLES", 400)
    random = RNG(4)
    estimate = paired_ratio if paired else unpaired_ratio
    covered, trials = 0, 250
    for trial in range(trials):
        noise = random.normal(0, 0.02, (2, 8))
        noise[random.random((2, 8)) < spikes] *= 8
        found = estimate(np.exp(noise[0]), 0.9 * np.exp(noise[1]), trial)
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 0.9 <= found.high
    assert 0.91 <= covered / trials <= 0.99


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (7, 2.365), (30, 2.042)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert estimates._student(freedom) == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.99, "faster"), (1.01, 1.2, "slower"), (0.9, 1.1, "no difference shown")],
)
def test_verdict_is_about_the_interval(low: float, high: float, verdict: str) -> None:
    assert Ratio((low * high) ** 0.5, low, high, 8).verdict == verdict


def test_agreement_tells_worst_step_and_identity() -> None:
    a = [10.0, 8.0, 6.0]
    same = agreement(a, list(a), 1e-3)
    assert same.identical and same.agrees and same.worst == 0.0 and same.steps == 3
    close = agreement(a, [10.0, 8.009, 6.0], 1e-3)
    assert not close.identical and close.agrees and close.step == 2
    assert close.worst == pytest.approx(0.009 / 18), "of the mean of two"
    assert agreement(a, [10.0, 8.017, 6.0], 1e-3).agrees is True
    assert agreement(a, [10.0, 8.019, 6.0], 1e-3).agrees is False
    assert agreement(a, [10.0], 1e-3).steps == 1
    assert agreement([], a, 1e-3).agrees is None


def test_agreement_is_of_means_over_ten_steps() -> None:
    """One odd sequence late in a run is no other training; a lasting difference is."""
    flat = [1.0] * 30
    odd = agreement(flat, [*flat[:20], 1.05, *flat[21:]], 1e-2)
    assert odd.agrees and odd.worst == pytest.approx(0.005) and odd.step == 21
    lasting = agreement(flat, [*flat[:20], *[1.05] * 10], 1e-2)
    assert lasting.agrees is False and lasting.worst == pytest.approx(0.05) and lasting.step == 30
    assert agreement(flat, [1.05, *flat[1:]], 1e-2).agrees is False, "the first step stands alone"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_agreement_of_a_loss_that_is_not_finite_is_none(bad: float) -> None:
    for pair in (([1.0, bad], [1.0, 1.0]), ([1.0, 1.0], [1.0, bad]), ([1.0, bad], [1.0, bad])):
        found = agreement(*pair, 1e-2)
        assert found.agrees is False and found.worst == math.inf and found.step == 2


def test_tolerances_are_ordered_as_the_precisions_are() -> None:
    bounds = estimates.LOSS_TOLERANCE
    assert set(bounds) == {"fp32", "bf16", "fp16"}
    assert bounds["fp32"] < bounds["bf16"] <= 0.01 and bounds["fp16"] <= 0.01
