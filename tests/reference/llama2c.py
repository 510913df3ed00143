"""Read and write llama2.c model files (version 0), written apart from `anepy.Model` to check it.

The file is little endian: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
seq_len; a negative vocab_size says that the classifier is not the embedding), then float32 tensors
without names, each kind for all layers together, in the order of `_layout`. Two tables that nobody
reads any more, cosines and sines of the rotary angles, still take their place after the last norm.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.llama64 import Config, ConfigLike, rope_frequencies, tensor_shapes

HEADER = struct.Struct("<7i")

_PER_LAYER = (
    "attention_norm",
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "ffn_norm",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def _layout(n_layers: int) -> list[str]:
    """Name the tensors that precede the rotary tables, in file order."""
    names = ["tok_embeddings.weight"]
    for kind in _PER_LAYER:
        names += [f"layers.{i}.{kind}.weight" for i in range(n_layers)]
    return [*names, "norm.weight"]


def read(path: Path) -> tuple[Config, dict[str, npt.NDArray[np.float32]]]:
    """Read a model file whole.

    Raises:
        ValueError: the file does not have exactly the size its header asks for.
    """
    raw = path.read_bytes()
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab, seq_len = HEADER.unpack_from(raw)
    config = Config(
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len, tied=vocab > 0
    )
    shapes = tensor_shapes(config)
    weights: dict[str, npt.NDArray[np.float32]] = {}
    offset = HEADER.size
    for name in _layout(n_layers):
        weights[name] = _take(raw, offset, shapes[name])
        offset += weights[name].nbytes
    offset += 4 * seq_len * (dim // n_heads)  # both tables, each seq_len x head_dim/2
    if not config.tied:
        weights["output.weight"] = _take(raw, offset, shapes["output.weight"])
        offset += weights["output.weight"].nbytes
    if offset != len(raw):
        raise ValueError(f"{path}: {len(raw)} bytes, but the header asks for {offset}")
    return config, {name: weights[name] for name in shapes}


def _take(raw: bytes, offset: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    count = int(np.prod(shape))
    return np.frombuffer(raw, "<f4", count, offset).reshape(shape).astype(np.float32)


def rotary_tables(config: ConfigLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute the legacy tables: cosines and sines, float32, each (seq_len, head_dim/2)."""
    angles = np.outer(np.arange(config.seq_len), rope_frequencies(config))
    return np.cos(angles).astype("<f4"), np.sin(angles).astype("<f4")


def write(path: Path, config: ConfigLike, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a model file that llama2.c's run.c loads."""
    vocab = config.vocab_size if config.tied else -config.vocab_size
    with path.open("wb") as file:
        file.write(
            HEADER.pack(
                config.dim,
                config.hidden_dim,
                config.n_layers,
                config.n_heads,
                config.n_kv_heads,
                vocab,
                config.seq_len,
            )
        )
        for name in _layout(config.n_layers):
            file.write(np.ascontiguousarray(weights[name], "<f4").tobytes())
        for table in rotary_tables(config):
            file.write(table.tobytes())
        if not config.tied:
            file.write(np.ascontiguousarray(weights["output.weight"], "<f4").tobytes())
