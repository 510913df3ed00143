"""Samples of operations that move elements, multiply matrices, or read 8-bit numbers."""

from __future__ import annotations

import math

import numpy as np
from mil_samples_elementwise import softmax
from mil_text import BOOLS, CONV_CONSTANTS, XY, Array, Sample, X, Y, blob, half, weight


def _conv(x: Array, w: Array, stride: int = 1, pad: int = 0, groups: int = 1) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))).astype(np.float64)
    n, _, h, v = x.shape
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


QK = "tensor<fp16, [1, 4, 64, 32]> q, tensor<fp16, [1, 4, 64, 32]> r"


def _matmul(a: Array, b: Array) -> Array:
    return a.astype(np.float64) @ b.astype(np.float64)


def _attention(q: Array, k: Array, v: Array) -> Array:
    return _matmul(softmax(_matmul(q, k.swapaxes(-1, -2)) / math.sqrt(q.shape[-1]), -1), v)


def _rmsnorm(x: Array, w: Array) -> Array:
    scaled = half(x * np.float32(0.25)).astype(np.float32)
    squares = half(scaled * scaled)
    total = half(_conv(squares, np.ones((1, 32, 1, 1))))
    mean = half(total.astype(np.float32) * np.float32(1 / 32))
    eps = half(mean.astype(np.float32) + half(1e-3).astype(np.float32))
    r = half(1.0 / np.sqrt(eps.astype(np.float32))).astype(np.float32)
    y = half(scaled * r).astype(np.float32)
    return y * w.reshape(1, -1, 1, 1)


SAMPLES: list[Sample] = [
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
        tensor<int32, [4]> s0 = const()[name=string("s0"), val=tensor<int32, [4]>([1, 16, -1,
            64])];
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
        tensor<bool, [4]> bm = const()[name=string("bm"), val=tensor<bool, [4]>([true, false,
            true, true])];
        tensor<bool, [4]> em = const()[name=string("em"), val=tensor<bool, [4]>([true, false,
            true, true])];
        tensor<bool, [4]> sm = const()[name=string("sm"), val=tensor<bool, [4]>([true, false,
            false, false])];
        tensor<fp16, [10, 1, 32]> y = slice_by_index(begin=bg, begin_mask=bm, end=en,
            end_mask=em, squeeze_mask=sm, stride=sr, x=x)[name=string("y")];
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
        tensor<fp16, [1, 8, 1, 64]> a, tensor<fp16, [1, 16, 1, 64]> b, tensor<fp16, [1, 8, 1,
            64]> c = split(axis=ax, split_sizes=sz, x=x)[name=string("s")];
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
        tensor<fp16, [1, 32, 1, 32]> a, tensor<fp16, [1, 32, 1, 32]> b = split(axis=ax,
            num_splits=ns, x=x)[name=string("s")];
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
        tensor<fp16, [1, 64, 1, 64]> y = concat(axis=ax, interleave=il, values=(z, x,
            z))[name=string("y")];
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
        tensor<fp16, [1, 32, 1, 128]> y = concat(axis=ax, interleave=il, values=(x,
            z))[name=string("y")];
        """,
        lambda x, z: np.concatenate([x, z], 3),
        ulps=0,
    ),
    Sample(
        "conv",
        X,
        CONV_CONSTANTS
        + blob("W", "fp16", "48, 32, 1, 1", "w.bin")
        + """
        tensor<fp16, [1, 48, 1, 64]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt,
            strides=st, weight=W, x=x)[name=string("y")];
        """,
        _conv,
        weights={"w.bin": weight(2, 48, 32, 1, 1)},
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
        tensor<fp16, [2, 24, 9, 8]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt,
            strides=st, weight=W, x=x)[name=string("y")];
        """,
        lambda x, w: _conv(x, w, stride=2, pad=1, groups=4),
        weights={"w.bin": weight(3, 24, 4, 3, 3)},
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
        tensor<fp16, [1, 4, 64, 64]> y = matmul(transpose_x=no, transpose_y=yes, x=q,
            y=r)[name=string("y")];
        """,
        lambda q, r: _matmul(q, r.swapaxes(-1, -2)),
    ),
    Sample(
        "matmul",
        QK,
        BOOLS
        + """
        tensor<fp16, [1, 4, 32, 32]> y = matmul(transpose_x=yes, transpose_y=no, x=q,
            y=r)[name=string("y")];
        """,
        lambda q, r: _matmul(q.swapaxes(-1, -2), r),
    ),
    Sample(
        "matmul",
        "tensor<fp16, [1, 4, 64, 32]> q",
        BOOLS
        + blob("R", "fp16", "1, 4, 32, 24", "r.bin")
        + """
        tensor<fp16, [1, 4, 64, 24]> y = matmul(transpose_x=no, transpose_y=no, x=q,
            y=R)[name=string("y")];
        """,
        _matmul,
        weights={"r.bin": weight(4, 1, 4, 32, 24)},
    ),
    Sample(
        "matmul",
        "tensor<fp16, [3, 1, 20, 32]> q, tensor<fp16, [5, 32, 600]> r",
        BOOLS
        + """
        tensor<fp16, [3, 5, 20, 600]> y = matmul(transpose_x=no, transpose_y=no, x=q,
            y=r)[name=string("y")];
        """,
        _matmul,
    ),
    # A matrix times a vector; a reduction too long to be batched, of a width that needs padding.
    *(
        Sample(
            "matmul",
            f"tensor<fp16, {list(x)}> q, tensor<fp16, {list(y)}> r",
            BOOLS
            + f"tensor<fp16, {[*x[:-1], y[-1]]}> y = matmul(transpose_x=no, transpose_y=no, x=q, "
            'y=r)[name=string("y")];',
            _matmul,
        )
        for x, y in (((2, 50, 64), (2, 64, 1)), ((2, 7, 1100), (2, 1100, 40)), ((3, 80), (80, 70)))
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
        weights={"w.bin": weight(5, 48, 32), "z.bin": weight(6, 48)},
    ),
    Sample(
        "scaled_dot_product_attention",
        "tensor<fp16, [1, 4, 64, 16]> k, tensor<fp16, [1, 4, 32, 16]> q, "
        "tensor<fp16, [1, 4, 64, 48]> v",
        """
        tensor<fp16, [1, 4, 32, 48]> y = scaled_dot_product_attention(key=k, query=q,
            value=v)[name=string("y")];
        """,
        lambda k, q, v: _attention(q, k, v),
    ),
    Sample(
        "constexpr_affine_dequantize",
        X,
        """
        tensor<fp16, [32, 1, 1]> W = constexpr_affine_dequantize()[axis=int32(0),
            name=string("W"), quantized_data=tensor<int8, [32, 1,
                1]>(BLOBFILE(path=string("@model_path/weights/q.bin"), offset=uint64(64))),
                    scale=tensor<fp16, [32]>(BLOBFILE(path=string("@model_path/weights/s.bin"),
                        offset=uint64(64))), zero_point=int8(3)];
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
            "s.bin": np.abs(weight(9, 32)),
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
        tensor<fp16, [48, 32, 1, 1]> W = constexpr_blockwise_shift_scale(data=Q,
            scale=S)[name=string("W")];
        tensor<fp16, [1, 48, 1, 64]> y = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt,
            strides=st, weight=W, x=x)[name=string("y")];
        """,
        lambda x, q, s: _conv(x, half(q.astype(np.float32) * s)),
        weights={
            "q.bin": np.random.default_rng(10).integers(-127, 128, (48, 32, 1, 1)).astype(np.int8),
            "s.bin": np.abs(weight(11, 48, 1, 1, 1)) / 64,
        },
    ),
    Sample(
        "constexpr_lut_to_dense",
        X,
        """
        tensor<fp16, [1, 32, 1, 1]> W = constexpr_lut_to_dense()[indices=tensor<uint8,
            [8]>([27, 27, 228, 0, 255, 1, 2, 3]), lut=tensor<fp16, [4]>([-1.0, -0.25, 0.5,
                2.0]), name=string("W"), shape=tensor<uint32, [4]>([1, 32, 1, 1])];
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
        tensor<int8, [1, 32, 1, 64]> y = quantize(input=x, output_dtype=dt,
            scale=sc)[name=string("y")];
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
        tensor<fp16, [1, 1, 1, 64]> ss = conv(dilations=dl, groups=gr, pad=pd, pad_type=pt,
            strides=st, weight=ones, x=sq)[name=string("ss")];
        tensor<fp16, [1, 1, 1, 64]> ms = mul(x=ss, y=inv)[name=string("ms")];
        tensor<fp16, [1, 1, 1, 64]> me = add(x=ms, y=ep)[name=string("me")];
        tensor<fp16, [1, 1, 1, 64]> rs = pow(x=me, y=nh)[name=string("rs")];
        tensor<fp16, [1, 32, 1, 64]> xn = mul(x=xs, y=rs)[name=string("xn")];
        {Y} = mul(x=xn, y=rw)[name=string("y")];
        """,
        lambda x, o, w: _rmsnorm(x, w),
        weights={"o.bin": np.ones((1, 32, 1, 1), np.float16), "w.bin": weight(12, 1, 32, 1, 1)},
        ulps=2,
    ),
]
