"""The limits of the machine, and the benchmark against them. Nothing here depends on a time."""

from __future__ import annotations

import math

import pytest

from anepy import bench
from anepy.engine import library_info
from anepy.errors import ConfigError


def test_peaks_of_every_instruction_set_are_numbers_of_that_set() -> None:
    for isa in library_info()["isa_available"]:
        found = bench.peaks(isa, 1)
        assert (found.isa, found.threads) == (isa, 1)
        numbers = [found.fp32_gflops, found.read_gbs, found.copy_gbs, found.triad_gbs]
        assert all(0.0 < n < 1e7 and math.isfinite(n) for n in numbers), found


def test_peak_without_arguments_is_that_of_an_engine() -> None:
    found = bench.peaks()
    info = library_info()
    assert (found.isa, found.threads) == (info["isa"], info["threads"])
    assert bench.peaks() is found  # measured once
    assert bench.machine_peak() == found.fp32_gflops
    if found.bf16_gflops is None:
        assert math.isnan(bench.machine_peak("bf16"))
    else:
        assert bench.machine_peak("bf16") == found.bf16_gflops


def test_peaks_that_nobody_can_measure_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16.*fp32, bf16"):
        bench.machine_peak("fp16")
    with pytest.raises(ConfigError, match=r"avx1024.*scalar"):
        bench.peaks("avx1024")
    for threads in (0, -1, 2**31, 5000):
        with pytest.raises(ConfigError, match="threads"):
            bench.peaks(threads=threads)
