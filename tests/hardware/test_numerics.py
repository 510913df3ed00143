"""The simulator's arithmetic: cases measured on hardware, and a second statement of every rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import needs
import numpy as np
import pytest
from mil_text import blob, program

from anepy.hardware.headroom import headroom
from anepy.hardware.program import Program
from anepy.models.model import Model, ModelConfig

Array = np.ndarray[Any, np.dtype[Any]]
UNIT = 2.0**-16
CONSTANTS = """string pt = const()[name=string("pt"), val=string("valid")];
tensor<int32, [2]> st = const()[name=string("st"), val=tensor<int32, [2]>([1,1])];
tensor<int32, [4]> pd = const()[name=string("pd"), val=tensor<int32, [4]>([0,0,0,0])];
int32 gr = const()[name=string("gr"), val=int32(1)];
bool no = const()[name=string("no"), val=bool(false)];
"""


# ------------------------------------------------------------------------- the rules, once more


def value(codes: Array) -> Array:
    """Read fp16 codes as numbers; those of infinity and NaN as the large ones they would be."""
    bits = codes.view(np.uint16).astype(np.int64)
    exponent, fraction = bits >> 10 & 31, bits & 1023
    size = np.where(exponent == 0, fraction * 2.0**-24, (fraction + 1024) * 2.0 ** (exponent - 25))
    return np.where(bits & 0x8000, -size, size)


def away(x: Array) -> Array:
    """Round float64 to the nearest integers, halves away from zero."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def rounded(x: Array) -> Array:
    """Round float64 to fp16, halves away from zero; infinite beyond 65504."""
    _, exponent = np.frexp(x)
    step = 2.0 ** np.maximum(exponent - 11.0, -24.0)
    result = away(x / step) * step
    return np.where(np.abs(result) > 65504, np.copysign(np.inf, x), result).astype(np.float16)


def exponents(x: Array) -> Array:
    return np.maximum(np.frexp(x)[1] - 1, -14)


def fixed_sum(a: Array, b: Array, bias: float = 0.0) -> Array:
    """Sum a b over the first axis, step by step, in multiples of 2^-16."""
    a, b = value(a), value(b)
    total = away(np.full(np.broadcast(a, b).shape[1:], bias) / UNIT)
    stuck = np.where(np.abs(total) >= 2**31, np.sign(total), 0)
    for x, w in zip(a, b, strict=True):
        product = away(x * w / UNIT)
        product = np.where((exponents(x) + exponents(w) <= -17) | (x * w == 0), 0, product)
        total = total + product
        stuck = np.where((stuck == 0) & (np.abs(total) >= 2**31), np.sign(total), stuck)
    with np.errstate(invalid="ignore"):
        result = rounded(np.where(stuck != 0, np.inf * stuck, total * UNIT))
    return result + np.float16(0)  # no -0


def same(got: Array, expected: Array) -> None:
    wrong = got.view(np.uint16) != expected.view(np.uint16)
    assert not wrong.any(), (wrong.sum(), got[wrong][:5], expected[wrong][:5])


# ------------------------------------------------------------------------------ as programs


def conv(x: Array, w: Array, bias: Array | None = None, device: str = "sim") -> Array:
    """Multiply x [k, n] by w [m, k] as a convolution."""
    (k, n), m = x.shape, len(w)
    weights = {"w.bin": w.reshape(m, k, 1, 1)}
    text = CONSTANTS + (
        f'tensor<fp16, [{m},{k},1,1]> W = const()[name=string("W"), val=tensor<fp16, [{m},{k},1,1]>'
        '(BLOBFILE(path=string("@model_path/weights/w.bin"), offset=uint64(64)))];\n'
    )
    more = ""
    if bias is not None:
        weights["b.bin"] = bias
        more = "bias=B, "
        text += (
            f'tensor<fp16, [{m}]> B = const()[name=string("B"), val=tensor<fp16, [{m}]>'
            '(BLOBFILE(path=string("@model_path/weights/b.bin"), offset=uint64(64)))];\n'
        )
    text += (
        f"tensor<fp16, [1,{m},1,{n}]> y = conv({more}dilations=st, groups=gr, pad=pd, pad_type=pt, "
        'strides=st, weight=W, x=x)[name=string("y")];'
    )
    made = Program(program(f"tensor<fp16, [1,{k},1,{n}]> x", text), weights, device)
    return made(x=x[None, :, None])[0, :, 0]


def matmul(x: Array, w: Array, device: str = "sim") -> Array:
    (k, n), m = x.shape, len(w)
    text = CONSTANTS + (
        f"tensor<fp16, [1,1,{m},{n}]> y = matmul(transpose_x=no, transpose_y=no, x=a, y=b)"
        '[name=string("y")];'
    )
    made = Program(
        program(f"tensor<fp16, [1,1,{m},{k}]> a, tensor<fp16, [1,1,{k},{n}]> b", text), None, device
    )
    return made(a=w[None, None], b=x[None, None])[0, 0]


def pairwise(op: str, x: Array, y: Array, device: str = "sim") -> Array:
    shape = f"tensor<fp16, [1,1,1,{len(x)}]>"
    text = program(f"{shape} a, {shape} b", f'{shape} y = {op}(x=a, y=b)[name=string("y")];')
    return Program(text, None, device)(a=x[None, None, None], b=y[None, None, None])[0, 0, 0]


def activation(op: str, x: Array, device: str = "sim") -> Array:
    shape = f"tensor<fp16, [1,1,1,{len(x)}]>"
    mode = 'mode=string("EXACT"), ' if op == "gelu" else ""
    text = program(f"{shape} x", f'{shape} y = {op}({mode}x=x)[name=string("y")];')
    return Program(text, None, device)(x=x[None, None, None])[0, 0, 0]


# ------------------------------------------------------------------------- measured on hardware


def number(x: float | str) -> np.float16:
    return np.uint16(0x7E00).view(np.float16) if x == "nan" else np.float16(float(x))


def measured(kind: str) -> list[dict[str, Any]]:
    path = needs.data("ane-measured/numerics.json")
    cases: list[dict[str, Any]] = json.loads(path.read_text())[kind]
    return cases


@pytest.mark.parametrize("multiply", [conv, matmul])
def test_sums_are_those_measured(multiply: Callable[..., Array]) -> None:
    cases = measured("mac")
    assert len(cases) == 96
    for case in cases:
        x = np.array([[number(v)] * 16 for v in case["x"]])
        got = multiply(x, np.full((1, len(x)), case["w"], np.float16), device="sim:m4")
        same(got, np.full((1, 16), number(case["y"])))


def test_elementwise_operations_are_those_measured() -> None:
    for case in measured("elementwise"):
        x, y = (np.full(32, number(case[name])) for name in "xy")
        same(pairwise(case["op"], x, y, "sim:m4"), np.full(32, number(case["z"])))


RANGES = {
    "sigmoid": (-12, 12), "tanh": (-6, 6), "silu": (-12, 12), "gelu": (-8, 8), "erf": (-4, 4),
    "sin": (-8, 8), "exp": (-12, 10), "log": (2**-10, 1000), "sqrt": (2**-10, 1000),
    "rsqrt": (2**-6, 1000), "inverse": (2**-6, 1000),
}  # fmt: skip
EXACT: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "erf": np.vectorize(math.erf),
    "sin": np.sin,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "inverse": lambda x: 1 / x,
}


@pytest.mark.parametrize("op", RANGES)
def test_worst_error_of_an_activation_is_that_measured(op: str) -> None:
    """On the ranges of the study; the default epsilon of inverse is in its error."""
    found: dict[str, Any] = json.loads(needs.data("ane-measured/numerics.json").read_text())
    bounds = found["activations"]
    grid = np.arange(65536, dtype=np.uint16).view(np.float16)
    low, high = RANGES[op]
    with np.errstate(invalid="ignore"):
        x = grid[(grid >= low) & (grid <= high) & (np.abs(grid) >= 2.0**-14)]
    exact = EXACT[op](x.astype(np.float64))
    error = np.abs(activation(op, x).astype(np.float64) - exact)
    step = 2.0 ** np.maximum(np.frexp(exact)[1] - 11.0, -24)
    worst = error.max() if op in bounds["max_abs_error"] else (error / step).max()
    expected = bounds["max_abs_error"].get(op) or bounds["max_ulp"][op]
    assert worst == pytest.approx(expected, rel=0.1)


# ------------------------------------------------------------------------ against the second model


def draw(rng: np.random.Generator, *shape: int, low: int = -24, high: int = 3) -> Array:
    """Numbers of all exponents, some zero, some just a power of two."""
    size = 2.0 ** rng.integers(low, high, shape) * rng.choice([1.0, 1.5, rng.uniform(1, 2)], shape)
    return (size * rng.choice([-1, 1, 0], shape, p=[0.45, 0.45, 0.1])).astype(np.float16)


SPREADS = {
    "small": (-24, -2), "usual": (-14, 2), "wide": (-24, 8), "large": (-2, 9), "huge": (4, 16)
}  # fmt: skip


@pytest.mark.parametrize("spread", SPREADS)
def test_sums_follow_the_rules(spread: str) -> None:
    """Drops, halves, partial sums beyond the range, in shapes that fill no tile."""
    rng = np.random.default_rng(list(SPREADS).index(spread))
    low, high = SPREADS[spread]
    for m, k, n in ((1, 1, 16), (3, 33, 16), (7, 100, 80), (4, 200, 64), (9, 17, 300)):
        x, w = draw(rng, k, n, low=low, high=high), draw(rng, m, k, low=low, high=high)
        bias = draw(rng, m, low=-20, high=15)
        expected = np.array([fixed_sum(x, row[:, None]) for row in w])
        same(conv(x, w), expected)
        same(matmul(x, w), expected)
        started = [fixed_sum(x, row[:, None], float(b)) for row, b in zip(w, bias, strict=True)]
        same(conv(x, w, bias), np.array(started))


def test_products_of_every_form_follow_the_rules() -> None:
    """linear with a bias, a matmul of transposed factors, one of vectors, a conv of two groups."""
    rng = np.random.default_rng(6)
    k, n, m = 33, 16, 6
    for low, high in SPREADS.values():
        x, w = draw(rng, k, n, low=low, high=high), draw(rng, m, k, low=low, high=high)
        bias = draw(rng, m, low=-20, high=15)
        expected = np.array([fixed_sum(x, row[:, None]) for row in w])
        text = blob("W", "fp16", f"{m},{k}", "w.bin") + blob("B", "fp16", f"{m}", "b.bin")
        text += f'tensor<fp16, [{n},{m}]> y = linear(x=x, weight=W, bias=B)[name=string("y")];'
        made = Program(program(f"tensor<fp16, [{n},{k}]> x", text), {"w.bin": w, "b.bin": bias})
        started = [fixed_sum(x, row[:, None], float(b)) for row, b in zip(w, bias, strict=True)]
        same(np.ascontiguousarray(made(x=x.T).T), np.array(started))
        for inputs, out, flag, a, b in (
            (f"[1,{k},{m}]> a, tensor<fp16, [1,{n},{k}]> b", f"1,{m},{n}", "true", w.T, x.T),
            (f"[{n},{m},{k}]> a, tensor<fp16, [{n},{k},1]> b", f"{n},{m},1", "false", w, x.T),
        ):
            text = f'bool f = const()[name=string("f"), val=bool({flag})];'
            text += f"tensor<fp16, [{out}]> y = matmul(transpose_x=f, transpose_y=f, x=a, y=b)"
            made = Program(program("tensor<fp16, " + inputs, text + '[name=string("y")];'))
            if flag == "true":
                same(made(a=a[None], b=b[None])[0], expected)
                continue
            got = made(a=np.broadcast_to(a, (n, m, k)), b=b[:, :, None])[:, :, 0]
            same(np.ascontiguousarray(got.T), expected)
        groups = CONSTANTS.replace("int32(1)", "int32(2)") + blob(
            "W", "fp16", f"{m},{k},1,1", "w.bin"
        )
        groups += f"tensor<fp16, [1,{m},1,{n}]> y = conv(dilations=st, groups=gr, pad=pd, "
        groups += 'pad_type=pt, strides=st, weight=W, x=x)[name=string("y")];'
        made = Program(
            program(f"tensor<fp16, [1,{2 * k},1,{n}]> x", groups), {"w.bin": w.reshape(m, k, 1, 1)}
        )
        other = x[::-1]
        half = [fixed_sum(other, row[:, None]) for row in w[m // 2 :]]
        both = np.concatenate([x, other])[None, :, None]
        same(made(x=both)[0, :, 0], np.array([*expected[: m // 2], *half]))


def test_sums_near_the_limit_depend_on_their_order() -> None:
    rng = np.random.default_rng(5)
    x = rng.choice(np.array([8000, -8000, 4000, -4000, 0.5], np.float16), (40, 500))
    w = np.ones((2, 40), np.float16)
    expected = np.array([fixed_sum(x, row[:, None]) for row in w])
    assert 0.1 < np.isinf(expected).mean() < 0.9
    same(conv(x, w), expected)


def test_every_code_is_read_as_a_number() -> None:
    """All 65536 codes times 1/16: those of infinity and NaN too."""
    codes = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, -1)
    for factor in (0.0625, -0.25):
        w = np.array([[factor]], np.float16)
        same(matmul(codes, w)[0], fixed_sum(codes, w[0][:, None]))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "real_div"])
def test_elementwise_operations_follow_the_rules(op: str) -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.integers(0, 65536, 30000, dtype=np.uint16).view(np.float16) for _ in range(2))
    y = np.where(value(y) == 0, np.float16(1), y)
    calculate = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide}[op]
    same(pairwise(op, x, y), rounded(calculate(value(x), value(y))))


def test_sums_in_parts_of_a_long_reduction_are_the_same() -> None:
    """More steps than a thread has room for at once."""
    rng = np.random.default_rng(2)
    x, w = draw(rng, 16000, 16, low=-12, high=-2), draw(rng, 1, 16000, low=-12, high=-2)
    same(matmul(x, w)[0], fixed_sum(x, w[0][:, None]))
    same(matmul(64 * x, 64 * w)[0], fixed_sum(64 * x, (64 * w)[0][:, None]))


def test_results_are_the_same_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(3)
    x, w = draw(rng, 96, 300, low=-14, high=6), draw(rng, 200, 96, low=-14, high=6)
    text = CONSTANTS + (
        "tensor<fp16, [1,1,200,300]> y = matmul(transpose_x=no, transpose_y=no, x=a, y=b)"
        '[name=string("y")];'
    )
    inputs = "tensor<fp16, [1,1,200,96]> a, tensor<fp16, [1,1,96,300]> b"
    outs = [
        Program(program(inputs, text), threads=n)(a=w[None, None], b=x[None, None]) for n in (1, 3)
    ]
    same(outs[0], outs[1])


def test_names_choose_the_arithmetic() -> None:
    one = np.array([2048, 1], np.float16)[:, None].repeat(16, 1)
    ones = np.ones((1, 2), np.float16)
    found = {
        name: (float(conv(one, ones, device=f"sim:numerics={name}")[0, 0]),
               float(conv(16 * one, ones, device=f"sim:numerics={name}")[0, 0]))
        for name in ("fixed", "flush", "float", "exact")
    }  # fmt: skip
    assert found == {
        "fixed": (2050.0, math.inf),
        "flush": (2050.0, math.inf),
        "float": (2050.0, 32800.0),
        "exact": (2048.0, 32768.0),
    }


def test_headroom_tells_the_largest_sum_of_each_product_of_a_step() -> None:
    """Sums of the backward pass grow with the loss scale, those of the forward pass do not."""
    model = Model.init(ModelConfig(64, 96, 2, 4, 2, 160, 64), seed=1)
    ids = np.random.default_rng(0).integers(0, 160, 65, dtype=np.int32)
    low, high, beyond = (
        {(h.program, h.result): h for h in headroom(model, ids[:-1], ids[1:], loss_scale=scale)}
        for scale in (256.0, 4096.0, 2.0**26)
    )
    assert low.keys() == high.keys() == beyond.keys() and len(low) > 20
    assert list(high.values()) == sorted(high.values(), key=lambda item: item.factor)
    for (program_name, result), item in low.items():
        assert 0 < item.largest < 32768 and item.factor == 32768 / item.largest
        if program_name.endswith("_fwd"):
            assert high[program_name, result].largest == item.largest
    dx = ("qkv_bwd", next(result for name, result in low if name == "qkv_bwd"))
    assert high[dx].largest == pytest.approx(16 * low[dx].largest, rel=0.05)
    assert any(item.factor < 1 for item in beyond.values())


def test_codes_that_only_move_stay_as_they_are() -> None:
    codes = np.array([0x7C00, 0x7E00, 0x7FFF, 0x7C01] * 8, np.uint16).view(np.float16)
    same(activation("identity", codes), codes)
