"""The programs of the training step as the Neural Engine gets them: tensors, MIL text, weight file.

The native library defines every program once; this module asks it. `anepy.Program` runs the text.

Example:
    >>> model = Model.init(PRESETS["stories260K"])
    >>> text, weights = generate(model, [describe(model.table, "ffn_fwd", width=64)])
    >>> text.splitlines()[0], len(weights)
    ('program(1.3)', 66752)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..engine.handle import encoded
from ..errors import ConfigError
from ..models.model import Model, TensorTable
from ..native import abi, find
from ..system.files import replacing

DIALECTS = ("1.3", "1.0")
WEIGHT_FILE = "@model_path/weights/weight.bin"  # the path in every text

Array = npt.NDArray[np.float32]
_KINDS: tuple[Literal["input", "output", "weight"], ...] = ("input", "output", "weight")


@dataclass(frozen=True)
class Port:
    """One tensor of a program.

    Attributes:
        name: as in the program table, e.g. `xnorm` or `wq`.
        kind: `input`, `output` or `weight`.
        surface: `a_in` or `z_out`, the packed input or output it is part of; a live weight has a
            surface of its own, a baked one none (empty).
        channel: first channel in that surface.
        channels: how many.
        columns: width of the surface.
        shape: of a weight in the model, (rows, cols); a norm is (1, dim).
        offset: of a weight, first element in the parameter arena.
    """

    name: str
    kind: Literal["input", "output", "weight"]
    surface: str
    channel: int
    channels: int
    columns: int
    shape: tuple[int, int]
    offset: int


@dataclass(frozen=True)
class Description:
    """A program of the table, described for one model.

    Attributes:
        name: e.g. `sdpa_fwd`.
        width: columns of every tensor, a multiple of 64.
        layer: whose weights it has.
        part: slice of the vocabulary (classifier programs of large vocabularies), of `parts`.
        live: weights are further inputs instead of baked.
        input_channels: of the packed input surface `a_in` [1, channels, 1, width].
        output_channels: of the packed output surface `z_out` [1, channels, 1, width].
        ports: inputs, outputs, weights.
    """

    name: str
    width: int
    layer: int
    part: int
    parts: int
    live: bool
    first_row: int
    input_channels: int
    output_channels: int
    ports: tuple[Port, ...]

    def kind(self, kind: Literal["input", "output", "weight"]) -> tuple[Port, ...]:
        """Return the ports of one kind, in program order."""
        return tuple(port for port in self.ports if port.kind == kind)


def names() -> tuple[str, ...]:
    """List all programs, in the order of the table."""
    lib = find.library()
    found: list[str] = []
    while (name := lib.anepy_program_at(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)


def _options(program: Description) -> abi.ProgramOptions:
    return abi.ProgramOptions(
        flags=int(program.live),
        name=encoded(program.name),
        width=program.width,
        layer=program.layer,
        part=program.part,
    )


def describe(
    table: TensorTable,
    name: str,
    *,
    width: int = 0,
    layer: int = 0,
    part: int = 0,
    live: bool = False,
) -> Description:
    """Describe a program for a model.

    Args:
        table: of the model, e.g. `model.table`.
        name: one of `names()`.
        width: columns, a multiple of 64; 0 for the model's sequence length, rounded up.
        layer: whose weights.
        part: slice of the vocabulary.
        live: weights are inputs.

    Raises:
        ConfigError: no such program, layer or part, or a width that cannot be.
    """
    for what, value in (("width", width), ("layer", layer), ("part", part)):
        if not 0 <= value < 1 << 31:
            raise ConfigError(f"program {name}: {what} is {value}, expected a number >= 0")
    options = abi.ProgramOptions(
        flags=int(live), name=encoded(name), width=width, layer=layer, part=part
    )
    info = abi.ProgramInfo()
    table.lib.anepy_program_get_info(table.handle, info, options)
    ports = []
    for index in range(info.input_n + info.output_n + info.weight_n):
        port = abi.ProgramPort()
        table.lib.anepy_program_get_port(table.handle, port, options, index)
        ports.append(
            Port(
                port.name.decode(),
                _KINDS[port.kind],
                port.surface.decode(),
                port.channel,
                port.channels,
                port.columns,
                (port.rows, port.cols),
                port.offset,
            )
        )
    return Description(
        name,
        info.width,
        layer,
        part,
        info.parts,
        live,
        info.first_row,
        info.input_channels,
        info.output_channels,
        tuple(ports),
    )


def generate(
    model: Model | TensorTable, programs: Sequence[Description], dialect: str = "1.3"
) -> tuple[str, bytes]:
    """Write the MIL text of programs and the weight file it names.

    Args:
        model: whose weights are baked; the table alone is enough if all weights are live.
        programs: all of the same width. One becomes the function `main`, several become
            `procedure000`, `procedure001`, ...
        dialect: `1.3` (ios18) or `1.0` (ios16, for old systems).

    Returns:
        the text, and the bytes of `WEIGHT_FILE` (none if the text names no such file).

    Raises:
        ConfigError: unknown dialect, or a program that no chip takes at this size.
    """
    table = model if isinstance(model, TensorTable) else model.table
    params = None if isinstance(model, TensorTable) else model.arena.ctypes.data
    if not programs:
        raise ConfigError("no program to write: name at least one")
    options = (abi.ProgramOptions * len(programs))(*map(_options, programs))
    text_n, blob_n = ctypes.c_uint64(), ctypes.c_uint64()

    def write(text: ctypes.Array[ctypes.c_char] | None, blob: npt.NDArray[np.uint8] | None) -> None:
        table.lib.anepy_mil_write(
            table.handle,
            params,
            options,
            len(programs),
            dialect.encode(),
            text,
            text_n,
            None if blob is None else blob.ctypes.data,
            blob_n,
        )

    write(None, None)
    text = ctypes.create_string_buffer(text_n.value)
    blob = np.empty(blob_n.value, np.uint8)
    write(text, blob)
    return text.raw.decode(), blob.tobytes()


def run_native(
    model: Model, program: Description, x: npt.ArrayLike, *, n: int | None = None, threads: int = 0
) -> Array:
    """Run a program as device cpu does, in float32.

    Args:
        model: whose weights it uses.
        program: which.
        x: (input_channels, width), the packed input.
        n: columns that are tokens; default all.
        threads: 0 for the machine's default.

    Returns:
        float32 (output_channels, width), the packed output; columns from n on mean nothing.
    """
    packed = np.ascontiguousarray(x, np.float32)
    if packed.shape != (program.input_channels, program.width):
        raise ConfigError(
            f"program {program.name} takes {program.input_channels} x {program.width} values, "
            f"not {' x '.join(map(str, packed.shape))}"
        )
    out = np.empty((program.output_channels, program.width), np.float32)
    floats = ctypes.POINTER(ctypes.c_float)
    model.table.lib.anepy_program_run_native(
        model.table.handle,
        model.arena.ctypes.data,
        _options(program),
        program.width if n is None else n,
        threads,
        packed.ctypes.data_as(floats),
        out.ctypes.data_as(floats),
    )
    return out


def write(folder: Path, text: str, blob: bytes) -> list[str]:
    """Write what the compiler of the Neural Engine reads: model.mil and weights/weight.bin.

    Returns:
        A line for each file written.

    Raises:
        OSError: as the operating system reports it.
    """
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.mil") as file:
        file.write(text.encode())
    written = [f"{folder / 'model.mil'}: {len(text)} bytes"]
    weights = folder / "weights" / "weight.bin"
    if not blob:
        weights.unlink(
            missing_ok=True
        )  # left by an earlier program; this text names no weight file
        return written
    with replacing(weights) as file:
        file.write(blob)
    return [*written, f"{weights}: {len(blob)} bytes"]


def write_layer(model: Model, seq: int, folder: Path) -> list[str]:
    """Write text and weight file of the first layer's programs; return what was written, in words.

    Programs of the classifier, whose weights are the largest, are left out.
    """
    width = -(-seq // 64) * 64
    programs = [name for name in names() if not name.startswith(("classifier", "head"))]
    return write(
        folder, *generate(model, [describe(model.table, name, width=width) for name in programs])
    )
