"""Llama models in float64 numpy, forward and hand-written backward: what is right, not fast.

Activations are `(T, C)`: one row per position. Matrices are `(out, in)`, so a product is `x @ w.T`.
The model is assembled from the functions below, which are cut exactly where the device programs
are cut (`sdpa_fwd`, `ffn_fwd`, `ffn_bwd`, `sdpa_bwd1`, `sdpa_bwd2`, `qkv_bwd`, ...), so that any of
those programs can be tested alone.

    T positions   D dim          F hidden_dim   V vocab_size
    H n_heads     K n_kv_heads   G = H / K      E head_dim, D / H unless given

Sources: Llama 2 (arXiv 2307.09288), RMSNorm (1910.07467), RoPE (2104.09864), SwiGLU (2002.05202),
grouped queries (2305.13245), attention (1706.03762), Qwen2's biases (2407.10671), Qwen3's norms of
q and k (2505.09388), linear RoPE scaling (2306.15595); Llama 3.1's RoPE scaling is that of Meta's
llama-models. The gradients are derived here from those definitions; `test_reference.py` checks each
by finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, npt.NDArray[Any]]


class ConfigLike(Protocol):
    """What every configuration has; `anepy.ModelConfig` fits.

    Of the further fields of `Config`, one that is missing has the value it has there.
    """

    @property
    def dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class Config:
    """A configuration for tests that do not want to import anepy.

    Attributes:
        head_dim: width of a head; dim / n_heads if None.
        norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or what transformers calls so: `rope_type` "linear" with `factor`, or
            "llama3" with `factor`, `low_freq_factor`, `high_freq_factor` and
            `original_max_position_embeddings`.
        qkv_bias: wq, wk and wv add a bias.
        qk_norm: every head of q and k goes through an RMSNorm of its own before it is rotated.
        tied: the classifier is the embedding.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True


def setting(config: ConfigLike, name: str) -> Any:
    """Read a field that a configuration may lack."""
    return getattr(config, name, getattr(Config, name))


def head_width(config: ConfigLike) -> int:
    """Return E."""
    return setting(config, "head_dim") or config.dim // config.n_heads


# ---------------------------------------------------------------------------------------- weights


def tensor_shapes(config: ConfigLike) -> dict[str, tuple[int, ...]]:
    """List every tensor of a model, named as in Meta's Llama, with its shape."""
    d, f, v, e = config.dim, config.hidden_dim, config.vocab_size, head_width(config)
    q, kv = config.n_heads * e, config.n_kv_heads * e
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (v, d)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (d,),
            f"layers.{i}.attention.wq.weight": (q, d),
            f"layers.{i}.attention.wk.weight": (kv, d),
            f"layers.{i}.attention.wv.weight": (kv, d),
            f"layers.{i}.attention.wo.weight": (d, q),
            f"layers.{i}.ffn_norm.weight": (d,),
            f"layers.{i}.feed_forward.w1.weight": (f, d),
            f"layers.{i}.feed_forward.w2.weight": (d, f),
            f"layers.{i}.feed_forward.w3.weight": (f, d),
        }
        if setting(config, "qkv_bias"):
            for name, rows in (("wq", q), ("wk", kv), ("wv", kv)):
                shapes[f"layers.{i}.attention.{name}.bias"] = (rows,)
        if setting(config, "qk_norm"):
            shapes[f"layers.{i}.attention.q_norm.weight"] = (e,)
            shapes[f"layers.{i}.attention.k_norm.weight"] = (e,)
    shapes["norm.weight"] = (d,)
    if not config.tied:
        shapes["output.weight"] = (v, d)
    return shapes


def random_weights(
    config: ConfigLike, seed: int, std: float = 0.02
) -> dict[str, npt.NDArray[np.float32]]:
    """Draw weights the way llama2.c initialises them, except for the norms.

    Matrices are normal with deviation `std`; wo and w3 are smaller by sqrt(2 * n_layers), as
    llama2.c does. Norm weights are uniform in 0.5..1.5 and not 1: several wrong RMSNorm gradients
    are right as long as all norm weights are 1. Biases are normal with deviation 0.5, not 0.

    Returns:
        name -> float32 array, so that the float32 and the float64 model start from equal numbers.
    """
    rng = np.random.default_rng(seed)
    residual_std = std / math.sqrt(2 * config.n_layers)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith(".bias"):
            values = rng.normal(0.0, 0.5, shape)
        elif len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("wo.weight", "w3.weight")):
            values = rng.normal(0.0, residual_std, shape)
        else:
            values = rng.normal(0.0, std, shape)
        weights[name] = values.astype(np.float32)
    return weights


def layer_weights(weights: Weights, layer: int) -> dict[str, Array]:
    """Select one layer's tensors in float64 under short names: `wq`, `wq.bias`, `ffn_norm`."""
    prefix = f"layers.{layer}."
    return {
        ".".join(name.split(".")[-2:]).removesuffix(".weight"): np.asarray(tensor, np.float64)
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


# ------------------------------------------------------------------------------------- operations


def rmsnorm(x: Array, weight: Array, eps: float = Config.norm_eps) -> Array:
    """Divide each row by its root mean square and scale: y = w * x * r, r = (mean(x^2) + eps)^-1/2.

    Args:
        x: (..., D).
        weight: (D,).
    """
    return x * _inverse_rms(x, eps) * weight


def rmsnorm_backward(
    dy: Array, x: Array, weight: Array, eps: float = Config.norm_eps
) -> tuple[Array, Array]:
    """Differentiate `rmsnorm`.

    With n = x * r and dr/dx = -r^3 * x / D:
        dweight = sum over rows of dy * n
        dx      = r * (weight * dy - n * mean(weight * dy * n))

    Returns:
        dx (..., D) and dweight (D,).
    """
    r = _inverse_rms(x, eps)
    n = x * r
    dn = dy * weight
    dx = r * (dn - n * (dn * n).mean(axis=-1, keepdims=True))
    return dx, (dy * n).reshape(-1, x.shape[-1]).sum(axis=0)


def _inverse_rms(x: Array, eps: float) -> Array:
    return 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def linear(x: Array, w: Array, bias: Array | float = 0.0) -> Array:
    """Multiply (T, in) activations by an (out, in) matrix and add an (out,) bias."""
    return x @ w.T + bias


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """Differentiate `linear`: dx = dy w (T, in), dw = dy^T x (out, in)."""
    return dy @ w, dy.T @ x


def rope_frequencies(config: ConfigLike) -> Array:
    """Return what each of the E/2 pairs of a head turns by per position, in radians.

    Pair i has f = theta^(-2i/E). Scaling "linear" divides all by `factor`. "llama3" keeps what
    turns at least `high_freq_factor` times within the original context, divides by `factor` what
    turns at most `low_freq_factor` times, and goes from one to the other linearly in that number
    of turns between.
    """
    width = head_width(config)
    plain = setting(config, "rope_theta") ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    scaling = setting(config, "rope_scaling")
    if scaling is None:
        return plain
    slow = plain / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_type {scaling['rope_type']}")
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1.0 - kept) * slow


def rope(x: Array, frequencies: Array, *, start: int = 0, inverse: bool = False) -> Array:
    """Rotate the pairs (2i, 2i+1) of every head by position * frequencies[i].

    A rotation is orthogonal, so its gradient is the rotation by the opposite angle:
    `rope(dy, frequencies, inverse=True)`.

    Args:
        x: (T, n * E), any number n of heads.
        frequencies: (E/2,), of `rope_frequencies`.
        start: position of the first row.
        inverse: rotate back.
    """
    positions = np.arange(start, start + x.shape[0], dtype=np.float64)
    angles = np.outer(positions, frequencies)[:, None, :]  # (T, 1, E/2)
    cos, sin = np.cos(angles), np.sin(-angles if inverse else angles)
    pairs = x.reshape(x.shape[0], -1, len(frequencies), 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def head_norm(x: Array, weight: Array, eps: float) -> Array:
    """Apply `rmsnorm` to each head of (T, n * E) with one weight (E,) for all heads."""
    return rmsnorm(x.reshape(x.shape[0], -1, len(weight)), weight, eps).reshape(x.shape)


def head_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Differentiate `head_norm`: dx (T, n * E) and dweight (E,)."""
    heads = (x.shape[0], -1, len(weight))
    dx, dweight = rmsnorm_backward(dy.reshape(heads), x.reshape(heads), weight, eps)
    return dx.reshape(x.shape), dweight


def softmax(x: Array) -> Array:
    """Normalise the last axis to probabilities, the maximum taken off against overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, n_heads: int, n_kv_heads: int) -> tuple[Array, Array]:
    """Attend causally: softmax(q k^T / sqrt(E)) v per head; K/V head k serves G query heads.

    Args:
        q: (T, H*E), rotated.
        k: (T, K*E), rotated.
        v: (T, K*E).

    Returns:
        the heads' outputs side by side (T, H*E), and the probabilities (H, T, T) as
        [head, query, key].
    """
    group = n_heads // n_kv_heads
    qh, kh, vh = _split(q, n_heads), _split(k, n_kv_heads), _split(v, n_kv_heads)
    scores = qh @ np.repeat(kh, group, axis=0).swapaxes(1, 2) / math.sqrt(qh.shape[-1])
    future = np.triu(np.ones(scores.shape[1:], dtype=bool), 1)
    probs = softmax(np.where(future, -np.inf, scores))
    return _merge(probs @ np.repeat(vh, group, axis=0)), probs


def attention_backward1(
    da: Array, v: Array, probs: Array, n_heads: int, n_kv_heads: int
) -> tuple[Array, Array]:
    """Differentiate `attention` down to v and the probabilities.

    dv = P^T da, summed over the query heads that share a K/V head; dP = da v^T.

    Args:
        da: (T, H*E) gradient of the heads' outputs.

    Returns:
        dv (T, K*E) and dP (H, T, T); dP is not masked, P is zero there.
    """
    dah = _split(da, n_heads)
    vh = np.repeat(_split(v, n_kv_heads), n_heads // n_kv_heads, axis=0)
    dprobs = dah @ vh.swapaxes(1, 2)
    return _merge(_sum_groups(probs.swapaxes(1, 2) @ dah, n_kv_heads)), dprobs


def attention_backward2(
    probs: Array, dprobs: Array, q: Array, k: Array, n_heads: int, n_kv_heads: int
) -> tuple[Array, Array]:
    """Differentiate `attention` from the probabilities to q and k.

    The softmax's Jacobian is diag(p) - p p^T, so dS = P * (dP - rowsum(P * dP)) / sqrt(E);
    dq = dS k; dk = dS^T q, summed over the query heads that share a K/V head.

    Returns:
        dq (T, H*E) and dk (T, K*E), gradients of the rotated q and k.
    """
    qh = _split(q, n_heads)
    kh = np.repeat(_split(k, n_kv_heads), n_heads // n_kv_heads, axis=0)
    dscores = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
    dscores /= math.sqrt(qh.shape[-1])
    return _merge(dscores @ kh), _merge(_sum_groups(dscores.swapaxes(1, 2) @ qh, n_kv_heads))


def _split(x: Array, heads: int) -> Array:
    """(T, heads*E) -> (heads, T, E)."""
    return x.reshape(x.shape[0], heads, -1).swapaxes(0, 1)


def _merge(x: Array) -> Array:
    """(heads, T, E) -> (T, heads*E)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _sum_groups(x: Array, n_kv_heads: int) -> Array:
    """(H, T, E) -> (K, T, E): query heads k*G .. k*G+G-1 share K/V head k."""
    return x.reshape(n_kv_heads, -1, *x.shape[1:]).sum(axis=1)


def swiglu(h1: Array, h3: Array) -> Array:
    """Gate h3 by silu(h1) = h1 * sigmoid(h1); all (T, F)."""
    return h1 * _sigmoid(h1) * h3


def swiglu_backward(dgate: Array, h1: Array, h3: Array) -> tuple[Array, Array]:
    """Differentiate `swiglu`: silu'(h) = s * (1 + h * (1 - s)) with s = sigmoid(h).

    Returns:
        dh1 and dh3, both (T, F).
    """
    s = _sigmoid(h1)
    return dgate * h3 * s * (1.0 + h1 * (1.0 - s)), dgate * h1 * s


def _sigmoid(x: Array) -> Array:
    # tanh never overflows, exp(-x) would for strongly negative x.
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def cross_entropy(logits: Array, targets: npt.ArrayLike) -> tuple[float, Array]:
    """Average -log softmax(logits)[target] over the counted positions.

    Args:
        logits: (T, V).
        targets: T ids; below 0, the position is not counted.

    Returns:
        the mean in nats, and its gradient (softmax - onehot) / counted of shape (T, V), zero where
        a position is not counted. Both are 0 if none is.
    """
    wanted = np.asarray(targets)
    rows = np.flatnonzero(wanted >= 0)
    counted = max(len(rows), 1)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=-1))[rows] - shifted[rows, wanted[rows]]
    dlogits = np.zeros_like(logits)
    dlogits[rows] = softmax(logits[rows]) / counted
    dlogits[rows, wanted[rows]] -= 1.0 / counted
    return float(losses.sum()) / counted, dlogits


# --------------------------------------------------------------------------------- fused programs


def sdpa_fwd(x: Array, w: Mapping[str, Array], config: ConfigLike) -> dict[str, Array]:
    """Run the attention half of a layer, without its residual.

    Args:
        x: (T, D) residual stream.
        w: `layer_weights`.

    Returns:
        o_out (T, D); q (T, H*E) and k (T, K*E) as attention takes them, and q_raw and k_raw as the
        projections give them; v (T, K*E); attn (T, H*E) before wo; probs (H, T, T); xnorm (T, D).
    """
    eps, frequencies = setting(config, "norm_eps"), rope_frequencies(config)
    xnorm = rmsnorm(x, w["attention_norm"], eps)
    q_raw, k_raw, v = (linear(xnorm, w[n], w.get(f"{n}.bias", 0.0)) for n in ("wq", "wk", "wv"))
    q, k = q_raw, k_raw
    if setting(config, "qk_norm"):
        q, k = head_norm(q, w["q_norm"], eps), head_norm(k, w["k_norm"], eps)
    q, k = rope(q, frequencies), rope(k, frequencies)
    attn, probs = attention(q, k, v, config.n_heads, config.n_kv_heads)
    o_out = linear(attn, w["wo"])
    return dict(o_out=o_out, q=q, k=k, v=v, attn=attn, probs=probs, xnorm=xnorm) | dict(
        q_raw=q_raw, k_raw=k_raw
    )


def ffn_fwd(x2: Array, w: Mapping[str, Array], eps: float = Config.norm_eps) -> dict[str, Array]:
    """Run the feed-forward half of a layer, without its residual.

    Returns:
        ffn_out (T, D), h1, h3 and gate (T, F), x2norm (T, D).
    """
    x2norm = rmsnorm(x2, w["ffn_norm"], eps)
    h1, h3 = linear(x2norm, w["w1"]), linear(x2norm, w["w3"])
    gate = swiglu(h1, h3)
    return dict(ffn_out=linear(gate, w["w2"]), h1=h1, h3=h3, gate=gate, x2norm=x2norm)


def ffn_bwd(
    dffn: Array, h1: Array, h3: Array, w: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    """Take the gradient of `ffn_fwd` back to x2norm.

    Returns:
        dx2norm (T, D), dh1 (T, F), dh3 (T, F).
    """
    dh1, dh3 = swiglu_backward(dffn @ w["w2"], h1, h3)
    return dh1 @ w["w1"] + dh3 @ w["w3"], dh1, dh3


def sdpa_bwd1(
    q: Array, k: Array, v: Array, dx2: Array, w: Mapping[str, Array], config: ConfigLike
) -> tuple[Array, Array, Array]:
    """Take the gradient of o_out back to v and the probabilities, which are computed again.

    Returns:
        dv (T, K*E), probs (H, T, T), dprobs (H, T, T).
    """
    _, probs = attention(q, k, v, config.n_heads, config.n_kv_heads)
    da = dx2 @ w["wo"]
    dv, dprobs = attention_backward1(da, v, probs, config.n_heads, config.n_kv_heads)
    return dv, probs, dprobs


def sdpa_bwd2(
    probs: Array, dprobs: Array, q: Array, k: Array, config: ConfigLike
) -> tuple[Array, Array]:
    """Take the gradient of the probabilities back to the rotated q (T, H*E) and k (T, K*E)."""
    return attention_backward2(probs, dprobs, q, k, config.n_heads, config.n_kv_heads)


def qkv_bwd(dq: Array, dk: Array, dv: Array, w: Mapping[str, Array]) -> Array:
    """Sum the gradients of the three projections' outputs into dxnorm (T, D)."""
    return dq @ w["wq"] + dk @ w["wk"] + dv @ w["wv"]


# ------------------------------------------------------------------------------------- the model


def forward(weights: Weights, config: ConfigLike, tokens: npt.ArrayLike) -> Array:
    """Compute the next-token logits (T, V) of one sequence."""
    return _forward(weights, config, np.asarray(tokens))[0]


def loss_and_gradients(
    weights: Weights, config: ConfigLike, tokens: npt.ArrayLike, targets: npt.ArrayLike
) -> tuple[float, dict[str, Array]]:
    """Compute the mean cross-entropy of the counted positions and its gradient for every tensor.

    Args:
        weights: name -> array of any float type, taken as float64.
        tokens: ids (T,), or (N, T) for a batch.
        targets: the ids that follow them, of that shape; those below 0 are not counted.

    Returns:
        the loss in nats, and name -> float64 gradient.

    Raises:
        ValueError: no position of the batch is counted.
    """
    sequences, wanted = np.atleast_2d(tokens), np.atleast_2d(targets)
    counted = (wanted >= 0).sum(axis=1)
    if not counted.any():
        raise ValueError("no target is counted")
    loss = 0.0
    gradients = {name: np.zeros(shape) for name, shape in tensor_shapes(config).items()}
    for share, ids, after in zip(counted / counted.sum(), sequences, wanted, strict=True):
        mean, parts = _sequence(weights, config, ids, after)
        loss += share * mean
        for name, part in parts.items():
            gradients[name] += share * part
    return loss, gradients


def _sequence(
    weights: Weights, config: ConfigLike, ids: npt.NDArray[Any], targets: npt.NDArray[Any]
) -> tuple[float, dict[str, Array]]:
    """Do what `loss_and_gradients` does for one sequence; zeros if nothing is counted."""
    logits, taps, last, final = _forward(weights, config, ids)
    loss, dlogits = cross_entropy(logits, targets)
    eps, frequencies = setting(config, "norm_eps"), rope_frequencies(config)

    dfinal, dclassifier = linear_backward(dlogits, final, _classifier(weights, config))
    dx, dnorm = rmsnorm_backward(dfinal, last, _f64(weights["norm.weight"]), eps)
    gradients: dict[str, Array] = {"norm.weight": dnorm}

    for i in reversed(range(config.n_layers)):
        w, t = layer_weights(weights, i), taps[i]
        dx2norm, dh1, dh3 = ffn_bwd(dx, t["h1"], t["h3"], w)
        dx2, dffn_norm = rmsnorm_backward(dx2norm, t["x2"], w["ffn_norm"], eps)
        dx2 += dx  # the residual passes its gradient on
        dv, probs, dprobs = sdpa_bwd1(t["q"], t["k"], t["v"], dx2, w, config)
        dq, dk = sdpa_bwd2(probs, dprobs, t["q"], t["k"], config)
        dq, dk = rope(dq, frequencies, inverse=True), rope(dk, frequencies, inverse=True)
        attention = f"layers.{i}.attention"
        if setting(config, "qk_norm"):
            dq, dq_norm = head_norm_backward(dq, t["q_raw"], w["q_norm"], eps)
            dk, dk_norm = head_norm_backward(dk, t["k_raw"], w["k_norm"], eps)
            gradients[f"{attention}.q_norm.weight"] = dq_norm
            gradients[f"{attention}.k_norm.weight"] = dk_norm
        if setting(config, "qkv_bias"):
            for name, d in (("wq", dq), ("wk", dk), ("wv", dv)):
                gradients[f"{attention}.{name}.bias"] = d.sum(axis=0)
        dx_in, dattention_norm = rmsnorm_backward(
            qkv_bwd(dq, dk, dv, w), t["x"], w["attention_norm"], eps
        )
        gradients |= {
            f"layers.{i}.attention_norm.weight": dattention_norm,
            f"{attention}.wq.weight": dq.T @ t["xnorm"],
            f"{attention}.wk.weight": dk.T @ t["xnorm"],
            f"{attention}.wv.weight": dv.T @ t["xnorm"],
            f"{attention}.wo.weight": dx2.T @ t["attn"],
            f"layers.{i}.ffn_norm.weight": dffn_norm,
            f"layers.{i}.feed_forward.w1.weight": dh1.T @ t["x2norm"],
            f"layers.{i}.feed_forward.w2.weight": dx.T @ t["gate"],
            f"layers.{i}.feed_forward.w3.weight": dh3.T @ t["x2norm"],
        }
        dx = dx2 + dx_in

    dembedding = np.zeros((config.vocab_size, config.dim))
    np.add.at(dembedding, ids, dx)  # a token may occur more than once
    if config.tied:
        dembedding += dclassifier
    else:
        gradients["output.weight"] = dclassifier
    gradients["tok_embeddings.weight"] = dembedding
    return loss, gradients


def _forward(
    weights: Weights, config: ConfigLike, ids: npt.NDArray[Any]
) -> tuple[Array, list[dict[str, Array]], Array, Array]:
    """Return logits, each layer's intermediate tensors, and the final norm's input and output."""
    x = _f64(weights["tok_embeddings.weight"])[ids]
    eps = setting(config, "norm_eps")
    taps = []
    for i in range(config.n_layers):
        w = layer_weights(weights, i)
        att = sdpa_fwd(x, w, config)
        x2 = x + att["o_out"]
        ffn = ffn_fwd(x2, w, eps)
        taps.append({"x": x, "x2": x2, **att, **ffn})
        x = x2 + ffn["ffn_out"]
    final = rmsnorm(x, _f64(weights["norm.weight"]), eps)
    return linear(final, _classifier(weights, config)), taps, x, final


def _classifier(weights: Weights, config: ConfigLike) -> Array:
    return _f64(weights["tok_embeddings.weight" if config.tied else "output.weight"])


def _f64(tensor: npt.NDArray[Any]) -> Array:
    return np.asarray(tensor, np.float64)
