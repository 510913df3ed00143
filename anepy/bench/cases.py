"""The parts of the training step measured against the limits of this machine.

Every part is measured at the shapes of a model, on every instruction set the machine can run, and
checked against the scalar kernels before it is timed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..native import abi, find
from ..native.info import library_info, provenance
from .peaks import PRECISIONS, peaks

if TYPE_CHECKING:
    from ..models.model import ModelConfig, TensorTable

FORMAT = "anepy-bench"
VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a case of the benchmark is.

    Attributes:
        shape: of the operands, in words.
        limit: what bounds it, a key of `LIMITS`.
        operations: floating-point operations of one repetition.
        bytes: what one repetition has to read and write at least.
        calls: repetitions in a training step (in an update, for `adam` and `gradient_norm`);
            0 where that depends on the device, or the step does without it.
        forms: the precisions there are: of the factors of products, or what is converted.
    """

    shape: str
    limit: str
    operations: float
    bytes: float
    calls: float
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One case to measure.

    Attributes:
        name: of the case, of `cases()`.
        isa: the instruction set.
        precision: of the factors of products.
        threads: at work.
    """

    name: str
    isa: str
    precision: str
    threads: int


@dataclass(frozen=True)
class Result(Description, Job):
    """What one case of the benchmark took.

    Attributes:
        error: largest |result - scalar| / |scalar| over the outputs, checked before timing; 0 for
            the scalar kernels themselves.
        repetitions: in each round.
        seconds: of one repetition, the mean of each round.
        peak: the limit, GFLOP/s or GB/s, of `Peaks` with this instruction set and these threads.
    """

    error: float
    repetitions: int
    seconds: tuple[float, ...]
    peak: float

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the seconds of one repetition."""
        low, middle, high = np.percentile(self.seconds, (25, 50, 75))
        return float(low), float(middle), float(high)

    @property
    def arithmetic(self) -> bool:
        """Whether arithmetic is the limit, not memory."""
        return self.limit in PRECISIONS

    @property
    def rate(self) -> float:
        """GFLOP/s or GB/s at the median, whichever the limit counts."""
        work = self.operations if self.arithmetic else self.bytes
        return work / self.quartiles[1] * 1e-9

    @property
    def share(self) -> float:
        """Rate over limit; above 1 where the data stays in a cache that memory is compared with."""
        return self.rate / self.peak


def cases() -> tuple[str, ...]:
    """List the cases of the benchmark, in the order they run."""
    lib = find.library()
    found: list[str] = []
    while (name := lib.anepy_bench_at(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    Attributes:
        seq: tokens of a step.
        only: names of cases, or their beginnings; empty for all.
        isas: instruction sets; empty for all this machine can run.
        threads: numbers of threads; empty for as many as an engine would use.
        precisions: of the factors of products; bf16 is left out where a set has none.
        rounds: of each case, at most.
        round_ms: each round repeats the case for about so long.
        limit_ms: a case that takes longer is left after three rounds.
    """

    seq: int = 256
    only: Sequence[str] = ()
    isas: Sequence[str] = ()
    threads: Sequence[int] = ()
    precisions: Sequence[str] = PRECISIONS
    rounds: int = 9
    round_ms: float = 20.0
    limit_ms: float = 1000.0


def plan(table: TensorTable, settings: Settings) -> list[Job]:
    """List what `settings` ask for, one instruction set and number of threads after the other.

    Args:
        table: of the model whose shapes are measured.
        settings: what to measure.

    Raises:
        ConfigError: a name, number or instruction set means nothing here, or nothing is left.
    """
    known = cases()
    for name in settings.only:
        if not any(case.startswith(name) for case in known):
            raise ConfigError(
                f"there is no case {name!r} in the benchmark: use one of {', '.join(known)}"
            )
    for precision in settings.precisions:
        if precision not in PRECISIONS:
            raise ConfigError(f"unknown precision {precision!r}: use fp32 or bf16")
    info = library_info()
    chosen = [c for c in known if not settings.only or c.startswith(tuple(settings.only))]
    jobs = []
    for isa in settings.isas or info["isa_available"]:
        for threads in settings.threads or (info["threads"],):
            _check(settings, threads)
            for precision in settings.precisions:
                for name in chosen:
                    job = Job(name, isa, "fp32", threads)
                    if precision in describe(table, job, settings.seq).forms:
                        jobs.append(replace(job, precision=precision))
    if not jobs:
        raise ConfigError("nothing to measure: no chosen instruction set has bf16 products")
    return jobs


def describe(table: TensorTable, job: Job, seq: int) -> Description:
    """Say what a case is, without running it.

    Args:
        table: of the model whose shapes are meant.
        job: the case.
        seq: tokens of a step.

    Raises:
        ConfigError: the job means nothing on this machine.
    """
    found, _ = _call(table, job, Settings(seq=seq), 0)
    return Description(
        shape=found.shape.decode(),
        limit=found.limit.decode(),
        operations=found.operations,
        bytes=found.bytes,
        calls=found.calls,
        forms=("fp32",) * found.fp32 + ("bf16",) * found.bf16,
    )


def measure(table: TensorTable, job: Job, settings: Settings) -> Result:
    """Check one case against the scalar kernels, then time it.

    Args:
        table: of the model whose shapes are measured.
        job: the case.
        settings: `seq`, `rounds`, `round_ms` and `limit_ms` count.

    Raises:
        ConfigError: the job means nothing on this machine.
        NativeError: the kernels are wrong, or there is no memory.
    """
    found, seconds = _call(table, job, settings, settings.rounds)
    limits = peaks(job.isa, job.threads)
    what = describe(table, job, settings.seq)
    unit = "gflops" if what.limit in PRECISIONS else "gbs"
    return Result(
        **asdict(job),
        **asdict(what),
        error=found.error,
        repetitions=found.repetitions,
        seconds=tuple(seconds[: found.rounds]),
        peak=getattr(limits, f"{what.limit}_{unit}"),
    )


def as_record(
    config: ModelConfig, name: str, settings: Settings, results: Sequence[Result]
) -> dict[str, Any]:
    """Return what `anepy bench --json` writes: format "anepy-bench", version 1.

    Besides `machine`, `library`, `command`, `model` and `settings` it holds `peaks`, one entry per
    instruction set and number of threads (the fields of `Peaks`), and `results` (the fields of
    `Result`, and what follows from them: `q1`, `median` and `q3` in seconds, `rate` in GFLOP/s or
    GB/s, `share` of the peak).

    Args:
        config: the model's dimensions.
        name: the model's name.
        settings: what was asked for.
        results: what was measured.
    """
    used = dict.fromkeys((result.isa, result.threads) for result in results)
    return {
        "format": FORMAT,
        "version": VERSION,
        **provenance(),
        "command": ["anepy", *sys.argv[1:]],
        "model": {"name": name, "shape": asdict(config)},
        "settings": asdict(settings),
        "peaks": [asdict(peaks(isa, threads)) for isa, threads in used],
        "results": [_row(result) for result in results],
    }


def _row(result: Result) -> dict[str, Any]:
    q1, median, q3 = result.quartiles
    return asdict(result) | {
        "q1": q1,
        "median": median,
        "q3": q3,
        "rate": result.rate,
        "share": result.share,
    }


def _call(
    table: TensorTable, job: Job, settings: Settings, rounds: int
) -> tuple[abi.BenchResult, Sequence[float]]:
    _check(settings, job.threads)
    options = abi.BenchOptions(
        seq_len=settings.seq,
        name=job.name.encode("unicode_escape"),
        isa=job.isa.encode("unicode_escape"),
        precision=job.precision.encode("unicode_escape"),
        threads=job.threads,
        rounds=rounds,
        round_ms=settings.round_ms,
        limit_ms=settings.limit_ms,
    )
    out, seconds = abi.BenchResult(), (ctypes.c_double * settings.rounds)()
    table.lib.anepy_bench_run(table.handle, ctypes.byref(out), seconds, ctypes.byref(options))
    return out, list(seconds)


def _check(settings: Settings, threads: int) -> None:
    for name, number, largest in (
        ("seq", settings.seq, 65536),
        ("rounds", settings.rounds, 1000),
        ("threads", threads, 2**31 - 1),
    ):
        if not 1 <= number <= largest:
            raise ConfigError(f"{name} is {number}, expected a number from 1 to {largest}")
