"""The small MIL programs of the probes, and what they are compiled and run with.

Written by hand, one assumption each, so that a wrong answer points at one cause. They are in the
newer dialect; `in_dialect` says the same in the older one.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Weights = Mapping[str, bytes]

SURFACE = 65536
COLUMNS = 64
_HEADER = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3510.2.1"}, {"coremlc-version", \
"3505.4.1"}, {"coremltools-component-milinternal", ""}, {"coremltools-version", "9.0"}})]
"""
_STALE = 0x7E11  # a NaN that nothing computes: an output that was not written still has it


class Compiled(Protocol):
    """A compiled program; surfaces are by slot, as `anepy.Program.run_slots` has them."""

    @property
    def compiled(self) -> bool:
        """Whether it was compiled, not loaded as compiled before."""

    def run_slots(
        self, inputs: Sequence[Array], outputs: Sequence[Array], function: int = 0
    ) -> None:
        """Run a function."""

    def reload(self, weights: Weights) -> None:
        """Put other weight files in place and load again."""

    def close(self) -> None:
        """Release it."""


class Runner(Protocol):
    """What probes run on: a device in one dialect."""

    dialect: str

    def compile(self, text: str, weights: Weights | None = None) -> Compiled:
        """Compile a text of the newer dialect."""

    def engine_device(self) -> str:
        """Name the device for an engine."""


class DeviceRunner:
    """A device of the native library.

    Args:
        device: by name, with details.
        dialect: "1.3" or "1.0".
    """

    def __init__(self, device: str, dialect: str = "1.3") -> None:
        self.device = device
        self.dialect = dialect

    def compile(self, text: str, weights: Weights | None = None) -> Compiled:
        """Compile a text of the newer dialect in that of the runner."""
        from .program import Program

        return Program(in_dialect(text, self.dialect), weights, device=self.device)

    def engine_device(self) -> str:
        """Name the device with the dialect."""
        separator = "," if ":" in self.device else ":"
        return f"{self.device}{separator}dialect={self.dialect}"


# ---------------------------------------------------------------------------------- MIL text


def in_dialect(text: str, dialect: str) -> str:
    """Return a text of dialect 1.3 in another one: there every scalar is a tensor of rank 0."""
    if dialect == "1.3":
        return text
    text = text.replace("program(1.3)", "program(1.0)").replace("<ios18>", "<ios16>")
    text = text.replace("dict<string, string>", "dict<tensor<string, []>, tensor<string, []>>")
    return re.sub(
        r"(?<![\w<])(string|fp16|int32|bool|uint64)(?=\(| \w+ = )", r"tensor<\1, []>", text
    )


def tensor(*dims: int) -> str:
    """Write the type of an fp16 tensor."""
    return f"tensor<fp16, [{', '.join(map(str, dims))}]>"


def function(
    inputs: Mapping[str, Sequence[int]], body: str, outputs: Sequence[str], name: str = "main"
) -> str:
    """Write a function; inputs are declared in the order given."""
    parameters = ", ".join(f"{tensor(*dims)} {key}" for key, dims in inputs.items())
    lines = "".join(f"        {line.strip()}\n" for line in body.strip().splitlines())
    return f"    func {name}<ios18>({parameters}) {{\n{lines}    }} -> ({', '.join(outputs)});\n"


def program(*functions: str) -> str:
    """Write a program of functions."""
    return _HEADER + "{\n" + "".join(functions) + "}\n"


def half(name: str, value: float) -> str:
    """Declare a scalar; `value` is exact in fp16."""
    return f'fp16 {name} = const()[name = string("{name}"), val = fp16({value})];'


def constants(**values: object) -> str:
    """Declare int32 scalars and lists, booleans and strings."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            kind, text = f"tensor<int32, [{len(value)}]>", str(value)
        elif isinstance(value, bool):
            kind, text = "bool", str(value).lower()
        elif isinstance(value, str):
            kind, text = "string", f'"{value}"'
        else:
            kind, text = "int32", str(value)
        lines.append(f'{kind} {name} = const()[name = string("{name}"), val = {kind}({text})];')
    return "\n".join(lines)


def baked(name: str, dims: Sequence[int], offset: int) -> str:
    """Declare a constant of the weight file "weight.bin"."""
    kind = tensor(*dims)
    return (
        f'{kind} {name} = const()[name = string("{name}"), val = {kind}(BLOBFILE('
        f'path = string("@model_path/weights/weight.bin"), offset = uint64({offset})))];'
    )


def conv(out: str, dims: Sequence[int], weight: str, x: str) -> str:
    """Write a 1x1 convolution with the constants it needs."""
    return (
        constants(**{f"{out}_one": [1, 1], f"{out}_zero": [0, 0, 0, 0], f"{out}_groups": 1})
        + f'\nstring {out}_pad = const()[name = string("{out}_pad"), val = string("valid")];\n'
        f"{tensor(*dims)} {out} = conv(dilations = {out}_one, groups = {out}_groups, "
        f"pad = {out}_zero, pad_type = {out}_pad, strides = {out}_one, weight = {weight}, "
        f'x = {x})[name = string("{out}")];'
    )


def op(out: str, dims: Sequence[int], call: str) -> str:
    """Write an operation with its name."""
    return f'{tensor(*dims)} {out} = {call}[name = string("{out}")];'


def weight_file(*arrays: Array) -> tuple[bytes, list[int]]:
    """Make a weight file (docs/neural-engine.md#weight-file); return it and its offsets."""
    data = bytearray(struct.pack("<II56x", len(arrays), 2))
    offsets = []
    for array in arrays:
        raw = np.ascontiguousarray(array, np.float16).tobytes()
        offsets.append(len(data))
        data += struct.pack("<IIQQ40x", 0xDEADBEEF, 1, len(raw), len(data) + 64)
        data += raw + bytes(-len(raw) % 64)
    return bytes(data), offsets


# ----------------------------------------------------------------------------------- surfaces


def surface(values: npt.ArrayLike, nbytes: int = SURFACE) -> Array:
    """Return a surface of so many bytes that begins with these numbers."""
    flat = np.asarray(values, np.float16).ravel()
    out = np.zeros(max(nbytes // 2, flat.size), np.float16)
    out[: flat.size] = flat
    return out


def run(
    compiled: Compiled,
    inputs: Sequence[npt.ArrayLike],
    *dims: Sequence[int],
    function: int = 0,
    nbytes: int = SURFACE,
) -> list[Array]:
    """Run a function on values by slot and return its outputs by slot, of these shapes.

    Raises:
        AnepyError: the device refuses.
        WrongError: an output was not written.
    """
    ins = [surface(values, nbytes) for values in inputs]
    outs = [
        np.full(max(nbytes // 2, int(np.prod(shape))), _STALE, np.uint16).view(np.float16)
        for shape in dims
    ]
    compiled.run_slots(ins, outs, function)
    found = [
        out[: int(np.prod(shape))].reshape(shape) for out, shape in zip(outs, dims, strict=True)
    ]
    for slot, values in enumerate(found):
        if (values.view(np.uint16) == _STALE).any():
            raise WrongError(f"output {slot} was not written, and nobody said so")
    return found


def milliseconds(began: float) -> float:
    """Return the time since `began`, a value of `time.perf_counter`."""
    return (time.perf_counter() - began) * 1e3


class WrongError(Exception):
    """A device does not do what the library relies on; the message says what it does."""
