"""Llama-2 models: dimensions and named weights."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import operator
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..native import abi, find
from .views import Array, Tensors

PathLike = str | os.PathLike[str]

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

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Return the radians per position by which RoPE turns each pair, (head_dim / 2,)."""
        pairs = range(self.config.head_dim // 2)
        return np.array([self.lib.anepy_rope_frequency(self.handle, pair) for pair in pairs])

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

    def views(self, arena: Array) -> Tensors:
        """Name the tensors of an arena, without copying."""
        return Tensors(
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
            llama2.c's model.py, e.g. `layers.0.attention.wq.weight`. `weights[name] = array` copies
            into it. An `Engine` on sim or ane that exists already goes on with programs for the old
            values until its next `update` or `restore`.
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
        from . import llama2c

        return llama2c.load(path)

    def save(self, path: PathLike) -> int:
        """Write a llama2.c `.bin` file (version 0), complete or not at all.

        Returns:
            Its size in bytes.

        Raises:
            ModelError: the file cannot be written; an older file of that name is unchanged.
        """
        from . import llama2c

        return llama2c.save(self, path)


def _rebuild(config: ModelConfig, weights: Array) -> Model:
    model = Model(config)
    model.arena[...] = weights
    return model


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
