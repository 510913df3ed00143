"""Llama-2 models: dimensions, named weights, and llama2.c's `.bin` files (version 0)."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import math
import operator
import os
import stat
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError
from ..native import abi, find
from ..system import files

Array = npt.NDArray[np.float32]
PathLike = str | os.PathLike[str]

_HEADER = struct.Struct("<7i")
_ROPE_THETA = 10000.0
DEFAULT_SEQ = 256


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Llama-2 model.

    Attributes:
        dim: model width; a multiple of `n_heads`, head size even.
        hidden_dim: width of the feed-forward layers.
        n_layers: number of layers.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of `n_heads`; head h reads KV head
            h // (n_heads // n_kv_heads).
        vocab_size: number of token ids.
        seq_len: longest sequence in tokens.
        tied: the classifier is the embedding matrix; otherwise `output.weight` is separate.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.n_heads


# The public TinyStories models of llama2.c.
PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "stories260K": ModelConfig(64, 172, 5, 8, 4, 512, 512),
        "stories15M": ModelConfig(288, 768, 6, 6, 6, 32000, 256),
        "stories42M": ModelConfig(512, 1376, 8, 8, 8, 32000, 1024),
        "stories110M": ModelConfig(768, 2048, 12, 12, 12, 32000, 1024),
    }
)


class TensorTable:
    """The native table of a model's tensors: where each name lives in an arena.

    Raises:
        ConfigError: the dimensions make no model.
        LibraryNotFoundError: there is no native library.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.lib = find.library()
        handle = ctypes.c_void_p()
        try:
            fields = {k: operator.index(v) for k, v in dataclasses.asdict(config).items()}
            native = abi.Config(**fields)
        except TypeError as error:
            raise ConfigError(f"model dimensions must be whole numbers: {error}") from None
        for name, value in fields.items():
            if getattr(native, name) != value:
                raise ConfigError(f"{name} is {value}, far beyond what a model can have")
        self.lib.anepy_model_create(ctypes.byref(handle), ctypes.byref(native))
        self.handle = handle
        finalizer = weakref.finalize(self, self.lib.anepy_model_free, handle)
        finalizer.atexit = False  # the process takes its memory along
        self.size: int = self.lib.anepy_model_arena_n(handle)
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}
        for index in range(self.lib.anepy_model_tensor_n(handle)):
            tensor = abi.Tensor()
            self.lib.anepy_model_tensor(handle, index, ctypes.byref(tensor))
            shape = (tensor.rows, tensor.cols) if tensor.is_matrix else (tensor.cols,)
            self.places[tensor.name.decode()] = (tensor.offset, shape)

    def arena(self) -> Array:
        """Return zeroed float32 (size,) memory for one value per parameter.

        It is freed when the last view of it is gone.

        Raises:
            NativeError: the system gives no memory.
        """
        nbytes = self.size * 4
        address = ctypes.c_void_p()
        self.lib.anepy_memory_alloc(ctypes.byref(address), nbytes)
        memory = (ctypes.c_float * self.size).from_address(address.value or 0)
        finalizer = weakref.finalize(memory, self.lib.anepy_memory_free, address, nbytes)
        finalizer.atexit = False
        return np.frombuffer(memoryview(memory), dtype=np.float32)

    def views(self, arena: Array) -> Mapping[str, Array]:
        """Name the tensors of an arena, without copying."""
        return MappingProxyType(
            {
                name: arena[offset : offset + math.prod(shape)].reshape(shape)
                for name, (offset, shape) in self.places.items()
            }
        )


class Model:
    """A Llama-2 model in memory.

    Attributes:
        config: the dimensions.
        weights: name -> writable float32 view; matrices are (out, in). Names as in Meta's Llama and
            llama2.c's model.py, e.g. `layers.0.attention.wq.weight`.
        arena: float32 (n_parameters,), all weights in the order of the native tensor table.
        path: the file it was loaded from, if any.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Make a model whose weights are all zero; see `init` and `load`."""
        self.config = config
        self.table = TensorTable(config)
        self.arena = self.table.arena()
        self.weights = self.table.views(self.arena)
        self.path: Path | None = None

    def __repr__(self) -> str:
        return f"Model({self.config}, {self.n_parameters:,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles carry the weights; the native table is made anew.
        return _rebuild, (self.config, self.arena.copy())

    @property
    def n_parameters(self) -> int:
        """How many weights there are; a tied classifier counts once."""
        return self.table.size

    @classmethod
    def init(cls, config: ModelConfig, seed: int = 0) -> Model:
        """Make a model with random weights, as llama2.c's trainer starts.

        Matrices are normal with deviation 0.02, those that write to the residual stream (wo, w3)
        with 0.02 / sqrt(2 n_layers); norm weights are 1 (model.py of llama2.c).

        Example:
            >>> Model.init(PRESETS["stories260K"], seed=1).n_parameters
            260032
        """
        if seed < 0:
            raise ConfigError(f"seed is {seed}, expected a number >= 0")
        model = cls(config)
        for index, (name, weight) in enumerate(model.weights.items()):
            if weight.ndim == 1:
                weight.fill(1.0)
                continue
            deviation = 0.02
            if name.endswith(("attention.wo.weight", "feed_forward.w3.weight")):
                deviation /= math.sqrt(2 * config.n_layers)
            random = np.random.default_rng((seed, index))
            random.standard_normal(out=weight, dtype=np.float32)
            weight *= np.float32(deviation)
        return model

    @classmethod
    def load(cls, path: PathLike) -> Model:
        """Read a llama2.c `.bin` file (version 0; tied or separate classifier).

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
        model = cls(config)
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

    def save(self, path: PathLike) -> int:
        """Write a llama2.c `.bin` file (version 0), complete or not at all.

        Returns:
            Its size in bytes.

        Raises:
            ModelError: the file cannot be written; an older file of that name is unchanged.
        """
        c = self.config
        vocab = c.vocab_size if c.tied else -c.vocab_size
        header = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.seq_len)
        try:
            with files.replacing(path) as file:
                file.write(_HEADER.pack(*header))
                for name in _file_order(c):
                    part = _rotary_tables(c) if name is None else self.weights[name]
                    file.write(np.ascontiguousarray(part, dtype="<f4").data)
                return file.tell()
        except OSError as error:
            raise ModelError(files.write_failure(path, "model", error)) from None


def _rebuild(config: ModelConfig, weights: Array) -> Model:
    model = Model(config)
    model.arena[...] = weights
    return model


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


def _rotary_tables(config: ModelConfig) -> Array:
    """Return the legacy cos and sin tables, float32 (2, seq_len, head_dim / 2)."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angles = np.outer(np.arange(config.seq_len), _ROPE_THETA**-pairs)
    return np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)


def parameters(c: ModelConfig) -> int:
    """Count the weights of a model of these dimensions; a tied classifier counts once."""
    kv = c.head_dim * c.n_kv_heads
    layer = 2 * c.dim * c.dim + 2 * kv * c.dim + 3 * c.hidden_dim * c.dim + 2 * c.dim
    return (1 if c.tied else 2) * c.vocab_size * c.dim + c.n_layers * layer + c.dim


def sequence_length(wanted: int | None, context: int) -> int:
    """Return the tokens per sequence: what is wanted, else 256 or the context if shorter.

    Raises:
        ConfigError: more is wanted than the model's context.
    """
    if wanted is None:
        return min(DEFAULT_SEQ, context)
    if wanted > context:
        raise ConfigError(f"seq is {wanted}, the model's context is {context}: lower seq")
    return wanted


def _read_header(path: Path, head: bytes, size: int) -> tuple[ModelConfig, int]:
    """Validate a header against the file size; also return the floats in its RoPE tables."""
    if len(head) < _HEADER.size:
        raise ModelError(
            f"model {path} has {size} bytes, less than a llama2.c header: it is truncated or not a "
            "model"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = _HEADER.unpack(head)
    config = ModelConfig(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len, vocab > 0)
    limits = (1 << 15, 1 << 16, 1 << 10, 1 << 10, 1 << 10, 1 << 22, 1 << 20)
    names = [f.name for f in dataclasses.fields(ModelConfig)][:7]
    for name, limit in zip(names, limits, strict=True):
        if not 1 <= getattr(config, name) <= limit:
            raise ModelError(
                f"model {path} has {name} {getattr(config, name)} in its header, expected 1 to "
                f"{limit}: it is not a llama2.c .bin file of version 0"
            )
    if config.dim % config.n_heads or config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise ModelError(
            f"model {path} has dim {config.dim}, {config.n_heads} heads, {config.n_kv_heads} KV "
            "heads in its header, which do not divide: it is not a llama2.c .bin file of version 0"
        )
    tables = config.seq_len * config.head_dim
    expected = _HEADER.size + 4 * (parameters(config) + tables)
    if size == expected:
        return config, tables
    if size == expected - 4 * tables:  # written by a tool that drops the legacy tables
        return config, 0
    raise ModelError(
        f"model {path} has {size} bytes, its header asks for {expected}: it is "
        f"{'truncated' if size < expected else 'longer than it says'}; get it again"
    )
