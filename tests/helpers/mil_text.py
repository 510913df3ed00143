"""Writing MIL text for tests: frames, dialects, weight records, and samples of programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BUILD_INFO = (
    '[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3510.2.1"}, '
    '{"coremlc-version", "3505.4.1"}, {"coremltools-component-milinternal", ""}, '
    '{"coremltools-version", "9.0"}})]'
)


def program(inputs: str, body: str, outputs: str = "y", name: str = "main") -> str:
    """Wrap statements into a program of the current dialect."""
    lines = "\n".join("        " + line.strip() for line in body.strip().splitlines())
    return (
        f"program(1.3)\n{BUILD_INFO}\n{{\n    func {name}<ios18>({inputs}) {{\n{lines}\n"
        f"    }} -> ({outputs});\n}}\n"
    )


def old_dialect(text: str) -> str:
    """Rewrite a program as program(1.0): every scalar a tensor of rank 0."""
    text = text.replace("program(1.3)", "program(1.0)").replace("<ios18>", "<ios16>")
    scalar = r"\b(string|int32|uint64|bool|fp16)"
    text = re.sub(scalar + r"\(", r"tensor<\1, []>(", text)
    text = re.sub(r"(?m)^(\s*)(string|int32|bool|fp16) (\w+ = const)", r"\1tensor<\2, []> \3", text)
    return text.replace("dict<string, string>", "dict<tensor<string, []>, tensor<string, []>>")


def half(x: npt.ArrayLike) -> Array:
    """Round to fp16 as numerics=exact does: to nearest even."""
    with np.errstate(over="ignore"):
        return np.asarray(np.asarray(x, np.float32), np.float16)


def fold(x: Array, axis: int, step: Callable[[Array, Array], Array]) -> Array:
    """Combine the slices of an axis one after another, rounding to fp16 each time."""
    total = np.zeros(np.delete(x.shape, axis), np.float16)
    for part in np.moveaxis(x, axis, 0):
        total = half(step(total.astype(np.float32), part.astype(np.float32)))
    return total


@dataclass(frozen=True)
class Sample:
    """A program and its expected outputs.

    Attributes:
        op: the operation it is about.
        inputs: declarations, as in the text.
        body: statements.
        expected: from the inputs (float32 copies of fp16, then the weights) by position to the
            unrounded output, or a tuple of them.
        outputs: names.
        weights: tensors of the weight files, by file name.
        ulps: how far the result may be from the rounded expectation; sums also get what their
            different order may cost.
        low, high: range of the inputs.
        rules: actions that the sample needs.
    """

    op: str
    inputs: str
    body: str
    expected: Callable[..., Any]
    outputs: str = "y"
    weights: dict[str, Array] = field(default_factory=dict)
    ulps: int = 1
    low: float = -2.0
    high: float = 2.0
    rules: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The program in the current dialect."""
        return program(self.inputs, self.body, self.outputs)

    def make_inputs(self, seed: int = 0) -> dict[str, Array]:
        """Draw inputs of the declared shapes and types."""
        rng = np.random.default_rng(seed)
        made: dict[str, Array] = {}
        for kind, dims, name in re.findall(r"tensor<(\w+), \[([\d, ]*)\]> (\w+)", self.inputs):
            shape = tuple(int(n) for n in dims.split(","))
            if kind in ("int8", "uint8"):
                made[name] = rng.integers(0, 100, shape).astype(kind)
            else:
                values = rng.uniform(self.low, self.high, shape)
                made[name] = half(values).astype({"fp16": np.float16, "fp32": np.float32}[kind])
        return made


def weight(seed: int, *shape: int) -> Array:
    return half(np.random.default_rng(seed).standard_normal(shape) * 0.2).astype(np.float16)


def blob(name: str, kind: str, dims: str, file: str, offset: int = 64) -> str:
    """A statement that names a weight record."""
    return (
        f'tensor<{kind}, [{dims}]> {name} = const()[name=string("{name}"), '
        f'val=tensor<{kind}, [{dims}]>(BLOBFILE(path=string("@model_path/weights/{file}"), '
        f"offset=uint64({offset})))];"
    )


X = "tensor<fp16, [1, 32, 1, 64]> x"
XY = X + ", tensor<fp16, [1, 32, 1, 64]> z"
Y = "tensor<fp16, [1, 32, 1, 64]> y"

CONV_CONSTANTS = """
    string pt = const()[name=string("pt"), val=string("valid")];
    tensor<int32, [2]> st = const()[name=string("st"), val=tensor<int32, [2]>([1, 1])];
    tensor<int32, [4]> pd = const()[name=string("pd"), val=tensor<int32, [4]>([0, 0, 0, 0])];
    tensor<int32, [2]> dl = const()[name=string("dl"), val=tensor<int32, [2]>([1, 1])];
    int32 gr = const()[name=string("gr"), val=int32(1)];
"""
BOOLS = """
    bool no = const()[name=string("no"), val=bool(false)];
    bool yes = const()[name=string("yes"), val=bool(true)];
"""
