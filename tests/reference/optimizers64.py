"""Lion, SGD with momentum and Muon in float64 numpy; AdamW is in adamw64.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .adamw64 import adamw

Array = npt.NDArray[np.float64]
Gradients = Mapping[str, npt.NDArray[Any]]


def lion(
    weights: dict[str, Array],
    gradients: Gradients,
    m: dict[str, Array],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
) -> None:
    """Update float64 weights and m in place: algorithm 2 of Chen et al. 2023 (arXiv 2302.06675)."""
    for name, p in weights.items():
        g = np.asarray(gradients[name], np.float64)
        decay = weight_decay if p.ndim > 1 else 0.0
        direction = np.sign(beta1 * m[name] + (1.0 - beta1) * g)
        p -= lr * (direction + decay * p)
        m[name][...] = beta2 * m[name] + (1.0 - beta2) * g


def sgd(
    weights: dict[str, Array],
    gradients: Gradients,
    m: dict[str, Array],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> None:
    """Update float64 weights and m in place as `torch.optim.SGD` does, dampening 0, no Nesterov."""
    for name, p in weights.items():
        g = np.asarray(gradients[name], np.float64)
        m[name][...] = momentum * m[name] + g + (weight_decay * p if p.ndim > 1 else 0.0)
        p -= lr * m[name]


def orthogonalized(u: Array) -> Array:
    """Bring the singular values of u near 1: five Newton-Schulz steps (`torch.optim.Muon`)."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def muon(
    weights: dict[str, Array],
    gradients: Gradients,
    m: dict[str, Array],
    v: dict[str, Array],
    step: int,
    *,
    lr: float,
    matrix_lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    **rest: float,
) -> None:
    """Update float64 weights, m and v in place: matrices of layers as `torch.optim.Muon`, with the
    "original" adjustment of its rate and Nesterov's momentum, all others as `torch.optim.AdamW`.
    """
    mine = [name for name, p in weights.items() if name.startswith("layers.") and p.ndim > 1]
    for name in mine:
        p, g = weights[name], np.asarray(gradients[name], np.float64)
        m[name][...] = momentum * m[name] + g
        p *= 1.0 - matrix_lr * weight_decay
        rate = matrix_lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
        p -= rate * orthogonalized(g + momentum * m[name])
    others = {name: p for name, p in weights.items() if name not in mine}
    adamw(others, gradients, m, v, step, lr=lr, weight_decay=weight_decay, **rest)
