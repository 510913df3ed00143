"""How much arithmetic a step is, and what the Neural Engine could do in the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.model import ModelConfig

# Apple's figure for one Neural Engine; the research programs' utilization refers to it too.
ANE_PEAK_TFLOPS = 15.8


def flops_per_step(config: ModelConfig, seq: int, batch: int = 1) -> dict[str, int]:
    """Count the floating-point operations of one step, as the research programs do.

    Args:
        config: dimensions of the model.
        seq: tokens of each sequence.
        batch: sequences per step.

    Returns:
        FLOPs of `fwd`, `bwd_dx` and `bwd_dw` (matrix products of the layers), `sdpa_bwd`,
        `classifier` and their `total`. Attention products of the forward pass are not counted.
    """
    dim, kv_dim = config.dim, config.dim // config.n_heads * config.n_kv_heads
    products = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * config.hidden_dim
    layers = config.n_layers * 2 * products * seq * batch
    sdpa = config.n_layers * 2 * 5 * dim * seq * seq * batch
    classifier = 3 * 2 * config.vocab_size * dim * seq * batch
    return {
        "fwd": layers,
        "bwd_dx": layers,
        "bwd_dw": layers,
        "sdpa_bwd": sdpa,
        "classifier": classifier,
        "total": 3 * layers + sdpa + classifier,
    }
