"""`anepy bench`: the parts of a training step against the limits of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import guarded, path_option, print_json

if TYPE_CHECKING:
    from ..bench.cases import Result, Settings
    from ..models.model import ModelConfig


@guarded
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Case, or how its name begins; may be repeated."),
    ] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Instruction set; may be repeated. Default: all this machine can run."),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N", help="Threads, or all for 1, 2, ... Default: as many as training uses."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the factors of products: fp32, bf16 or all.")
    ] = "all",
    preset: Annotated[
        str | None,
        typer.Option(help="Shapes of stories260K, ... Default: stories110M."),
    ] = None,
    model: Annotated[
        Path | None,
        path_option("--model", metavar="FILE", help="Shapes of this model."),
    ] = None,
    seq: Annotated[int, typer.Option(min=1, max=65536, help="Tokens per step.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each case.")] = 9,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the results; - for stdout.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Only name the cases.")] = False,
) -> None:
    """Measure every part of a step against the machine's own limits.

    Each case is checked against the scalar kernels before it is timed.
    """
    from ..bench import cases as measuring
    from ..bench.peaks import PRECISIONS

    if list_cases:
        print("\n".join(measuring.cases()))
        return
    precisions = PRECISIONS if precision == "all" else (precision,)
    settings = measuring.Settings(
        seq=seq,
        only=tuple(only or ()),
        isas=tuple(dict.fromkeys(isa or ())),
        threads=_threads(threads or ()),
        precisions=precisions,
        rounds=rounds,
    )
    name, config = _shape(preset, model)
    to_file = json_file not in (None, "-")
    if to_file and json_file is not None:
        from ..system.files import check_writable

        check_writable(Path(json_file), "results")
    results = _measure(config, settings, quiet=json_file == "-")
    record = measuring.as_record(config, name, settings, results)
    if json_file == "-":
        print_json(record)
    elif json_file is not None:
        from ..system.files import dumps, replacing

        with replacing(Path(json_file)) as file:
            file.write((dumps(record, indent=1) + "\n").encode())
        print(f"{json_file}: {len(results)} results")


def _threads(values: Sequence[str]) -> tuple[int, ...]:
    """Read numbers of threads; `all` is one, two, ... up to the default."""
    from ..native.info import library_info

    found: list[int] = []
    for value in values:
        if value == "all":
            found += range(1, library_info()["threads"] + 1)
        elif value.isascii() and value.isdigit() and int(value) > 0:
            found.append(int(value))
        else:
            raise ConfigError(f"--threads {value!r}: expected a number >= 1, or all")
    return tuple(dict.fromkeys(found))


def _shape(preset: str | None, path: Path | None) -> tuple[str, ModelConfig]:
    """Return the dimensions to measure, and what they are called."""
    from ..models.model import PRESETS, Model

    if preset is not None and path is not None:
        raise ConfigError("give --model or --preset, not both")
    if path is not None:
        return str(path), Model.load(path).config
    name = preset or "stories110M"
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return name, PRESETS[name]


def _measure(config: ModelConfig, settings: Settings, quiet: bool) -> list[Result]:
    """Measure all there is, printing each table as soon as it is complete."""
    from ..bench.cases import measure, plan
    from ..console.bench import Counter
    from ..models.model import TensorTable

    table = TensorTable(config)
    jobs = plan(table, settings)
    results: list[Result] = []
    group: list[Result] = []
    with Counter(len(jobs)) as counter:
        for number, job in enumerate(jobs):
            counter.show(number, f"{job.name}, {job.isa}, {job.precision}, {job.threads} threads")
            group.append(measure(table, job, settings))
            following = jobs[number + 1] if number + 1 < len(jobs) else None
            if following is None or _heading_of(following) != _heading_of(job):
                counter.clear()
                if not quiet:
                    _print(group)
                results += group
                group = []
    return results


def _heading_of(job: object) -> tuple[object, ...]:
    return tuple(getattr(job, name) for name in ("isa", "precision", "threads"))


def _print(group: Sequence[Result]) -> None:
    from ..bench.peaks import LIMITS, peaks
    from ..console.bench import print_columns

    first = group[0]
    limits = peaks(first.isa, first.threads)
    arithmetic = limits.fp32_gflops if first.precision == "fp32" else limits.bf16_gflops
    title = (
        f"{first.isa}, {first.threads} thread{'s' if first.threads > 1 else ''}, "
        f"{first.precision}: peak {arithmetic:,.0f} GFLOP/s; memory reads "
        f"{limits.read_gbs:.1f}, copies {limits.copy_gbs:.1f}, a += b {limits.triad_gbs:.1f} GB/s"
    )
    head = ("case", "shape", "ms", "q1", "q3", "rate", "share", "of")
    rows = []
    for result in group:
        q1, median, q3 = (figure(value * 1e3) for value in result.quartiles)
        unit = "GFLOP/s" if result.arithmetic else "GB/s"
        rows.append(
            (
                result.name,
                result.shape,
                median,
                q1,
                q3,
                f"{result.rate:,.1f} {unit}",
                f"{result.share:.0%}",
                LIMITS[result.limit],
            )
        )
    print_columns(title, head, rows, optional=("q1", "q3", "of"), left=("case", "shape", "of"))
    sys.stdout.flush()


def figure(ms: float) -> str:
    """Write milliseconds with three or four figures."""
    digits = 0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 10 else 3
    return f"{ms:,.{digits}f}"
