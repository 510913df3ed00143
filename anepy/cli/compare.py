"""`anepy compare`: options, the measurement or the files they describe, and what is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..comparing.config import CompareConfig
from ..errors import ConfigError
from ..training.settings import setting_help
from .common import EXIT_FAILURE, DtypeOption, distinct, guarded, path_option

if TYPE_CHECKING:
    from ..comparing.result import Comparison

_STDOUT = Path("-")


def _option(name: str, *spellings: str) -> Any:
    text = setting_help(CompareConfig, name)
    return typer.Option(*spellings, help=text, show_default=False)


@guarded
def compare(
    variants: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VARIANT VARIANT...",
            help="Like baseline opt opt-prealloc; the first is the reference.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Its weights and shape. Default: random weights."),
    ] = None,
    data: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Token file (anepy prepare). Default: synthetic."),
    ] = None,
    dtype: DtypeOption = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Shape if there is no --model: stories260K to stories110M, which is the default.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int | None, _option("rounds")] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    warmup: Annotated[int | None, _option("warmup")] = None,
    seq: Annotated[int | None, _option("seq")] = None,
    batch: Annotated[int | None, _option("batch")] = None,
    accum: Annotated[int | None, _option("accum")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
    schedule: Annotated[str | None, _option("schedule")] = None,
    lr_warmup: Annotated[int | None, _option("lr_warmup")] = None,
    min_lr_ratio: Annotated[float | None, _option("min_lr_ratio")] = None,
    beta1: Annotated[float | None, _option("beta1")] = None,
    beta2: Annotated[float | None, _option("beta2")] = None,
    eps: Annotated[float | None, _option("eps")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay")] = None,
    grad_clip: Annotated[float | None, _option("grad_clip")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    device: Annotated[str | None, _option("device")] = None,
    precision: Annotated[str | None, _option("precision")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help=setting_help(CompareConfig, "ablate"))
    ] = False,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict",
            help="Measure nothing: count a step of each variant, predict its time by chip.",
        ),
    ] = False,
    chip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP",
            help="With --predict: m3pro, m3max, m3ultra, m4, m4pro, m4max or m5; may be repeated. "
            "Default: all.",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        bool,
        typer.Option("--load", help="Measure nothing: compare these files of --json instead."),
    ] = False,
    as_json: Annotated[
        Path | None,
        path_option(
            "--json",
            metavar="FILE",
            help="Write every sample; - prints them instead of the table.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        path_option(
            metavar="FILE.html",
            help="Write a page with charts.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure what variants are worth, in turns, with intervals.

    A variant is baseline, opt, ane, dynamic, double-buffer, resident or max, and any of +switch and
    -switch behind it. Ctrl-C ends with what has been measured so far.
    """
    words = list(variants or ())
    settings = {
        name: value
        for name, value in locals().items()
        if name in CompareConfig.__dataclass_fields__ and value is not None and value is not False
    }
    inputs = {"model": model, "data": data, "preset": preset}
    outputs = {"results": as_json, "report": report}
    if chip and not predict:
        raise typer.BadParameter("--chip is of --predict")
    if predict:
        given = [name for name in settings if name not in ("seq", "device")]
        given += ["load"] * load + ["data"] * (data is not None) + ["report"] * (report is not None)
        if given:
            raise typer.BadParameter(f"--predict measures nothing: leave out --{given[0]}")
        _predict(words or ["baseline", "max"], inputs, settings, chip or (), as_json)
        return
    if load:
        given = [*settings, *(name for name, value in inputs.items() if value is not None)]
        given += ["json"] if as_json else []
        given += ["dtype"] if dtype != "auto" else []
        if given:
            raise typer.BadParameter(f"--load measures nothing: leave out --{given[0]}")
        _compare_files(words, report)
        return
    if len(words) < 2 and not ablate:
        raise typer.BadParameter("name two variants or more, like baseline opt")
    if model is not None and preset is not None:
        raise typer.BadParameter("--model and --preset contradict each other")
    _measure(words or ["baseline", "max"], settings, inputs | {"dtype": dtype}, outputs)


def _predict(
    variants: Sequence[str],
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    chips: Sequence[str],
    as_json: Path | None,
) -> None:
    """Count, predict, show, write."""
    from ..comparing import predicted as text
    from ..comparing.file import write
    from ..comparing.session import DEFAULT_PRESET, shape
    from ..console.compare import print_wide
    from ..system.files import check_writable, dumps
    from .common import print_json

    if as_json not in (None, _STDOUT):
        check_writable(as_json, "results")
    model = shape(inputs["model"], inputs["preset"] or DEFAULT_PRESET)
    found = text.predict_variants(variants, model, chips=chips, **settings)
    made = text.record(found, ["anepy", *sys.argv[1:]])
    if as_json == _STDOUT:
        print_json(made)
        return
    for table in text.tables(found):
        print_wide(table)
    for line in text.sentences():
        print(line)
    if as_json is not None:
        write(as_json, "results", dumps(made, indent=2) + "\n")
        print(f"results written: {as_json}")


def _measure(
    variants: Sequence[str],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Path | None],
) -> None:
    """Measure, show, write."""
    from ..comparing.session import DEFAULT_PRESET, compare
    from ..console.compare import Turns
    from ..system.files import check_writable
    from ..system.interrupts import StopRequest
    from ..text.data import TokenData

    config = CompareConfig(**settings)
    files = {name: path for name, path in outputs.items() if path not in (None, _STDOUT)}
    distinct(files, {name: inputs[name] for name in ("model", "data")})
    for name, path in files.items():
        check_writable(path, name)
    data = inputs["data"] and TokenData(inputs["data"], inputs["dtype"])
    display = Turns()
    with StopRequest(display.stopping, display.abort) as stop, display:
        comparison = compare(
            variants,
            inputs["model"],
            data,
            config,
            preset=inputs["preset"] or DEFAULT_PRESET,
            progress=display.turn,
            stop=lambda: stop.signal is not None,
            command=["anepy", *sys.argv[1:]],
        )
    quiet = outputs["results"] == _STDOUT
    measured = any(run.rounds for group in comparison.groups for run in group.runs)
    if measured:
        _finish(comparison, quiet, files)
    if stop.signal is not None:
        if not measured:
            print("anepy: interrupted before a round was complete", file=sys.stderr)
        raise typer.Exit(stop.exit_code)
    failures = list(comparison.failures())
    if failures:
        if not measured:
            raise ConfigError(f"nothing could be measured: {failures[0].error}")
        raise typer.Exit(EXIT_FAILURE)


def _finish(comparison: Comparison, quiet: bool, outputs: Mapping[str, Path]) -> None:
    from ..comparing import file as comparison_file

    if quiet:
        from .common import print_json

        print_json(comparison_file.as_record(comparison))
    else:
        _show([("", comparison)])
    if "results" in outputs:
        comparison_file.save(comparison, outputs["results"])
        _say(quiet, f"results written: {outputs['results']}")
    if "report" in outputs:
        _write_report([("", comparison)], outputs["report"])
        _say(quiet, f"report written: {outputs['report']}")


def _say(quiet: bool, text: str) -> None:
    print(text, file=sys.stderr if quiet else sys.stdout)


def _compare_files(words: Sequence[str], report: Path | None) -> None:
    """Lay earlier results side by side."""
    from ..comparing.file import load
    from ..system.files import check_writable

    if not words:
        raise typer.BadParameter("--load needs files that --json wrote")
    if report is not None:
        distinct({"the report": report}, {f"result {word}": word for word in words})
        check_writable(report, "report")
    named = list(zip(_names(words), (load(word) for word in words), strict=True))
    _show(named)
    if report is not None:
        _write_report(named, report)
        print(f"report written: {report}")


def _write_report(named: Sequence[tuple[str, Comparison]], path: Path) -> None:
    from ..comparing.file import write
    from ..comparing.page import page

    write(path, "report", page(named))


def _names(words: Sequence[str]) -> list[str]:
    """Name files by their stems, or by what was typed where stems are equal."""
    stems = [Path(word).stem for word in words]
    names = [
        stem if stems.count(stem) == 1 else word for stem, word in zip(stems, words, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})"
        for at, name in enumerate(names)
    ]


def _show(named: Sequence[tuple[str, Comparison]]) -> None:
    """Print facts, tables and what they say."""
    from ..comparing import words as text
    from ..comparing.result import columns
    from ..console.compare import print_wide
    from ..console.train import print_table

    for name, comparison in named:
        print_table(f"anepy compare {name}".strip(), text.facts(comparison))
    shown = columns(named)
    print_wide(text.metrics(shown))
    for name, comparison in named:
        table = text.switches(comparison)
        if table is not None:
            print_wide(table, f"{name}: what each switch changes".removeprefix(": "))
    lines = text.sentences(shown)
    if len(named) > 1:
        lines += text.differences(named)
    for name, comparison in named:
        lines += [f"{name}: {line}".removeprefix(": ") for line in text.remarks(comparison)]
    for line in lines:
        print(line)
