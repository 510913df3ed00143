"""llama2.c's `.bin` files: seven dimensions, then the weights in float32.

Version 0 is `legacy_export` of llama2.c's export.py: a negative vocabulary size marks a separate
classifier, and tables of rotary cosines and sines take the place after the last norm. Version 1 is
its `version1_export`: a header of 256 bytes that begins with "ak42", norms first, no tables.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ConfigError, ModelError
from ..system import files
from . import rope, tensors
from .model import Model, ModelConfig, TensorTable
from .tensors import Stored
from .views import Array

_HEADER = struct.Struct("<7i")
_MAGIC = struct.pack("<I", 0x616B3432)  # "ak42"
_HEADER_1 = struct.Struct("<4si7iB")
_HEADER_1_BYTES = 256

_NORMS = ("attention_norm", "ffn_norm")
_PARTS = (
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


def open_file(path: Path) -> Stored:
    """Read a file's header and rotary tables.

    Raises:
        ModelError: not such a file, its size does not fit its header, or its tables are of no base.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER_1_BYTES)
    if head.startswith(_MAGIC):
        return _open_1(path, head, size)
    config, tables = _read_header(path, head, size)
    if tables:
        config = _with_base(path, config)
    return Stored(config, partial(_fill, path, _HEADER.size, config, tables))


def _open_1(path: Path, head: bytes, size: int) -> Stored:
    if size < _HEADER_1_BYTES:
        raise ModelError(f"model {path} has {size} bytes, less than its header: it is truncated")
    _, version, *sizes, shared = _HEADER_1.unpack_from(head)
    if version != 1:
        raise ModelError(
            f"model {path} is a llama2.c file of version {version}, whose weights are not float32; "
            "export it with --version 0 or 1"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = sizes
    config = ModelConfig(dim, hidden, layers, heads, kv_heads, vocab, seq_len, tied=shared != 0)
    expected = _HEADER_1_BYTES + 4 * _parameters(path, config)
    _check_size(path, size, expected)
    return Stored(config, partial(_fill, path, _HEADER_1_BYTES, config, 0))


def _fill(
    path: Path, offset: int, config: ModelConfig, tables: int, weights: Mapping[str, Array]
) -> None:
    data = _map(path, offset)
    shapes = {tensor.name: tensor.shape for tensor in tensors.tensors(config)}
    order = _file_order_1(config) if offset == _HEADER_1_BYTES else _file_order(config)
    at = 0
    for name in order:
        if name is None:
            at += tables
            continue
        values = data[at : at + math.prod(shapes[name])].reshape(shapes[name])
        tensors.put(weights, name, values, f"model {path}: tensor {name}")
        at += values.size


def _map(path: Path, offset: int) -> Array:
    try:
        return np.memmap(path, dtype="<f4", mode="r", offset=offset)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot map model {path}: {error}") from None


def save(path: Path, model: Model) -> int:
    """Write a file of version 0, complete or not at all.

    Returns:
        Its size in bytes.

    Raises:
        OSError: the file cannot be written; an older file of that name is unchanged.
    """
    c = model.config
    vocab = c.vocab_size if c.tied else -c.vocab_size
    header = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.seq_len)
    with files.replacing(path) as file:
        file.write(_HEADER.pack(*header))
        for name in _file_order(c):
            part = _rotary_tables(model.table) if name is None else model.weights[name]
            file.write(np.ascontiguousarray(part, dtype="<f4").data)
        return file.tell()


def check(config: ModelConfig) -> None:
    """Refuse what the header has no place for.

    Raises:
        ModelError: with the settings, and the formats that hold them.
    """
    c = config
    faults = [] if c.head_width * c.n_heads == c.dim else ["head_dim"]
    names = ["norm_eps", "rope_scaling", "qkv_bias", "qk_norm"]
    if c.seq_len < 2 or c.head_width < 4:  # else the tables tell it
        names.append("rope_theta")
    faults += [name for name in names if getattr(c, name) != getattr(ModelConfig, name)]
    if faults:
        raise ModelError(
            f"a llama2.c .bin file cannot hold this model's {' and '.join(faults)}; save it as "
            ".gguf or as a Hugging Face folder"
        )


def _file_order(config: ModelConfig) -> Iterator[str | None]:
    """Yield tensor names in the order of version 0; None stands for the rotary tables."""
    yield "tok_embeddings.weight"
    for part in _PARTS:
        for layer in range(config.n_layers):
            yield f"layers.{layer}.{part}.weight"
    yield "norm.weight"
    yield None
    if not config.tied:
        yield "output.weight"


def _file_order_1(config: ModelConfig) -> Iterator[str]:
    """Yield tensor names in the order of version 1."""
    matrices = [part for part in _PARTS if part not in _NORMS]
    for part in _NORMS:
        for layer in range(config.n_layers):
            yield f"layers.{layer}.{part}.weight"
    yield "norm.weight"
    yield "tok_embeddings.weight"
    for part in matrices:
        for layer in range(config.n_layers):
            yield f"layers.{layer}.{part}.weight"
    if not config.tied:
        yield "output.weight"


def _rotary_tables(table: TensorTable) -> Array:
    """Return the legacy cos and sin tables, float32 (2, seq_len, head_dim / 2)."""
    angles = np.outer(np.arange(table.config.seq_len), table.frequencies())
    tables: Array = np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)
    return tables


def _with_base(path: Path, config: ModelConfig) -> ModelConfig:
    """Return a configuration with the base that a file's rotary tables are of."""
    data = _map(path, _HEADER.size)
    after = 0 if config.tied else config.vocab_size * config.dim
    count = config.seq_len * config.head_width
    tables = data[data.size - after - count : data.size - after]
    try:
        theta = rope.theta_of(*tables.reshape(2, config.seq_len, -1))
    except ValueError as error:
        raise ModelError(
            f"model {path} has tables of rotary cosines and sines that are of no base: {error}; "
            "export it again"
        ) from None
    return replace(config, rope_theta=theta)


def _read_header(path: Path, head: bytes, size: int) -> tuple[ModelConfig, int]:
    """Validate a header against the file size; also return the floats in its rotary tables."""
    if len(head) < _HEADER.size:
        raise ModelError(
            f"model {path} has {size} bytes, less than a llama2.c header: it is truncated or not a "
            "model"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = _HEADER.unpack_from(head)
    config = ModelConfig(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len, tied=vocab > 0)
    expected = _HEADER.size + 4 * _parameters(path, config)
    tables = config.seq_len * config.head_width
    if size == expected:  # written by a tool that drops the legacy tables
        return config, 0
    _check_size(path, size, expected + 4 * tables)
    return config, tables


def _parameters(path: Path, config: ModelConfig) -> int:
    try:
        return TensorTable(config).size
    except ConfigError as error:
        raise ModelError(
            f"model {path} has a header of which {error}: it is no llama2.c .bin file of "
            "version 0 or 1; anepy also reads GGUF files and Hugging Face folders"
        ) from None


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise ModelError(
            f"model {path} has {size} bytes, its header asks for {expected}: it is "
            f"{'truncated' if size < expected else 'longer than it says'}; get it again"
        )
