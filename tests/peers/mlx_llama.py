"""Llama 2 in MLX for comparisons: anepy's tensor names, MLX's own kernels and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import numpy.typing as npt

RMS_EPS = 1e-5
ROPE_THETA = 10000.0


def logits(config: Any, w: Mapping[str, Any], tokens: Any) -> Any:
    """Map token ids (T,) to logits (T, V)."""
    head_dim = config.dim // config.n_heads

    def heads(x: Any, count: int) -> Any:
        return x.reshape(1, -1, count, head_dim).transpose(0, 2, 1, 3)

    def rotate(x: Any) -> Any:  # traditional: pairs of neighbours, as in llama2.c
        return mx.fast.rope(x, head_dim, traditional=True, base=ROPE_THETA, scale=1.0, offset=0)

    x = w["tok_embeddings.weight"][tokens]
    for index in range(config.n_layers):
        p = f"layers.{index}."
        y = mx.fast.rms_norm(x, w[p + "attention_norm.weight"], RMS_EPS)
        q = rotate(heads(y @ w[p + "attention.wq.weight"].T, config.n_heads))
        k = rotate(heads(y @ w[p + "attention.wk.weight"].T, config.n_kv_heads))
        v = heads(y @ w[p + "attention.wv.weight"].T, config.n_kv_heads)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5, mask="causal")
        y = y.transpose(0, 2, 1, 3).reshape(-1, config.dim)
        x = x + y @ w[p + "attention.wo.weight"].T
        y = mx.fast.rms_norm(x, w[p + "ffn_norm.weight"], RMS_EPS)
        gate = nn.silu(y @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    x = mx.fast.rms_norm(x, w["norm.weight"], RMS_EPS)
    return x @ w["tok_embeddings.weight" if config.tied else "output.weight"].T


def trainer(
    config: Any,
    weights: Mapping[str, npt.NDArray[Any]],
    tokens: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    lr: float,
    weight_decay: float,
) -> Callable[[], float]:
    """Make a function that does a step and an AdamW update and returns the loss."""
    state: dict[str, Any] = {name: mx.array(np.array(value)) for name, value in weights.items()}
    ids, wanted = mx.array(tokens), mx.array(targets)

    def loss(parameters: dict[str, Any]) -> Any:
        return nn.losses.cross_entropy(logits(config, parameters, ids), wanted, reduction="mean")

    matrices = {n for n, value in weights.items() if value.ndim > 1}
    decayed = optimizers.AdamW(lr, weight_decay=weight_decay, bias_correction=True)
    plain = optimizers.AdamW(lr, weight_decay=0.0, bias_correction=True)
    both = mx.value_and_grad(loss)

    def step() -> float:
        value, gradients = both(state)
        for optimizer, inside in ((decayed, True), (plain, False)):
            part = {n: g for n, g in gradients.items() if (n in matrices) == inside}
            state.update(optimizer.apply_gradients(part, {n: state[n] for n in part}))
        mx.eval(state, decayed.state, plain.state, value)
        return float(value.item())

    return step


def device() -> str:
    """Name the device MLX uses."""
    return str(mx.default_device())
