"""Hand-written MIL programs, one or more per operation, with what numpy says they compute.

They are written as people write them for the Neural Engine: constants named first, one statement per
line, parameters in alphabetical order. `test_sim.py` runs them, `test_fuzz.py` breaks them.
"""

from __future__ import annotations

import math
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
    """Round to fp16 as the engine does: to nearest even, subnormals to zero."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(np.asarray(x, np.float32), np.float16)
    return np.where(np.abs(rounded) < 2.0**-14, np.float16(0), rounded)


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


def _weight(seed: int, *shape: int) -> Array:
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


def _unary(op: str, expected: Callable[[Array], Any], **options: Any) -> Sample:
    return Sample(op, X, f'{Y} = {op}(x=x)[name=string("y")];', expected, **options)


def _binary(op: str, expected: Callable[[Array, Array], Any], **options: Any) -> Sample:
    options.setdefault("ulps", 0)
    return Sample(op, XY, f'{Y} = {op}(x=x, y=z)[name=string("y")];', expected, **options)


def _compare(op: str, expected: Callable[[Array, Array], Any]) -> Sample:
    body = f"""
        tensor<bool, [1, 32, 1, 64]> c = {op}(x=x, y=z)[name=string("c")];
        fp16 one = const()[name=string("one"), val=fp16(1.0)];
        fp16 two = const()[name=string("two"), val=fp16(0x1p+1)];
        {Y} = select(a=one, b=two, cond=c)[name=string("y")];
    """
    return Sample(
        op,
        XY,
        body,
        lambda x, z: (
            np.where(expected(np.floor(x), z), 1.0, 2.0)
            if False
            else np.where(expected(x, z), 1.0, 2.0)
        ),
        ulps=0,
    )


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x.astype(np.float64))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x.astype(np.float64)))


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _reduce(
    op: str, axis: int, keep: bool, expected: Callable[[Array], Any], **options: Any
) -> Sample:
    dims = [1, 32, 1, 64]
    if keep:
        dims[axis] = 1
    else:
        del dims[axis]
    body = f"""
        tensor<int32, [1]> ax = const()[name=string("ax"), val=tensor<int32, [1]>([{axis}])];
        bool kd = const()[name=string("kd"), val=bool({str(keep).lower()})];
        tensor<fp16, {dims}> y = {op}(axes=ax, keep_dims=kd, x=x)[name=string("y")];
    """
    return Sample(op, X, body, expected, **options)


def _conv(x: Array, w: Array, stride: int = 1, pad: int = 0, groups: int = 1) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))).astype(np.float64)
    n, c, h, v = x.shape
    o, i, kh, kw = w.shape
    out = np.zeros((n, o, (h - kh) // stride + 1, (v - kw) // stride + 1))
    for g in range(groups):
        outs, ins = slice(g * o // groups, (g + 1) * o // groups), slice(g * i, (g + 1) * i)
        for a in range(kh):
            for b in range(kw):
                part = x[:, ins, a : a + h - kh + 1 : stride, b : b + v - kw + 1 : stride]
                out[:, outs] += np.einsum(
                    "oi,nihw->nohw", w[outs, :, a, b].astype(np.float64), part
                )
    return out


CONV_CONSTANTS = """
    string pt = const()[name=string("pt"), val=string("valid")];
    tensor<int32, [2]> st = const()[name=string("st"), val=tensor<int32, [2]>([1, 1])];
    tensor<int32, [4]> pd = const()[name=string("pd"), val=tensor<int32, [4]>([0, 0, 0, 0])];
    tensor<int32, [2]> dl = const()[name=string("dl"), val=tensor<int32, [2]>([1, 1])];
    int32 gr = const()[name=string("gr"), val=int32(1)];
"""
QK = "tensor<fp16, [1, 4, 64, 32]> q, tensor<fp16, [1, 4, 64, 32]> r"
BOOLS = """
    bool no = const()[name=string("no"), val=bool(false)];
    bool yes = const()[name=string("yes"), val=bool(true)];
"""


def _matmul(a: Array, b: Array) -> Array:
    return a.astype(np.float64) @ b.astype(np.float64)


def _attention(q: Array, k: Array, v: Array) -> Array:
    return _matmul(_softmax(_matmul(q, k.swapaxes(-1, -2)) / math.sqrt(q.shape[-1]), -1), v)


def _rmsnorm(x: Array, w: Array) -> Array:
    scaled = half(x * np.float32(0.25)).astype(np.float32)
    squares = half(scaled * scaled)
    total = half(_conv(squares, np.ones((1, 32, 1, 1))))
    mean = half(total.astype(np.float32) * np.float32(1 / 32))
    eps = half(mean.astype(np.float32) + half(1e-3).astype(np.float32))
    r = half(1.0 / np.sqrt(eps.astype(np.float32))).astype(np.float32)
    y = half(scaled * r).astype(np.float32)
    return y * w.reshape(1, -1, 1, 1)


def _layer_norm(x: Array, g: Array, b: Array) -> Array:
    x = x.astype(np.float64)
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * g.reshape(1, -1, 1, 1) + b.reshape(1, -1, 1, 1)


SAMPLES: list[Sample] = [
    # ------------------------------------------------------------------------------- elementwise
    _binary("add", lambda x, z: x + z),
    _binary("sub", lambda x, z: x - z),
    _binary("mul", lambda x, z: x * z),
    _binary("real_div", lambda x, z: x / z, low=0.5),
    _binary("maximum", np.maximum),
    _binary("minimum", np.minimum),
    _binary("pow", lambda x, z: x.astype(np.float64) ** z, low=0.5, ulps=1),
    _binary("floor_div", lambda x, z: np.floor(x / z), low=0.5),
    _compare("equal", np.equal),
    _compare("not_equal", np.not_equal),
    _compare("greater", np.greater),
    _compare("greater_equal", np.greater_equal),
    _compare("less", np.less),
    _compare("less_equal", np.less_equal),
    Sample(
        "pow",
        X,
        f"""
        fp16 h = const()[name=string("h"), val=fp16(-0.5)];
        {Y} = pow(x=x, y=h)[name=string("y")];
        """,
        lambda x: 1.0 / np.sqrt(x),
        low=0.01,
        ulps=0,
    ),
    Sample(
        "sub",
        "tensor<fp16, [1, 32, 1, 64]> x, tensor<fp16, [1, 1, 1, 64]> z",
        f"""
        fp16 one = const()[name=string("one"), val=fp16(0x1p+0)];
        {Y.replace("y", "t")} = sub(x=one, y=x)[name=string("t")];
        {Y} = mul(x=t, y=z)[name=string("y")];
        """,
        lambda x, z: half(1 - x).astype(np.float32) * z,
        ulps=0,
    ),
    Sample(
        "mul",
        X,
        blob("g", "fp16", "1, 32, 1, 1", "g.bin") + f'\n{Y} = mul(x=x, y=g)[name=string("y")];',
        lambda x, g: x * g,
        weights={"g.bin": _weight(1, 1, 32, 1, 1)},
        ulps=0,
    ),
    Sample(
        "select",
        "tensor<fp16, [1, 32, 1, 64]> x, tensor<fp16, [1, 32, 1, 1]> z",
        f"""
        fp16 zero = const()[name=string("zero"), val=fp16(0.0)];
        tensor<bool, [1, 32, 1, 1]> c = less(x=z, y=zero)[name=string("c")];
        {Y} = select(a=x, b=z, cond=c)[name=string("y")];
        """,
        lambda x, z: np.where(z < 0, x, z),
        ulps=0,
    ),
    Sample(
        "cast",
        "tensor<fp32, [1, 32, 1, 64]> x",
        """
        string h = const()[name=string("h"), val=string("fp16")];
        string f = const()[name=string("f"), val=string("fp32")];
        tensor<fp16, [1, 32, 1, 64]> a = cast(dtype=h, x=x)[name=string("a")];
        tensor<fp16, [1, 32, 1, 64]> b = mul(x=a, y=a)[name=string("b")];
        tensor<fp32, [1, 32, 1, 64]> y = cast(dtype=f, x=b)[name=string("y")];
        """,
        lambda x: half(x).astype(np.float32) ** 2,
        ulps=0,
    ),
    _unary("sigmoid", _sigmoid),
    _unary("silu", lambda x: x * _sigmoid(x)),
    _unary("exp", np.exp),
    _unary("exp2", np.exp2),
    _unary("tanh", np.tanh),
    _unary("relu", lambda x: np.maximum(x, 0), ulps=0),
    _unary("relu6", lambda x: np.clip(x, 0, 6), low=-9, high=9, ulps=0),
    _unary("abs", np.abs, ulps=0),
    _unary("ceil", np.ceil, low=-9, high=9, ulps=0),
    _unary("floor", np.floor, low=-9, high=9, ulps=0),
    _unary("round", np.round, low=-9, high=9, ulps=0),
    _unary("sign", np.sign, ulps=0),
    _unary("sin", np.sin),
    _unary("cos", np.cos),
    _unary("erf", _erf),
    _unary("sqrt", np.sqrt, low=0.0, ulps=0),
    _unary("square", lambda x: x * x, ulps=0),
    _unary("softplus", lambda x: np.log1p(np.exp(x.astype(np.float64)))),
    _unary("softsign", lambda x: x / (1 + np.abs(x))),
    _unary("identity", lambda x: x, ulps=0),
    _unary("gelu", lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    Sample(
        "gelu",
        X,
        f"""
        string m = const()[name=string("m"), val=string("TANH_APPROXIMATION")];
        {Y} = gelu(mode=m, x=x)[name=string("y")];
        """,
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    *(
        Sample(
            op,
            X,
            f"""
            fp16 e = const()[name=string("e"), val=fp16({value})];
            {Y} = {op}({parameter}=e, x=x)[name=string("y")];
            """,
            expected,
            low=low,
        )
        for op, parameter, value, low, expected in (
            ("rsqrt", "epsilon", "0.125", 0.0, lambda x: 1 / np.sqrt(x + 0.125)),
            ("log", "epsilon", "0.125", 0.0, lambda x: np.log(x + 0.125)),
            ("inverse", "epsilon", "0.125", 0.0, lambda x: 1 / (x + 0.125)),
            ("leaky_relu", "alpha", "0.25", -2.0, lambda x: np.where(x >= 0, x, 0.25 * x)),
            ("elu", "alpha", "0.5", -2.0, lambda x: np.where(x >= 0, x, 0.5 * np.expm1(x))),
            ("threshold", "alpha", "0.5", -2.0, lambda x: np.maximum(x, 0.5)),
        )
    ),
    *(
        Sample(
            op,
            X,
            f"""
            fp16 lo = const()[name=string("lo"), val=fp16(-0.5)];
            fp16 hi = const()[name=string("hi"), val=fp16(0.75)];
            {Y} = {op}(alpha=lo, beta=hi, x=x)[name=string("y")];
            """,
            expected,
        )
        for op, expected in (
            ("clip", lambda x: np.clip(x, -0.5, 0.75)),
            ("sigmoid_hard", lambda x: np.clip(-0.5 * x + 0.75, 0, 1)),
            ("linear_activation", lambda x: -0.5 * x + 0.75),
        )
    ),
    # ------------------------------------------------------------------------------------- shapes
    Sample(
        "reshape",
        X,
        """
        tensor<int32, [4]> sh = const()[name=string("sh"), val=tensor<int32, [4]>([1, 4, 8, -1])];
        tensor<fp16, [1, 4, 8, 64]> y = reshape(shape=sh, x=x)[name=string("y")];
        """,
        lambda x: x.reshape(1, 4, 8, 64),
        ulps=0,
    ),
    Sample(
        "expand_dims",
        "tensor<fp16, [32, 64]> x",
        """
        tensor<int32, [2]> ax = const()[name=string("ax"), val=tensor<int32, [2]>([0, 2])];
        tensor<fp16, [1, 32, 1, 64]> y = expand_dims(axes=ax, x=x)[name=string("y")];
        """,
        lambda x: x[None, :, None],
        ulps=0,
    ),
    Sample(
        "squeeze",
        X,
        """
        tensor<int32, [2]> ax = const()[name=string("ax"), val=tensor<int32, [2]>([0, -2])];
        tensor<fp16, [32, 64]> y = squeeze(axes=ax, x=x)[name=string("y")];
        """,
        lambda x: x[0, :, 0],
        ulps=0,
    ),
    *(
        Sample(
            "transpose",
            "tensor<fp16, [2, 48, 33, 64]> x",
            f"""
            tensor<int32, [4]> pm = const()[name=string("pm"), val=tensor<int32, [4]>({perm})];
            tensor<fp16, {[(2, 48, 33, 64)[p] for p in perm]}> y = transpose(perm=pm, x=x)\
[name=string("y")];
            """,
            lambda x, perm=tuple(perm): x.transpose(perm),
            ulps=0,
        )
        for perm in ([0, 1, 3, 2], [0, 2, 1, 3], [3, 0, 1, 2], [2, 3, 0, 1], [0, 1, 2, 3])
    ),
    Sample(
        "tile",
        "tensor<fp16, [1, 3, 1, 16]> x",
        """
        tensor<int32, [4]> rp = const()[name=string("rp"), val=tensor<int32, [4]>([2, 2, 3, 4])];
        tensor<fp16, [2, 6, 3, 64]> y = tile(reps=rp, x=x)[name=string("y")];
        """,
        lambda x: np.tile(x, (2, 2, 3, 4)),
        ulps=0,
    ),
    Sample(
        "slice_by_size",
        X,
        """
        tensor<int32, [4]> b0 = const()[name=string("b0"), val=tensor<int32, [4]>([0, 8, 0, 0])];
        tensor<int32, [4]> s0 = const()[name=string("s0"), val=tensor<int32, [4]>([1, 16, -1, 64])];
        tensor<fp16, [1, 16, 1, 64]> y = slice_by_size(begin=b0, size=s0, x=x)[name=string("y")];
        """,
        lambda x: x[:, 8:24],
        ulps=0,
    ),
    Sample(
        "slice_by_size",
        X,
        """
        tensor<int32, [4]> b0 = const()[name=string("b0"), val=tensor<int32, [4]>([0, 8, 0, 16])];
        tensor<int32, [4]> s0 = const()[name=string("s0"), val=tensor<int32, [4]>([1, 5, 1, 32])];
        tensor<fp16, [1, 5, 1, 32]> y = slice_by_size(begin=b0, size=s0, x=x)[name=string("y")];
        """,
        lambda x: x[:, 8:13, :, 16:48],
        ulps=0,
    ),
    Sample(
        "slice_by_index",
        X,
        """
        tensor<int32, [4]> bg = const()[name=string("bg"), val=tensor<int32, [4]>([0, 3, 0, 5])];
        tensor<int32, [4]> en = const()[name=string("en"), val=tensor<int32, [4]>([1, -1, 1, 9])];
        tensor<int32, [4]> sr = const()[name=string("sr"), val=tensor<int32, [4]>([1, 3, 1, 2])];
        tensor<bool, [4]> bm = const()[name=string("bm"), val=tensor<bool, [4]>([true, false, true, true])];
        tensor<bool, [4]> em = const()[name=string("em"), val=tensor<bool, [4]>([true, false, true, true])];
        tensor<bool, [4]> sm = const()[name=string("sm"), val=tensor<bool, [4]>([true, false, false, false])];
        tensor<fp16, [10, 1, 32]> y = slice_by_index(begin=bg, begin_mask=bm, end=en, end_mask=em, squeeze_mask=sm, stride=sr, x=x)[name=string("y")];
        """,
        lambda x: x[0, 3:-1:3, :, ::2],
        ulps=0,
    ),
    Sample(
        "split",
        X,
        """
        int32 ax = const()[name=string("ax"), val=int32(1)];
        tensor<int32, [3]> sz = const()[name=string("sz"), val=tensor<int32, [3]>([8, 16, 8])];
        tensor<fp16, [1, 8, 1, 64]> a, tensor<fp16, [1, 16, 1, 64]> b, tensor<fp16, [1, 8, 1, 64]> c = split(axis=ax, split_sizes=sz, x=x)[name=string("s")];
        tensor<fp16, [1, 8, 1, 64]> y = sub(x=a, y=c)[name=string("y")];
        """,
        lambda x: (x[:, 8:24], x[:, :8] - x[:, 24:]),
        outputs="b, y",
        ulps=0,
    ),
    Sample(
        "split",
        X,
        """
        int32 ax = const()[name=string("ax"), val=int32(-1)];
        int32 ns = const()[name=string("ns"), val=int32(2)];
        tensor<fp16, [1, 32, 1, 32]> a, tensor<fp16, [1, 32, 1, 32]> b = split(axis=ax, num_splits=ns, x=x)[name=string("s")];
        tensor<fp16, [1, 32, 1, 32]> y = sub(x=a, y=b)[name=string("y")];
        """,
        lambda x: x[..., :32] - x[..., 32:],
        ulps=0,
    ),
    Sample(
        "concat",
        "tensor<fp16, [1, 32, 1, 64]> x, tensor<fp16, [1, 16, 1, 64]> z",
        """
        int32 ax = const()[name=string("ax"), val=int32(1)];
        bool il = const()[name=string("il"), val=bool(false)];
        tensor<fp16, [1, 64, 1, 64]> y = concat(axis=ax, interleave=il, values=(z, x, z))[name=string("y")];
        """,
        lambda x, z: np.concatenate([z, x, z], 1),
        ulps=0,
    ),
    Sample(
        "concat",
        XY,
        """
        int32 ax = const()[name=string("ax"), val=int32(3)];
        bool il = const()[name=string("il"), val=bool(false)];
        tensor<fp16, [1, 32, 1, 128]> y = concat(axis=ax, interleave=il, values=(x, z))[name=string("y")];
        """,
        lambda x, z: np.concatenate([x, z], 3),
        ulps=0,
    ),
    # ----------------------------------------------------------------------------------- products
    Sample(
        "conv",
        X,
        CONV_CONSTANTS
        + blob("W", "fp16", "48, 32, 1, 1", "w.bin")
        + """
        tensor<fp16, [1, 48, 1, 64]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt, strides=st, weight=W, x=x)[name=string("y")];
        """,
        _conv,
        weights={"w.bin": _weight(2, 48, 32, 1, 1)},
    ),
    Sample(
        "conv",
        "tensor<fp16, [2, 16, 17, 16]> x",
        """
        string pt = const()[name=string("pt"), val=string("custom")];
        tensor<int32, [2]> st = const()[name=string("st"), val=tensor<int32, [2]>([2, 2])];
        tensor<int32, [4]> pd = const()[name=string("pd"), val=tensor<int32, [4]>([1, 1, 1, 1])];
        tensor<int32, [2]> dl = const()[name=string("dl"), val=tensor<int32, [2]>([1, 1])];
        int32 gr = const()[name=string("gr"), val=int32(4)];
        """
        + blob("W", "fp16", "24, 4, 3, 3", "w.bin")
        + """
        tensor<fp16, [2, 24, 9, 8]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt, strides=st, weight=W, x=x)[name=string("y")];
        """,
        lambda x, w: _conv(x, w, stride=2, pad=1, groups=4),
        weights={"w.bin": _weight(3, 24, 4, 3, 3)},
    ),
    Sample(
        "conv",
        "tensor<fp16, [1, 16, 64]> x, tensor<fp16, [32, 16, 3]> W",
        """
        string pt = const()[name=string("pt"), val=string("same")];
        tensor<fp16, [32]> bi = const()[name=string("bi"), val=tensor<fp16, [32]>(["""
        + ", ".join(f"{i / 8}" for i in range(32))
        + """])];
        tensor<fp16, [1, 32, 64]> y = conv(bias=bi, pad_type=pt, weight=W, x=x)[name=string("y")];
        """,
        lambda x, w: (
            _conv(np.pad(x, ((0, 0), (0, 0), (1, 1)))[:, :, None], w[:, :, None])[:, :, 0]
            + (np.arange(32) / 8)[None, :, None]
        ),
    ),
    Sample(
        "matmul",
        QK,
        BOOLS
        + """
        tensor<fp16, [1, 4, 64, 64]> y = matmul(transpose_x=no, transpose_y=yes, x=q, y=r)[name=string("y")];
        """,
        lambda q, r: _matmul(q, r.swapaxes(-1, -2)),
    ),
    Sample(
        "matmul",
        QK,
        BOOLS
        + """
        tensor<fp16, [1, 4, 32, 32]> y = matmul(transpose_x=yes, transpose_y=no, x=q, y=r)[name=string("y")];
        """,
        lambda q, r: _matmul(q.swapaxes(-1, -2), r),
    ),
    Sample(
        "matmul",
        "tensor<fp16, [1, 4, 64, 32]> q",
        BOOLS
        + blob("R", "fp16", "1, 4, 32, 24", "r.bin")
        + """
        tensor<fp16, [1, 4, 64, 24]> y = matmul(transpose_x=no, transpose_y=no, x=q, y=R)[name=string("y")];
        """,
        _matmul,
        weights={"r.bin": _weight(4, 1, 4, 32, 24)},
    ),
    Sample(
        "matmul",
        "tensor<fp16, [3, 1, 20, 32]> q, tensor<fp16, [5, 32, 600]> r",
        BOOLS
        + """
        tensor<fp16, [3, 5, 20, 600]> y = matmul(transpose_x=no, transpose_y=no, x=q, y=r)[name=string("y")];
        """,
        _matmul,
    ),
    Sample(
        "linear",
        "tensor<fp16, [1, 20, 32]> x",
        blob("W", "fp16", "48, 32", "w.bin")
        + blob("B", "fp16", "48", "z.bin")
        + """
        tensor<fp16, [1, 20, 48]> y = linear(bias=B, weight=W, x=x)[name=string("y")];
        """,
        lambda x, w, b: _matmul(x, w.T) + b,
        weights={"w.bin": _weight(5, 48, 32), "z.bin": _weight(6, 48)},
    ),
    Sample(
        "scaled_dot_product_attention",
        "tensor<fp16, [1, 4, 64, 16]> k, tensor<fp16, [1, 4, 32, 16]> q, "
        "tensor<fp16, [1, 4, 64, 48]> v",
        """
        tensor<fp16, [1, 4, 32, 48]> y = scaled_dot_product_attention(key=k, query=q, value=v)[name=string("y")];
        """,
        lambda k, q, v: _attention(q, k, v),
    ),
    # --------------------------------------------------------------------------------- reductions
    _reduce("reduce_sum", 1, True, lambda x: fold(x, 1, np.add)[:, None], ulps=0),
    _reduce("reduce_sum", 3, False, lambda x: fold(x, 3, np.add), ulps=0),
    _reduce(
        "reduce_mean", 1, True, lambda x: (fold(x, 1, np.add) / np.float32(32))[:, None], ulps=0
    ),
    _reduce("reduce_max", 3, True, lambda x: x.max(3, keepdims=True), ulps=0),
    _reduce("reduce_min", 1, False, lambda x: x.min(1), ulps=0),
    _reduce("reduce_l1_norm", 3, True, lambda x: fold(np.abs(x), 3, np.add)[..., None], ulps=0),
    _reduce(
        "reduce_l2_norm", 1, True, lambda x: np.sqrt((x.astype(np.float64) ** 2).sum(1))[:, None]
    ),
    _reduce("reduce_sum_square", 1, True, lambda x: fold(half(x * x), 1, np.add)[:, None], ulps=0),
    _reduce(
        "reduce_log_sum_exp",
        3,
        True,
        lambda x: np.log(np.exp(x.astype(np.float64)).sum(3, keepdims=True)),
    ),
    Sample(
        "reduce_max",
        "tensor<fp16, [3, 5, 7, 64]> x",
        """
        tensor<int32, [2]> ax = const()[name=string("ax"), val=tensor<int32, [2]>([0, 2])];
        bool kd = const()[name=string("kd"), val=bool(false)];
        tensor<fp16, [5, 64]> y = reduce_max(axes=ax, keep_dims=kd, x=x)[name=string("y")];
        """,
        lambda x: x.max((0, 2)),
        ulps=0,
    ),
    *(
        Sample(
            "softmax",
            "tensor<fp16, [2, 100, 1, 80]> x",
            f"""
            int32 ax = const()[name=string("ax"), val=int32({axis})];
            tensor<fp16, [2, 100, 1, 80]> y = softmax(axis=ax, x=x)[name=string("y")];
            """,
            lambda x, axis=axis: _softmax(x, axis),
            low=-9.0,
            high=9.0,
        )
        for axis in (-1, 1)
    ),
    Sample(
        "layer_norm",
        X,
        """
        tensor<int32, [1]> ax = const()[name=string("ax"), val=tensor<int32, [1]>([1])];
        fp16 ep = const()[name=string("ep"), val=fp16(0x1.4fp-17)];
        """.replace("0x1.4fp-17", "0x1p-14")
        + blob("G", "fp16", "32", "g.bin")
        + blob("H", "fp16", "32", "h.bin")
        + f"""
        {Y} = layer_norm(axes=ax, beta=H, epsilon=ep, gamma=G, x=x)[name=string("y")];
        """,
        lambda x, g, h: _layer_norm(x, g, h),
        weights={"g.bin": _weight(7, 32), "h.bin": _weight(8, 32)},
        ulps=2,
    ),
    # ------------------------------------------------------------------------------------- 8 bits
    Sample(
        "constexpr_affine_dequantize",
        X,
        """
        tensor<fp16, [32, 1, 1]> W = constexpr_affine_dequantize()[axis=int32(0), name=string("W"), quantized_data=tensor<int8, [32, 1, 1]>(BLOBFILE(path=string("@model_path/weights/q.bin"), offset=uint64(64))), scale=tensor<fp16, [32]>(BLOBFILE(path=string("@model_path/weights/s.bin"), offset=uint64(64))), zero_point=int8(3)];
        """
        + f'{Y} = mul(x=x, y=W)[name=string("y")];',
        lambda x, q, s: (
            x
            * half((q.reshape(-1).astype(np.float32) - 3) * s)
            .astype(np.float32)
            .reshape(1, 32, 1, 1)
        ),
        weights={
            "q.bin": np.arange(-16, 16, dtype=np.int8).reshape(32, 1, 1),
            "s.bin": np.abs(_weight(9, 32)),
        },
        ulps=0,
    ),
    Sample(
        "constexpr_blockwise_shift_scale",
        X,
        CONV_CONSTANTS
        + blob("Q", "int8", "48, 32, 1, 1", "q.bin")
        + blob("S", "fp16", "48, 1, 1, 1", "s.bin")
        + """
        tensor<fp16, [48, 32, 1, 1]> W = constexpr_blockwise_shift_scale(data=Q, scale=S)[name=string("W")];
        tensor<fp16, [1, 48, 1, 64]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt, strides=st, weight=W, x=x)[name=string("y")];
        """,
        lambda x, q, s: _conv(x, half(q.astype(np.float32) * s)),
        weights={
            "q.bin": np.random.default_rng(10).integers(-127, 128, (48, 32, 1, 1)).astype(np.int8),
            "s.bin": np.abs(_weight(11, 48, 1, 1, 1)) / 64,
        },
    ),
    Sample(
        "constexpr_lut_to_dense",
        X,
        """
        tensor<fp16, [1, 32, 1, 1]> W = constexpr_lut_to_dense()[indices=tensor<uint8, [8]>([27, 27, 228, 0, 255, 1, 2, 3]), lut=tensor<fp16, [4]>([-1.0, -0.25, 0.5, 2.0]), name=string("W"), shape=tensor<uint32, [4]>([1, 32, 1, 1])];
        """
        + f'{Y} = mul(x=x, y=W)[name=string("y")];',
        lambda x: (
            x
            * np.array([-1.0, -0.25, 0.5, 2.0], np.float32)[
                [b >> s & 3 for b in (27, 27, 228, 0, 255, 1, 2, 3) for s in (0, 2, 4, 6)]
            ].reshape(1, 32, 1, 1)
        ),
        ulps=0,
    ),
    Sample(
        "quantize",
        X,
        """
        fp16 sc = const()[name=string("sc"), val=fp16(0x1p-7)];
        string dt = const()[name=string("dt"), val=string("int8")];
        tensor<int8, [1, 32, 1, 64]> y = quantize(input=x, output_dtype=dt, scale=sc)[name=string("y")];
        """,
        lambda x: np.clip(np.round(x * 128), -128, 127),
        ulps=0,
    ),
    Sample(
        "dequantize",
        "tensor<uint8, [1, 32, 1, 64]> x",
        f"""
        fp16 sc = const()[name=string("sc"), val=fp16(0x1p-7)];
        uint8 zp = const()[name=string("zp"), val=uint8(50)];
        {Y} = dequantize(input=x, scale=sc, zero_point=zp)[name=string("y")];
        """,
        lambda x: (x - 50) / 128,
        ulps=0,
    ),
    # ---------------------------------------------------------------------------- whole fragments
    Sample(
        "const",
        X,
        """
        fp16 sc = const()[name=string("sc"), val=fp16(0.25)];
        fp16 inv = const()[name=string("inv"), val=fp16(0x1p-5)];
        fp16 ep = const()[name=string("ep"), val=fp16(1e-3)];
        fp16 nh = const()[name=string("nh"), val=fp16(-0.5)];
        """
        + CONV_CONSTANTS
        + blob("ones", "fp16", "1, 32, 1, 1", "o.bin")
        + blob("rw", "fp16", "1, 32, 1, 1", "w.bin")
        + f"""
        tensor<fp16, [1, 32, 1, 64]> xs = mul(x=x, y=sc)[name=string("xs")];
        tensor<fp16, [1, 32, 1, 64]> sq = mul(x=xs, y=xs)[name=string("sq")];
        tensor<fp16, [1, 1, 1, 64]> ss = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt, strides=st, weight=ones, x=sq)[name=string("ss")];
        tensor<fp16, [1, 1, 1, 64]> ms = mul(x=ss, y=inv)[name=string("ms")];
        tensor<fp16, [1, 1, 1, 64]> me = add(x=ms, y=ep)[name=string("me")];
        tensor<fp16, [1, 1, 1, 64]> rs = pow(x=me, y=nh)[name=string("rs")];
        tensor<fp16, [1, 32, 1, 64]> xn = mul(x=xs, y=rs)[name=string("xn")];
        {Y} = mul(x=xn, y=rw)[name=string("y")];
        """,
        lambda x, o, w: _rmsnorm(x, w),
        weights={"o.bin": np.ones((1, 32, 1, 1), np.float16), "w.bin": _weight(12, 1, 32, 1, 1)},
        ulps=2,
    ),
]
