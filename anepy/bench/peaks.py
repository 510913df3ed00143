"""The limits of this machine.

Arithmetic is measured in registers (independent chains of fused multiply-adds), memory with arrays
larger than any cache. Both take the best of several short trials: whatever else runs can only make
a trial slower.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, NativeError
from ..native import abi, find
from ..system.mac import ANE_PEAK_TFLOPS

PRECISIONS = ("fp32", "bf16")
LIMITS: Mapping[str, str] = MappingProxyType(
    {
        "fp32": "fp32 multiply-adds",
        "bf16": "bf16 dot products",
        "read": "memory, reading",
        "copy": "memory, copying",
        "triad": "memory, a += b",
    }
)


@dataclass(frozen=True)
class Peaks:
    """What this machine can do at most with one instruction set.

    Attributes:
        isa: the instruction set.
        threads: threads at work.
        fp32_gflops: fused multiply-adds in float32, GFLOP/s, two operations each.
        bf16_gflops: bf16 dot products summed in float32, GFLOP/s; None if there are none.
        read_gbs: GB/s (1e9 bytes) of reading one array.
        copy_gbs: GB/s of reading one array and writing another.
        triad_gbs: GB/s of reading two arrays and writing one of them.
    """

    isa: str
    threads: int
    fp32_gflops: float
    bf16_gflops: float | None
    read_gbs: float
    copy_gbs: float
    triad_gbs: float


def peaks(isa: str | None = None, threads: int | None = None, again: bool = False) -> Peaks:
    """Measure the limits of this machine, once per process: about 0.15 s and 256 MiB.

    Args:
        isa: instruction set, of `library_info()["isa_available"]`. Default: the one in use.
        threads: threads at work. Default: as many as an engine would use.
        again: measure once more, and keep the better of each number.

    Raises:
        ConfigError: the instruction set cannot run here, or threads is no sensible number.
    """
    if threads is not None and not 1 <= threads < 2**31:
        raise ConfigError(f"threads is {threads}, expected a number >= 1")
    found = _peaks.get((isa, threads))
    if found is None or again:
        new = _measure_peaks(isa, threads or 0)
        found = new if found is None else _better(found, new)
        _peaks[isa, threads] = found
    return found


def machine_peak(precision: str = "fp32", threads: int | None = None) -> float:
    """Return the arithmetic limit of this machine in GFLOP/s, measured once per process.

    Args:
        precision: `fp32` for multiply-adds, `bf16` for dot products of bf16 pairs.
        threads: threads at work. Default: as many as an engine would use.

    Returns:
        The limit; NaN for `bf16` where the processor (or `ANEPY_CPU_MASK`) has no such products.

    Raises:
        ConfigError: another precision, or threads is no sensible number.

    Example:
        >>> machine_peak("fp32") > 0
        True
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"no peak is known for precision {precision!r}: use one of {', '.join(PRECISIONS)}"
        )
    # No need of the memory that measuring its speed takes: a run may have none to spare.
    found = _peaks.get((None, threads)) or _arithmetic.get(threads)
    if found is None:
        found = _arithmetic[threads] = _measure_peaks(None, threads or 0, memory=False)
    value = found.fp32_gflops if precision == "fp32" else found.bf16_gflops
    return math.nan if value is None else value


_peaks: dict[tuple[str | None, int | None], Peaks] = {}
_arithmetic: dict[int | None, Peaks] = {}


def _better(one: Peaks, other: Peaks) -> Peaks:
    values = {
        name: max(value, getattr(other, name))
        for name, value in asdict(one).items()
        if isinstance(value, float)
    }
    return replace(one, **values)


def _measure_peaks(isa: str | None, threads: int, memory: bool = True) -> Peaks:
    out = abi.Peaks()
    name = None if isa is None else isa.encode("unicode_escape")
    find.library().anepy_peaks_measure(ctypes.byref(out), name, threads, memory)
    return Peaks(
        isa=out.isa.decode(),
        threads=out.threads,
        fp32_gflops=out.fp32_gflops,
        bf16_gflops=out.bf16_gflops or None,
        read_gbs=out.read_gbs,
        copy_gbs=out.copy_gbs,
        triad_gbs=out.triad_gbs,
    )


def device_peak(device: str, precision: str, threads: int) -> dict[str, Any] | None:
    """Return what utilization on a device refers to; None for a simulator, which has no speed.

    Args:
        device: of the engine.
        precision: of the engine.
        threads: of the engine.

    Returns:
        `gflops` and its `name`: Apple's figure for the Neural Engine, and for a CPU what its
        multiply-adds in registers do at most, measured once per process; None where they cannot be.
    """
    if device == "ane":
        return {"gflops": ANE_PEAK_TFLOPS * 1e3, "name": "Apple's figure for the Neural Engine"}
    if device != "cpu":
        return None
    try:
        gflops = machine_peak(precision, threads)
    except NativeError:  # no memory for threads: a figure less
        return None
    return {"gflops": gflops, "name": "measured FMA peak"} if gflops > 0 else None
