"""AdamW (arXiv 1711.05101) and clipping by the common norm, in float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def clip_gradients(gradients: dict[str, Array], max_norm: float) -> float:
    """Scale all gradients in place so that their common 2-norm is at most `max_norm`.

    Returns:
        the norm before clipping.
    """
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    if norm > max_norm:
        for g in gradients.values():
            g *= max_norm / norm
    return norm


def adamw(
    weights: dict[str, Array],
    gradients: Mapping[str, npt.NDArray[Any]],
    m: dict[str, Array],
    v: dict[str, Array],
    step: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Update float64 weights, m and v in place as `torch.optim.AdamW` does.

    In this order: p *= 1 - lr*weight_decay (matrices only, never norms); m and v move towards g
    and g^2; p -= lr * m^ / (sqrt(v^) + eps), where m^ and v^ are corrected for starting at zero.

    Args:
        step: number of this update, the first is 1.
    """
    for name, p in weights.items():
        g = np.asarray(gradients[name], np.float64)
        if p.ndim > 1:
            p *= 1.0 - lr * weight_decay
        m[name] += (1.0 - beta1) * (g - m[name])
        v[name] += (1.0 - beta2) * (g * g - v[name])
        m_hat = m[name] / (1.0 - beta1**step)
        v_hat = v[name] / (1.0 - beta2**step)
        p -= lr * m_hat / (np.sqrt(v_hat) + eps)
