"""llama2.c's `.bin` files, version 0: seven dimensions, then the weights in float32.

The format is that of `legacy_export` in llama2.c's export.py; a negative vocabulary size marks a
separate classifier.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import ConfigError, ModelError
from ..system import files
from .model import Model, ModelConfig, PathLike, TensorTable
from .views import Array

_HEADER = struct.Struct("<7i")


def load(path: PathLike) -> Model:
    """Read a file, tied or with a separate classifier.

    Raises:
        ModelError: no such file, not such a file, or its size does not fit its header.
    """
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a pipe would block
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise ModelError(
            f"cannot read model {path}: {error.strerror or error}; pass a llama2.c .bin file"
        ) from None
    config, tables = _read_header(path, head, info.st_size)
    model = Model(config)
    try:
        data = np.memmap(path, dtype="<f4", mode="r", offset=_HEADER.size)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot map model {path}: {error}") from None
    at = 0
    for name in _file_order(config):
        if name is None:
            at += tables
            continue
        weight = model.weights[name]
        weight[...] = data[at : at + weight.size].reshape(weight.shape)
        at += weight.size
    if not np.isfinite(model.arena).all():
        raise ModelError(f"model {path} contains NaN or infinite weights: it is damaged")
    model.path = path
    return model


def save(model: Model, path: PathLike) -> int:
    """Write a file, complete or not at all.

    Returns:
        Its size in bytes.

    Raises:
        ModelError: the file cannot be written, or cannot hold such a model; an older file of that
            name is unchanged.
    """
    c = model.config
    _check_held(path, c)
    vocab = c.vocab_size if c.tied else -c.vocab_size
    header = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.seq_len)
    try:
        with files.replacing(path) as file:
            file.write(_HEADER.pack(*header))
            for name in _file_order(c):
                part = _rotary_tables(model.table) if name is None else model.weights[name]
                file.write(np.ascontiguousarray(part, dtype="<f4").data)
            return file.tell()
    except OSError as error:
        raise ModelError(files.write_failure(path, "model", error)) from None


def _check_held(path: PathLike, c: ModelConfig) -> None:
    """Refuse what the header has no place for and no reader would know of."""
    faults = [] if c.head_width * c.n_heads == c.dim else ["head_dim"]
    names = ("norm_eps", "rope_theta", "rope_scaling", "qkv_bias", "qk_norm")
    faults += [name for name in names if getattr(c, name) != getattr(ModelConfig, name)]
    if faults:
        raise ModelError(
            f"cannot write model {path}: a llama2.c .bin file cannot hold this model's "
            f"{' and '.join(faults)}"
        )


def _file_order(config: ModelConfig) -> Iterator[str | None]:
    """Yield tensor names in the order of llama2.c's version 0; None stands for the RoPE tables."""
    yield "tok_embeddings.weight"
    for part in (
        "attention_norm",
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
        "ffn_norm",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ):
        for layer in range(config.n_layers):
            yield f"layers.{layer}.{part}.weight"
    yield "norm.weight"
    yield None
    if not config.tied:
        yield "output.weight"


def _rotary_tables(table: TensorTable) -> Array:
    """Return the legacy cos and sin tables, float32 (2, seq_len, head_dim / 2)."""
    angles = np.outer(np.arange(table.config.seq_len), table.frequencies())
    return np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)


def _read_header(path: Path, head: bytes, size: int) -> tuple[ModelConfig, int]:
    """Validate a header against the file size; also return the floats in its RoPE tables."""
    if len(head) < _HEADER.size:
        raise ModelError(
            f"model {path} has {size} bytes, less than a llama2.c header: it is truncated or not a "
            "model"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = _HEADER.unpack(head)
    config = ModelConfig(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len, tied=vocab > 0)
    try:
        parameters = TensorTable(config).size
    except ConfigError as error:
        raise ModelError(
            f"model {path} has a header of which {error}: it is not a llama2.c .bin file of "
            "version 0"
        ) from None
    tables = config.seq_len * config.head_width
    expected = _HEADER.size + 4 * (parameters + tables)
    if size == expected:
        return config, tables
    if size == expected - 4 * tables:  # written by a tool that drops the legacy tables
        return config, 0
    raise ModelError(
        f"model {path} has {size} bytes, its header asks for {expected}: it is "
        f"{'truncated' if size < expected else 'longer than it says'}; get it again"
    )
