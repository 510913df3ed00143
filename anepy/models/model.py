"""Models of the Llama family: dimensions and named weights."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import operator
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..native import abi, find
from .freezing import Freeze, frozen_names, patterns
from .storage import Row, StoredTensors
from .storages import STORAGES, check_storage
from .stored_tokenizer import Pieces, StoredTokenizer
from .views import Array, Tensors

if TYPE_CHECKING:
    from .lora import Lora

PathLike = str | os.PathLike[str]
Place = tuple[int, tuple[int, ...]]  # first element, shape

DEFAULT_SEQ = 256
_STORAGE_NAMES = {number: name for name, number in STORAGES.items()}


_ROPE_TYPES = ("default", "linear", "llama3")  # by number in C


@dataclass(frozen=True)
class RopeScaling(Mapping[str, Any]):
    """How the frequencies of RoPE are scaled, under the names of transformers' `config.json`.

    Hashable, and a mapping of the settings that its type has: `dict(scaling)` is what a
    `config.json` holds.

    Attributes:
        rope_type: "linear" divides all frequencies by `factor`: positions are interpolated (Chen
            et al. 2023, arXiv 2306.15595). "llama3" is that of Llama 3.1: a pair that turns
            `high_freq_factor` times or more within the original context keeps its frequency, one
            that turns `low_freq_factor` times or less is divided by `factor`, and between the two
            the share that is kept is linear in the turns.
        factor: above 1 for contexts longer than the original.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only; above `low_freq_factor`.
        original_max_position_embeddings: tokens of the original context; llama3 only.

    Raises:
        ConfigError: another type, a setting that the type needs is missing, or one that it does
            not have is given.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_TYPES[1:]:
            raise ConfigError(f"rope_type is {self.rope_type!r}, expected linear or llama3")
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            given = getattr(self, name) is not None
            if given != (self.rope_type == "llama3"):
                raise ConfigError(
                    f"rope_type {self.rope_type} {'has no' if given else 'needs'} {name}"
                )

    def __getitem__(self, name: str) -> Any:
        if name not in set(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        names = (field.name for field in dataclasses.fields(self))
        return (name for name in names if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a model of the Llama family; the defaults are Llama 2's.

    Attributes:
        dim: model width.
        hidden_dim: width of the feed-forward layers.
        n_layers: number of layers.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of `n_heads`; head h reads KV head
            h // (n_heads // n_kv_heads).
        vocab_size: number of token ids.
        seq_len: longest sequence in tokens.
        head_dim: channels of a head, even; None: `dim / n_heads`. `head_width` is the number.
        norm_eps: added to the mean square in every RMSNorm, 1e-12 to 0.1.
        rope_theta: base of RoPE's frequencies, theta^(-2i / head_dim) for pair i.
        rope_scaling: None or a `RopeScaling`; another mapping of its settings becomes one.
        qkv_bias: wq, wk and wv add a bias (Qwen 2).
        qk_norm: each head of q and k goes through an RMSNorm of its own before RoPE (Qwen 3).
        tied: the classifier is the embedding matrix; otherwise `output.weight` is separate.
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
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        scaling = self.rope_scaling
        if scaling is None or isinstance(scaling, RopeScaling):
            return
        try:
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        except TypeError as error:
            raise ConfigError(f"rope_scaling {dict(scaling)} is no RopeScaling: {error}") from None

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.dim // self.n_heads


# The public TinyStories models of llama2.c.
PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "stories260K": ModelConfig(64, 172, 5, 8, 4, 512, 512),
        "stories15M": ModelConfig(288, 768, 6, 6, 6, 32000, 256),
        "stories42M": ModelConfig(512, 1376, 8, 8, 8, 32000, 1024),
        "stories110M": ModelConfig(768, 2048, 12, 12, 12, 32000, 1024),
    }
)


def _native(config: ModelConfig) -> abi.Config:
    """Return the struct of a configuration; what its numbers may be is judged by the library."""
    scaling: Mapping[str, Any] = config.rope_scaling or {"rope_type": "default"}
    whole = {
        "head_dim": 0 if config.head_dim is None else config.head_dim,
        "rope_scaling": _ROPE_TYPES.index(scaling["rope_type"]),
        "rope_original_max_position": scaling.get("original_max_position_embeddings", 0),
    }
    for field in dataclasses.fields(config):
        if field.type in ("int", "bool"):
            whole[field.name] = getattr(config, field.name)
    real = {
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_factor": scaling.get("factor", 0.0),
        "rope_low_freq_factor": scaling.get("low_freq_factor", 0.0),
        "rope_high_freq_factor": scaling.get("high_freq_factor", 0.0),
    }
    for values, convert, kind in (
        (whole, operator.index, "a whole number"),
        (real, float, "a number"),
    ):
        for name, value in values.items():
            try:
                values[name] = convert(value)
            except (TypeError, ValueError):
                raise ConfigError(f"{name} is {value!r}, expected {kind}") from None
    native = abi.Config(**whole, **real)
    for name, value in whole.items():
        if getattr(native, name) != value:
            raise ConfigError(f"{name} is {value}, far beyond what a model can have")
    for name in ("norm_eps", "rope_theta"):
        if real[name] == 0.0:  # the library would take it for the default
            raise ConfigError(f"{name} is 0, expected a number above")
    return native


class TensorTable:
    """The native table of a model's tensors: where each name lives in an arena.

    Args:
        config: dimensions of the model.
        freeze: tensors that have no gradient and no moments, by patterns of names.
        lora: an adapter, which alone is trained then.
        storage: of the matrices, "f32", "bf16" or "q8"; where rows are no multiple of 32 long, bf16
            takes the place of q8. Vectors are float32. Only float32 is trained.

    Attributes:
        places: name -> number of its first parameter, shape.
        rows: name -> where it is in the arena of weights, and how it is stored.
        adapter: the same in the arena of the adapter, of its tensors.
        trainable: the same in the arenas of gradients and moments, of the tensors they have.
        frozen: the names of the others.
        untrainable: those that nobody froze, but that are stored smaller than float32.
        size: parameters.

    Raises:
        ConfigError: the dimensions make no model, a pattern matches nothing or leaves nothing, or
            there are both patterns and an adapter.
        LibraryNotFoundError: there is no native library.
    """

    def __init__(
        self,
        config: ModelConfig,
        freeze: Freeze = (),
        lora: Lora | None = None,
        storage: str = "f32",
    ) -> None:
        if lora is not None and patterns(freeze):
            raise ConfigError("freeze and lora: beside an adapter all weights are frozen already")
        self.config = config
        self.lib = find.library()
        handle = ctypes.c_void_p()
        native = _native(config)
        self.lib.anepy_model_create(ctypes.byref(handle), ctypes.byref(native))
        self.handle = handle
        finalizer = weakref.finalize(self, self.lib.anepy_model_free, handle)
        finalizer.atexit = False  # the process takes its memory along
        self.size: int = self.lib.anepy_model_arena_n(handle)
        names = [tensor.name.decode() for tensor in self._rows()]
        number = STORAGES[check_storage(storage)]
        for index in range(len(names)) if number else ():
            self.lib.anepy_model_store(handle, index, number)
        chosen = frozen_names(names, freeze)
        for name in chosen:
            self.lib.anepy_model_freeze(handle, names.index(name))
        trained = {t.name.decode() for t in self._rows() if t.gradient >= 0}
        self.frozen = tuple(name for name in names if name not in trained)
        self.untrainable = tuple(name for name in self.frozen if name not in chosen)
        if lora is not None:
            targets = sum(1 << abi.TARGETS.index(target) for target in lora.targets)
            self.lib.anepy_model_adapt(handle, lora.rank, lora.scale, targets)
            self.frozen, self.untrainable = tuple(names), ()
        self.places: dict[str, Place] = {}
        self.rows: dict[str, Row] = {}
        self.adapter: dict[str, Place] = {}
        self.trainable: dict[str, Place] = {}
        for tensor in self._rows():
            name = tensor.name.decode()
            shape = (tensor.rows, tensor.cols) if tensor.flags & abi.MATRIX else (tensor.cols,)
            places = self.adapter if tensor.flags & abi.ADAPTER else self.places
            places[name] = (tensor.offset, shape)
            if places is self.places:
                self.rows[name] = Row(tensor.byte, _STORAGE_NAMES[tensor.storage], shape)
            if tensor.gradient >= 0:
                self.trainable[name] = (tensor.gradient, shape)

    def _rows(self) -> Iterator[abi.Tensor]:
        for index in range(self.lib.anepy_model_tensor_n(self.handle)):
            tensor = abi.Tensor()
            self.lib.anepy_model_tensor(self.handle, index, ctypes.byref(tensor))
            yield tensor

    @property
    def trainable_size(self) -> int:
        """Elements of the arenas of gradients and moments."""
        return int(self.lib.anepy_model_gradient_n(self.handle))

    def second_moments(self, optimizer: str) -> dict[str, Place]:
        """Return the trainable tensors of which an optimizer keeps two moments, not one.

        Raises:
            ConfigError: there is no such optimizer.
        """
        name = optimizer.encode("unicode_escape")
        kept = {
            tensor.name.decode(): self.lib.anepy_optimizer_moments(name, ctypes.byref(tensor))
            for tensor in self._rows()
        }
        return {key: place for key, place in self.trainable.items() if kept[key] > 1}

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Return the radians per position by which RoPE turns each pair, (head_dim / 2,)."""
        pairs = range(self.config.head_width // 2)
        return np.array([self.lib.anepy_rope_frequency(self.handle, pair) for pair in pairs])

    def arena(self, trainable: bool = False, dtype: type[Any] = np.float32) -> Array:
        """Return zeroed memory for one value per parameter.

        It is freed when the last view of it is gone.

        Args:
            trainable: only for the parameters of trainable tensors.
            dtype: float32, or uint16 for bf16.

        Raises:
            NativeError: the system gives no memory.
        """
        size = self.trainable_size if trainable else self.size
        return self._memory(np.dtype(dtype).itemsize * size).view(dtype)

    def weights_arena(self) -> npt.NDArray[Any]:
        """Return zeroed memory for the weights as they are stored: float32, or bytes.

        Raises:
            NativeError: the system gives no memory.
        """
        memory = self._memory(self.lib.anepy_model_params_nbytes(self.handle))
        stored = any(row.storage != "f32" for row in self.rows.values())
        return memory if stored else memory.view(np.float32)

    def _memory(self, nbytes: int) -> npt.NDArray[np.uint8]:
        address = ctypes.c_void_p()
        self.lib.anepy_memory_alloc(ctypes.byref(address), nbytes)
        memory = (ctypes.c_uint8 * nbytes).from_address(address.value or 0)
        finalizer = weakref.finalize(memory, self.lib.anepy_memory_free, address, nbytes)
        finalizer.atexit = False
        return np.frombuffer(memoryview(memory), dtype=np.uint8)

    def views(
        self, arena: Array, trainable: bool = False, places: Mapping[str, Place] | None = None
    ) -> Tensors:
        """Name the tensors of an arena, without copying.

        Args:
            arena: as `arena` returns.
            trainable: it has the trainable tensors only.
            places: those to name; default all that it has.
        """
        if places is None:
            places = self.trainable if trainable else self.places
        return Tensors(
            {
                name: arena[offset : offset + math.prod(shape)].reshape(shape)
                for name, (offset, shape) in places.items()
            },
            self.frozen if trainable else (),
        )


class Model:
    """A model of the Llama family in memory.

    Attributes:
        config: the dimensions.
        weights: name -> writable float32 view; matrices are (out, in). Names as in Meta's Llama and
            llama2.c's model.py, e.g. `layers.0.attention.wq.weight`. `weights[name] = array` copies
            into it. An `Engine` on sim or ane that exists already goes on with programs for the old
            values until its next `update` or `restore`. Where `storage` is smaller, a name gives
            a read-only float32 copy, and assigning to it converts.
        arena: float32 (n_parameters,), all weights in the order of the native tensor table; where
            they are stored smaller, uint8: their bytes.
        storage: how the matrices are stored: "f32", "bf16", or "q8", int8 with a scale for 32
            values of a row, as GGUF's Q8_0. What is stored smaller is not trained.
        path: the file or folder it was loaded from, if any.
        tokenizer: what came with it, kept as it was stored; None if nothing did. `save` writes it
            again where the format is the one it came in. A tokenizer of llama2.c's kind, which a
            GGUF file can hold, may be assigned.
    """

    def __init__(self, config: ModelConfig, storage: str = "f32") -> None:
        """Make a model whose weights are all zero; `init` makes random ones, `load` reads them."""
        self.config = config
        self.storage = storage
        self.table = TensorTable(config, storage=storage)
        self.arena = self.table.weights_arena()
        self.weights: Tensors | StoredTensors
        if self.arena.dtype == np.float32:
            self.weights = self.table.views(self.arena)
        else:
            self.weights = StoredTensors(self.table.lib, self.table.rows, self.arena)
        self.path: Path | None = None
        self.tokenizer: StoredTokenizer | Pieces | None = None

    def __repr__(self) -> str:
        return f"Model({self.config}, {self.n_parameters:,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles carry the weights; the native table is made anew.
        return _rebuild, (self.config, self.arena.copy(), self.tokenizer, self.storage)

    @property
    def n_parameters(self) -> int:
        """How many weights there are; a tied classifier counts once."""
        return self.table.size

    @classmethod
    def init(cls, config: ModelConfig, seed: int = 0, storage: str = "f32") -> Model:
        """Make a model with random weights, as llama2.c's trainer starts.

        Matrices are normal with deviation 0.02, those that write to the residual stream (wo, w3)
        with 0.02 / sqrt(2 n_layers); norm weights are 1, biases 0 (model.py of llama2.c). Stored
        smaller, the numbers are those of float32, rounded; one tensor at a time is float32.

        Example:
            >>> Model.init(PRESETS["stories260K"], seed=1).n_parameters
            260032
        """
        if seed < 0:
            raise ConfigError(f"seed is {seed}, expected a number >= 0")
        model = cls(config, storage)
        for index, (name, row) in enumerate(model.table.rows.items()):
            stored = isinstance(model.weights, StoredTensors)
            weight = np.empty(row.shape, np.float32) if stored else model.weights[name]
            if weight.ndim == 1:
                weight.fill(0.0 if name.endswith(".bias") else 1.0)
            else:
                deviation = 0.02
                if name.endswith(("attention.wo.weight", "feed_forward.w3.weight")):
                    deviation /= math.sqrt(2 * config.n_layers)
                random = np.random.default_rng((seed, index))
                random.standard_normal(out=weight, dtype=np.float32)
                weight *= np.float32(deviation)
            if stored:
                model.weights[name] = weight
        return model

    def stored(self, storage: str) -> Model:
        """Copy the model with its matrices stored so: "f32", "bf16" or "q8".

        Raises:
            ConfigError: no such storage, or a weight is too large for it.
        """
        copy = Model(self.config, storage)
        if storage == self.storage:
            copy.arena[...] = self.arena
        else:
            for name in self.weights:
                copy.weights[name] = self.weights[name]
        copy.path, copy.tokenizer = self.path, self.tokenizer
        return copy

    @classmethod
    def load(cls, path: PathLike, storage: str = "f32") -> Model:
        """Read a model; its format is told by its content.

        Args:
            path: a llama2.c `.bin` file (version 0 or 1, float32), a GGUF file, a Hugging Face
                folder with `config.json`, or a safetensors file in such a folder.
            storage: of the matrices in memory, "f32", "bf16" or "q8"; one tensor at a time is
                float32 on its way there, and Q8_0 of a GGUF file is kept as it is. "auto": as
                the file has them, if that is bf16 or Q8_0 throughout, else "f32".

        Raises:
            ModelError: no such file, none of these, damaged, a model that anepy cannot compute, or
                the package that reads the format is not installed.
        """
        from . import formats

        return formats.load(path, storage)

    def save(self, path: PathLike, dtype: str = "f32") -> int:
        """Write the model, complete or not at all.

        Args:
            path: ending in `.bin`, a llama2.c file of version 0; in `.gguf`, a GGUF file; else a
                Hugging Face folder. A folder that is there keeps its other files.
            dtype: "f32"; "f16" and "bf16" (not `.bin`) round the weights, "q8_0" (`.gguf` only)
                stores matrices in 8 bits with a scale for 32 values.

        Returns:
            The bytes written.

        Raises:
            ModelError: the format cannot hold the model or its weights, or nothing can be written;
                an older file of that name is unchanged.
        """
        from . import formats

        return formats.save(self, path, dtype)


def _rebuild(
    config: ModelConfig,
    weights: npt.NDArray[Any],
    tokenizer: StoredTokenizer | Pieces | None,
    storage: str,
) -> Model:
    model = Model(config, storage)
    model.arena[...] = weights
    model.tokenizer = tokenizer
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
