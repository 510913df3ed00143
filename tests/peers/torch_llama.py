"""Llama models in PyTorch for comparisons: same names, same mathematics, PyTorch's own kernels.

Parameter names are those of anepy and of Meta's Llama, so `model.weights` is a state dict.
With tied embeddings there is no `output.weight`, hence no second gradient to add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What a configuration has that lacks the field: Llama 2.
DEFAULTS = {
    "head_dim": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "qkv_bias": False,
    "qk_norm": False,
}


def setting(config: Any, name: str) -> Any:
    """Read one of `DEFAULTS` from a configuration."""
    return getattr(config, name, DEFAULTS[name])


def head_width(config: Any) -> int:
    """Return the channels of a head."""
    return setting(config, "head_dim") or config.dim // config.n_heads


def frequencies(config: Any) -> Tensor:
    """Return radians per position of each pair, float64 (E/2,), scaled as transformers does."""
    pairs = torch.arange(0, head_width(config), 2, dtype=torch.float64) / head_width(config)
    plain = setting(config, "rope_theta") ** -pairs
    scaling = setting(config, "rope_scaling")
    if scaling is None:
        return plain
    slow = plain / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    wavelength, context = 2 * math.pi / plain, scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (context / wavelength - low) / (high - low)
    mixed = torch.lerp(slow, plain, blend)
    mixed = torch.where(wavelength > context / low, slow, mixed)
    return torch.where(wavelength < context / high, plain, mixed)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last axis; x (B, heads, T, E), cos and sin (T, E/2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped K/V heads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = head_width(config)
        self.group = config.n_heads // config.n_kv_heads
        q_dim, kv_dim = self.head_dim * config.n_heads, self.head_dim * config.n_kv_heads
        bias = setting(config, "qkv_bias")
        self.wq = nn.Linear(config.dim, q_dim, bias=bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = self.k_norm = None
        if setting(config, "qk_norm"):
            self.q_norm = nn.RMSNorm(self.head_dim, setting(config, "norm_eps"))
            self.k_norm = nn.RMSNorm(self.head_dim, setting(config, "norm_eps"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.group > 1:
            k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, setting(config, "norm_eps"))
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, setting(config, "norm_eps"))
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The whole model; `config` is any object with anepy's ModelConfig attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, setting(config, "norm_eps"))
        self.output = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        positions = torch.arange(config.seq_len, dtype=torch.float64)
        angles = torch.outer(positions, frequencies(config))
        # Taken in float64; `build` rounds them once, to the type the model computes in.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V)."""
        t = tokens.shape[1]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        x = self.norm(x)
        return F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of (B, T) ids against the ids that follow them.

        Targets below 0 are not counted.
        """
        wanted = torch.where(targets < 0, -100, targets).flatten()
        return F.cross_entropy(self(tokens).flatten(0, 1), wanted)


def build(
    config: Any, weights: Mapping[str, npt.NDArray[Any]], dtype: torch.dtype = torch.float32
) -> Llama:
    """Make a model that holds a copy of `weights`, computing in `dtype`."""
    model = Llama(config).to(dtype)
    model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()})
    return model


def gradients(model: Llama) -> dict[str, npt.NDArray[Any]]:
    """Return name -> gradient, sharing memory with the model's."""
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        found[name] = p.grad.numpy()
    return found


def adamw(model: Llama, lr: float, weight_decay: float = 0.0, **options: Any) -> torch.optim.AdamW:
    """Make PyTorch's AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, **options)
