"""The tensors of a model in files: their names in each format, their shapes, how they are stored.

anepy keeps the two rows of a rotary pair side by side (2i and 2i+1 of a head of wq and wk), as
Meta's Llama and llama2.c do. In Hugging Face's models row i of a head turns with row
i + head_dim / 2, so their rows are put in order where files are read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError
from .model import ModelConfig, TensorTable
from .storage import StoredTensors
from .stored_tokenizer import StoredTokenizer
from .views import Array

_LAYER = (  # anepy, Hugging Face, GGUF, extents, are the rows rotary pairs
    ("attention_norm", "input_layernorm", "attn_norm", ("dim",), False),
    ("attention.wq", "self_attn.q_proj", "attn_q", ("q_dim", "dim"), True),
    ("attention.wk", "self_attn.k_proj", "attn_k", ("kv_dim", "dim"), True),
    ("attention.wv", "self_attn.v_proj", "attn_v", ("kv_dim", "dim"), False),
    ("attention.wo", "self_attn.o_proj", "attn_output", ("dim", "q_dim"), False),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm", ("dim",), False),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate", ("hidden_dim", "dim"), False),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down", ("dim", "hidden_dim"), False),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up", ("hidden_dim", "dim"), False),
)
# The linear maps of a layer: the last word of their names here -> where they are in Hugging Face's.
PROJECTIONS: Mapping[str, str] = {
    name.split(".")[-1]: theirs for name, theirs, _, extents, _ in _LAYER if len(extents) == 2
}
_BIASES = ("attention.wq", "attention.wk", "attention.wv")
_NORMS = (
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm", ("width",), True),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm", ("width",), True),
)


class Tensor(NamedTuple):
    """One tensor of a model.

    Attributes:
        name: as in `Model.weights`.
        hugging_face: as in a Hugging Face folder.
        gguf: as in a GGUF file.
        shape: (out, in), or (n,).
        heads: how many heads of rotary pairs its rows are; 0 if they are none.
    """

    name: str
    hugging_face: str
    gguf: str
    shape: tuple[int, ...]
    heads: int


class Stored(NamedTuple):
    """A model in a file whose weights are not read yet.

    Attributes:
        config: its dimensions.
        fill: reads all weights into name -> float32 array. Raises ModelError.
        tokenizer: what came with it.
        storage: the smallest storage that holds the file's matrices as they are.
    """

    config: ModelConfig
    fill: Callable[[Mapping[str, Array]], None]
    tokenizer: StoredTokenizer | None = None
    storage: str = "f32"


def tensors(config: ModelConfig) -> list[Tensor]:
    """List every tensor of a model of these dimensions.

    Raises:
        ConfigError: no engine computes such a model; its list may be longer than memory.
    """
    TensorTable(config)
    c, width = config, config.head_width
    extents = {
        "dim": c.dim,
        "hidden_dim": c.hidden_dim,
        "q_dim": c.n_heads * width,
        "kv_dim": c.n_kv_heads * width,
        "width": width,
    }
    rows = [(*row, "weight") for row in _LAYER]
    if c.qkv_bias:
        rows += [(*row[:3], row[3][:1], row[4], "bias") for row in _LAYER if row[0] in _BIASES]
    if c.qk_norm:
        rows += [(*row, "weight") for row in _NORMS]
    embedding = (c.vocab_size, c.dim)
    found = [
        Tensor(
            "tok_embeddings.weight", "model.embed_tokens.weight", "token_embd.weight", embedding, 0
        )
    ]
    for layer in range(c.n_layers):
        for ours, hugging_face, gguf, names, rotary, kind in rows:
            shape = tuple(extents[name] for name in names)
            found.append(
                Tensor(
                    f"layers.{layer}.{ours}.{kind}",
                    f"model.layers.{layer}.{hugging_face}.{kind}",
                    f"blk.{layer}.{gguf}.{kind}",
                    shape,
                    shape[0] // width if rotary else 0,
                )
            )
    found.append(Tensor("norm.weight", "model.norm.weight", "output_norm.weight", (c.dim,), 0))
    if not c.tied:
        found.append(Tensor("output.weight", "lm_head.weight", "output.weight", embedding, 0))
    return found


def from_half_split(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Put rows i and i + head_dim/2 of each head at 2i and 2i+1."""
    parts = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(parts).reshape(values.shape)


def to_half_split(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Undo `from_half_split`."""
    parts = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(parts).reshape(values.shape)


def put(weights: Mapping[str, Array], name: str, values: npt.NDArray[Any], where: str) -> None:
    """Copy a tensor of a file into a model.

    Args:
        weights: the model's tensors.
        name: which of them.
        values: of its shape, any float type.
        where: the file and the tensor's name in it, for the message.

    Raises:
        ModelError: a value is NaN or infinite, or too large for how the model is stored.
    """
    if isinstance(weights, StoredTensors):
        try:
            weights[name] = values
        except ConfigError as error:
            raise ModelError(f"{where} cannot be stored: {error}") from None
        return
    with np.errstate(over="ignore"):  # of float64
        weights[name][...] = values
    if not np.isfinite(weights[name]).all():
        raise ModelError(f"{where} has NaN or infinite weights: it is damaged; get it again")


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Array:
    """Widen bfloat16, given as its 16 bits, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Round finite float32 to the nearest bfloat16, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def rounded(values: Array, dtype: str, name: str) -> npt.NDArray[Any]:
    """Convert weights to the type of a file.

    Args:
        values: finite float32.
        dtype: "f32", "f16" or "bf16".
        name: of the tensor, for the message.

    Returns:
        Little-endian float32 or float16, or the bits of bfloat16 as uint16.

    Raises:
        ModelError: a weight is too large for the type.
    """
    if dtype == "f32":
        return np.ascontiguousarray(values, "<f4")
    if dtype == "bf16":
        halves = to_bfloat16(values)
        fits = bool(((halves & 0x7F80) != 0x7F80).all())
    else:
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(values, "<f2")
        fits = bool(np.isfinite(halves).all())
    if not fits:
        largest = float(np.abs(values).max())
        raise ModelError(f"{name} has a weight of {largest:.3g}, too large for {dtype}; save f32")
    return halves
