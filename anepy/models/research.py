"""Checkpoints of the research programs: a header of 96 bytes, then float32 weights and moments.

Version 2 is of the programs that bake weights, version 4 of the dynamic one, whose header has heads
of keys and values too. Layer by layer: nine weights, then m and v of each; then the final norm, its
m and v, and the embedding with its. The rows of wq and wk are in llama2.c's order, and the
classifier is the embedding. (`CkptHdr` and `save_checkpoint` of their sources.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, ModelError
from ..system import files
from . import tensors
from .model import ModelConfig, TensorTable
from .tensors import Stored
from .views import Array

MAGIC = struct.pack("<I", 0x424C5A54)
VERSIONS = (2, 4)
_HEADER = struct.Struct("<10i2f3d6i")
_PARTS = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "attention_norm",
    "ffn_norm",
)


@dataclass(frozen=True)
class Run:
    """What a checkpoint says of its run.

    Attributes:
        version: 2 or 4.
        step: steps done.
        total_steps: steps of the run.
        lr: learning rate.
        loss: last loss.
        updates: Adam's t.
    """

    version: int
    step: int
    total_steps: int
    lr: float
    loss: float
    updates: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a file.

    Attributes:
        config: dimensions; the context is the length of the sequences trained on.
        run: what it says of its run.
        path: the file.
    """

    config: ModelConfig
    run: Run
    path: Path

    def fill(
        self,
        weights: Mapping[str, Array],
        adam_m: Mapping[str, Array] | None = None,
        adam_v: Mapping[str, Array] | None = None,
    ) -> None:
        """Copy weights, and moments where arrays for them are given.

        Raises:
            ModelError: a number is not finite.
            OSError: the file cannot be read.
        """
        data = np.memmap(self.path, dtype="<f4", mode="r", offset=_HEADER.size)
        targets = {"": weights, "m.": adam_m, "v.": adam_v}
        at = 0
        for kind, name in _order(self.config):
            size = weights[name].size
            target = targets[kind]
            if target is not None:
                values = data[at : at + size].reshape(weights[name].shape)
                what = f"checkpoint {self.path}: {kind}{name}"
                tensors.put(target, name, values, what)
            at += size


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's header.

    Raises:
        ModelError: it is of another version, or does not fit the size of the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ModelError(f"checkpoint {path} has {len(head)} bytes, less than its header")
    _, version, step, total, layers, vocab, dim, hidden, heads, seq, lr, loss, *rest = (
        _HEADER.unpack(head)
    )
    updates, kv_heads, width, q_dim = rest[5:9]
    if version not in VERSIONS:
        raise ModelError(
            f"checkpoint {path} is of version {version} of the research programs; anepy reads "
            "versions 2 and 4: write it with one of those"
        )
    if version == 2:
        kv_heads, width, q_dim = heads, dim // max(heads, 1), dim
    config = ModelConfig(
        dim, hidden, layers, heads, kv_heads, vocab, seq,
        head_dim=None if width * heads == dim else width,
    )  # fmt: skip
    try:
        size = TensorTable(config).size
    except ConfigError as error:
        raise ModelError(f"checkpoint {path} has a header of which {error}") from None
    if q_dim != width * heads:
        raise ModelError(
            f"checkpoint {path} says {heads} heads of {width} make {q_dim}; it is damaged"
        )
    expected, found = _HEADER.size + 12 * size, path.stat().st_size
    if found != expected:
        raise ModelError(
            f"checkpoint {path} has {found} bytes, its header asks for {expected}: it is "
            f"{'truncated' if found < expected else 'longer than it says'}; get it again"
        )
    if min(step, total, updates) < 0:
        raise ModelError(f"checkpoint {path} has a header with negative counts; it is damaged")
    return Checkpoint(config, Run(version, step, total, lr, loss, updates), path)


def open_file(path: Path) -> Stored:
    """Read a checkpoint as a model.

    Raises:
        ModelError, OSError: as `read`.
    """
    checkpoint = read(path)

    def fill(weights: Mapping[str, Array]) -> None:
        checkpoint.fill(weights)

    return Stored(checkpoint.config, fill)


def save(
    path: Path,
    config: ModelConfig,
    run: Run,
    weights: Mapping[str, Array],
    adam_m: Mapping[str, Array] | None,
    adam_v: Mapping[str, Array] | None,
) -> int:
    """Write a checkpoint, complete or not at all; moments that are None are written as 0.

    Returns:
        Its size in bytes.

    Raises:
        ModelError: the format cannot hold the model.
        OSError: the file cannot be written; an older file of that name is unchanged.
    """
    check(config, run.version)
    kv_heads, width, q_dim = (
        (0, 0, 0)
        if run.version == 2
        else (config.n_kv_heads, config.head_width, config.head_width * config.n_heads)
    )
    header = _HEADER.pack(
        *struct.unpack("<i", MAGIC), run.version, run.step, run.total_steps, config.n_layers,
        config.vocab_size, config.dim, config.hidden_dim, config.n_heads, config.seq_len,
        run.lr, run.loss, 0.0, 0.0, 0.0, run.step, run.updates, run.updates,
        kv_heads, width, q_dim,
    )  # fmt: skip
    sources = {"": weights, "m.": adam_m, "v.": adam_v}
    with files.replacing(path) as file:
        file.write(header)
        for kind, name in _order(config):
            source = sources[kind]
            values = source[name] if source is not None and name in source else None
            if values is None:
                values = np.zeros(weights[name].shape, "<f4")
            file.write(np.ascontiguousarray(values, dtype="<f4").data)
        return file.tell()


def check(config: ModelConfig, version: int) -> None:
    """Refuse what a version has no place for.

    Raises:
        ModelError: with the settings, and the formats that hold them.
    """
    names = ["norm_eps", "rope_theta", "rope_scaling", "qkv_bias", "qk_norm", "tied"]
    faults = [name for name in names if getattr(config, name) != getattr(ModelConfig, name)]
    if version == 2:
        faults += [] if config.n_kv_heads == config.n_heads else ["n_kv_heads"]
        faults += [] if config.head_width * config.n_heads == config.dim else ["head_dim"]
    if faults:
        raise ModelError(
            f"a checkpoint of version {version} of the research programs cannot hold this model's "
            f"{' and '.join(faults)}; save it as .gguf or as a Hugging Face folder"
        )


def _order(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield kind ("" a weight, "m." and "v." its moments) and name of all in a file, in order."""
    for layer in range(config.n_layers):
        names = [f"layers.{layer}.{part}.weight" for part in _PARTS]
        yield from (("", name) for name in names)
        yield from ((kind, name) for name in names for kind in ("m.", "v."))
    for name in ("norm.weight", "tok_embeddings.weight"):
        yield from ((kind, name) for kind in ("", "m.", "v."))
