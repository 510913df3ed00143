"""`anepy mil`: the MIL text, weight file and tensor table of device programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import guarded, path_option

if TYPE_CHECKING:
    from ..hardware.programs import Description
    from ..models.model import Model


@guarded
def mil(
    programs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROGRAM...",
            help="sdpa_fwd, ffn_fwd, ...; several become the procedures of one text.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        path_option(
            "--model",
            metavar="FILE",
            help="Model to bake: .bin, .gguf or Hugging Face folder.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Dimensions without a model: stories260K, ... Default: stories110M."),
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=1, help="Sequence length. Default: the model's.")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Layer whose weights are baked.")] = 0,
    part: Annotated[
        int, typer.Option(min=0, help="Slice of the vocabulary (classifier, above 32768 tokens).")
    ] = 0,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Weights as further inputs instead of baked.")
    ] = False,
    dialect: Annotated[
        str, typer.Option(help="1.3 (ios18), or 1.0 (ios16) for old systems.")
    ] = "1.3",
    chip: Annotated[
        str | None, typer.Option(help="Also check the text for m1, m2, m3, m4, m5 or m6.")
    ] = None,
    headroom: Annotated[
        bool,
        typer.Option(
            "--headroom",
            help="Run a step of --model on the simulator; list how far its sums are from infinite.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        path_option("--out", "-o", metavar="DIR", help="Write model.mil and weights/ there."),
    ] = None,
) -> None:
    """Print the MIL text of a program; its tensor table goes to standard error."""
    from ..hardware.program import CHIPS
    from ..hardware.programs import describe, generate, write

    if chip is not None and chip not in CHIPS:
        raise ConfigError(f"unknown chip {chip!r}: use one of {', '.join(CHIPS)}")
    if headroom:
        if model is None or programs:
            raise ConfigError("--headroom takes --model and no programs: it runs all of a step")
        print("\n".join(_headroom(model, seq, chip)))
        return
    if not programs:
        raise ConfigError("name a program, like ffn_fwd, or give --headroom with --model")
    subject = _model(model, preset, weights=out is not None and not dynamic)
    length = subject.config.seq_len if seq is None else seq
    described = [
        describe(
            subject.table,
            name,
            width=-(-length // 64) * 64,
            layer=layer,
            part=part,
            live=dynamic,
        )
        for name in programs
    ]
    text, blob = generate(subject, described, dialect)
    reports = [] if chip is None else _check(text, blob, chip)
    if out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        print("\n".join(write(out, text, blob)))
    lines = [line for program in described for line in table(program)]
    print("\n".join([*lines, *reports]), file=sys.stderr if out is None else sys.stdout)


def _model(path: Path | None, preset: str | None, *, weights: bool) -> Model:
    """Load a model, or make one of a preset; the text alone does not depend on its weights."""
    from ..models.model import PRESETS, Model

    if path is not None and preset is not None:
        raise ConfigError("give --model or --preset, not both")
    if path is not None:
        return Model.load(path)
    name = preset or "stories110M"
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return Model.init(PRESETS[name]) if weights else Model(PRESETS[name])


def _headroom(path: Path, seq: int | None, chip: str | None) -> list[str]:
    """Format the largest sums of a step with ids drawn at random."""
    import numpy as np

    from ..hardware.headroom import LIMIT, headroom
    from ..models.model import Model

    model = Model.load(path)
    length = min(model.config.seq_len, 256) if seq is None else seq
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, length + 1, dtype=np.int32)
    found = headroom(model, ids[:-1], ids[1:], device=f"sim:{chip}" if chip else "sim")
    rows = [
        f"{item.program:18} {item.result:22} {item.largest:12.4g} {item.factor:10.4g}"
        + ("  infinite" if item.factor < 1 else "")
        for item in found
    ]
    title = f"{'program':18} {'product':22} {'largest sum':>12} {'headroom':>10}"
    return [title, *rows, f"sums are infinite from {LIMIT:g} on; headroom is what they may grow by"]


def _check(text: str, blob: bytes, chip: str) -> list[str]:
    """Parse a text with the rules of a chip; return what they report."""
    from ..hardware.program import Program
    from ..hardware.programs import WEIGHT_FILE

    with Program(text, {WEIGHT_FILE: blob} if blob else {}, chip=chip) as program:
        found = [f"{name}: {report.message}" for name, report in program.reports.items()]
    return found or [f"{chip}: no rule is broken"]


def table(program: Description) -> list[str]:
    """Format the tensor table of a program, one line per tensor."""
    part = f", part {program.part} of {program.parts}" if program.parts > 1 else ""
    rows = []
    for port in program.ports:
        if port.kind == "weight":
            shape = f"[{port.shape[0]}, {port.shape[1]}]"
            surface = f"[1, {port.channels}, 1, {port.columns}]"
            place = f"{port.surface} {surface}" if port.surface else "baked"
        else:
            shape = f"[{port.channels}, {port.columns}]"
            place = f"{port.surface} {port.channel}..{port.channel + port.channels - 1}"
        rows.append((port.kind, port.name, shape, place))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    title = (
        f"{program.name}, layer {program.layer}{part}: a_in [1, {program.input_channels}, 1, "
        f"{program.width}] -> z_out [1, {program.output_channels}, 1, {program.width}]"
    )
    return [
        title,
        *("  " + "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows),
    ]
