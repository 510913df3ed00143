"""Samples of operations that compute element by element, reduce, or normalise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mil_text import XY, Array, Sample, X, Y, blob, fold, half, weight


def _unary(op: str, expected: Callable[[Array], Any], **options: Any) -> Sample:
    return Sample(op, X, f'{Y} = {op}(x=x)[name=string("y")];', expected, **options)


def _binary(op: str, expected: Callable[[Array, Array], Any], **options: Any) -> Sample:
    options.setdefault("ulps", 0)
    return Sample(op, XY, f'{Y} = {op}(x=x, y=z)[name=string("y")];', expected, **options)


def _compare(op: str, expected: Callable[[Array, Array], Any]) -> Sample:
    body = f"""
        tensor<fp16, [1, 32, 1, 64]> xf = floor(x=x)[name=string("xf")];
        tensor<fp16, [1, 32, 1, 64]> zf = floor(x=z)[name=string("zf")];
        tensor<bool, [1, 32, 1, 64]> c = {op}(x=xf, y=zf)[name=string("c")];
        fp16 one = const()[name=string("one"), val=fp16(1.0)];
        fp16 two = const()[name=string("two"), val=fp16(0x1p+1)];
        {Y} = select(a=one, b=two, cond=c)[name=string("y")];
    """
    return Sample(
        op,
        XY,
        body,
        lambda x, z: np.where(expected(np.floor(x), np.floor(z)), 1.0, 2.0),
        ulps=0,
    )


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x.astype(np.float64))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x.astype(np.float64)))


def softmax(x: Array, axis: int) -> Array:
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


def _layer_norm(x: Array, g: Array, b: Array) -> Array:
    x = x.astype(np.float64)
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - mean) / np.sqrt(var + 2.0**-14) * g.reshape(1, -1, 1, 1) + b.reshape(1, -1, 1, 1)


SAMPLES: list[Sample] = [
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
        weights={"g.bin": weight(1, 1, 32, 1, 1)},
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
            lambda x, axis=axis: softmax(x, axis),
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
        fp16 ep = const()[name=string("ep"), val=fp16(0x1p-14)];
        """
        + blob("G", "fp16", "32", "g.bin")
        + blob("H", "fp16", "32", "h.bin")
        + f"""
        {Y} = layer_norm(axes=ax, beta=H, epsilon=ep, gamma=G, x=x)[name=string("y")];
        """,
        lambda x, g, h: _layer_norm(x, g, h),
        weights={"g.bin": weight(7, 32), "h.bin": weight(8, 32)},
        ulps=2,
    ),
]
