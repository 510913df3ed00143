"""Named tolerances of the tests, each with its reason, and the measures they are meant for.

Raising one needs a reason in the diff.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# --- float64: the reference against itself and against autograd

# Five-point differences at 3e-4: rounding of the loss 1e-12, curvature up to a few 1e-10.
FLOAT64_FINITE_DIFFERENCE = 2e-9
# Two float64 programs that sum in another order: a few hundred roundings of 1e-16.
FLOAT64_GRADIENT = 1e-11

# --- fp32 products: eps is 6e-8; sums of 1e3..1e4 terms through 12 layers lose about three digits

# Per-tensor relative error of gradients (docs/architecture.md#numerics); PyTorch has 2e-6..5e-6.
FP32_GRADIENT = 5e-5
# Nothing is chained backwards: ten times closer than gradients; PyTorch fp32 shows 5e-7.
FP32_LOGITS = 5e-6
# Absolute, in nats: published reference losses are rounded to four places by another program.
LOSS_VALUE = 2e-4
# Absolute, in nats, over 20 AdamW steps: Adam turns rounding of tiny gradients into steps of lr.
TORCH_LOSS_20_STEPS = 1e-4
# One AdamW update against float64: a handful of fp32 roundings (6e-8) relative to the weight.
FP32_UPDATE = 1e-6

# --- bf16 product inputs, fp32 sums: 8 bits of mantissa, 0.4 % per factor, growing with depth

BF16_GRADIENT = 0.06  # per-tensor relative error, as in docs/architecture.md#numerics
BF16_COSINE = 0.998  # a random 6 % error lowers the cosine by 0.0018: no bias hides under it
# Of a mean over sequences. Soft-max sees what is added to all keys only by what RoPE makes of it:
# the terms of this sum cancel. Float64 with factors rounded to bf16 is off by 0.05 there.
BF16_KEY_BIAS = 0.15
# Relative: of one token's large random logits; over a real text 1e-4 of it.
BF16_LOSS = 2e-3
# Relative: of the losses on held-out text at the end of two trainings that differ in precision.
BF16_HELD_OUT = 5e-3

# --- fp16 surfaces and products: 11 bits, 0.05 % per rounding, at every program boundary

FP16_GRADIENT = 0.02  # per-tensor relative error, as in docs/architecture.md#numerics
FP16_COSINE = 0.999  # a random 2 % error lowers it by 0.0002; the rest is room for underflow

# --- side-by-side benchmarks: both programs are fp32, so this only finds mistakes, not rounding

PEER_LOSS = 1e-3  # absolute, in nats
PEER_GRADIENT = 1e-3  # per-tensor relative error
PEER_BF16_LOSS = 0.05  # 0.5 % of the loss of random weights; 0.004 seen at stories110M
PEER_BF16_GRADIENT = 0.1  # PyTorch only has to compute the same thing: 0.024 seen there


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Measure ||actual - expected|| / ||expected|| (Frobenius), in float64.

    If `expected` is zero throughout, as dwq and dwk are for one position, the norm of `actual`.
    """
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape:
        raise ValueError(f"shapes differ: {a.shape} and {e.shape}")
    scale = float(np.linalg.norm(e))
    return float(np.linalg.norm(a - e)) / (scale if scale > 0.0 else 1.0)


def cosine(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Measure the cosine of the angle between two tensors; 1 if both are zero."""
    a = np.asarray(actual, np.float64).ravel()
    e = np.asarray(expected, np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(e))
    return float(a @ e) / norms if norms > 0.0 else float(not a.any() and not e.any())


def assert_tensors_close(
    actual: Mapping[str, npt.NDArray[Any]],
    expected: Mapping[str, npt.NDArray[Any]],
    tolerance: float,
    *,
    min_cosine: float | None = None,
) -> None:
    """Fail if a tensor is missing, not finite, or further off than `tolerance`; list those."""
    assert set(actual) == set(expected), f"names differ: {set(actual) ^ set(expected)}"
    wrong = []
    for name, e in expected.items():
        a = np.asarray(actual[name])
        error, direction = relative_error(a, e), cosine(a, e)
        # Written so that a NaN fails.
        straight = min_cosine is None or not e.any() or direction >= min_cosine
        if not error <= tolerance or not straight:
            largest = float(np.max(np.abs(a - e)))
            wrong.append(
                f"{name}: relative {error:.3g}, max difference {largest:.3g}, cos {direction:.6f}"
            )
    assert not wrong, f"beyond {tolerance:g}:\n" + "\n".join(wrong)
