"""GGUF files, the format of llama.cpp, through the package `gguf`.

llama.cpp's architecture `llama` keeps rotary pairs side by side, as anepy does; `qwen2` and `qwen3`
keep them half a head apart. Sources: llama.cpp's `conversion/llama.py`, `src/llama-model.cpp` and
`src/models/{llama,qwen2,qwen3}.cpp`; the key names are those of the package's `constants.py`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, TokenizerError
from ..system import files
from . import rope, tensors
from .model import ModelConfig
from .storage import Q8_BYTES, StoredTensors
from .stored_tokenizer import Pieces, StoredTokenizer
from .tensors import Stored, Tensor
from .tokenizer_formats import gguf_fields
from .views import Array

MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

# What the reader looks at, below the architecture's name.
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
}
# What changes no result.
_HARMLESS = {
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
}


# -------------------------------------------------------------------------------------- reading


class _Metadata:
    """The key-value part of a file, read value by value."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields
        self.arch = self.value("general.architecture")
        if self.arch not in ARCHITECTURES:
            raise ModelError(
                f"model {path}: general.architecture {self.arch!r} is not supported; anepy reads "
                f"{', '.join(ARCHITECTURES)}"
            )

    def value(self, key: str) -> Any:
        """Return a value, or None."""
        field = self.fields.get(key)
        return None if field is None else field.contents()

    def of(self, key: str) -> Any:
        """Return a value of the architecture; a list that gives one for each layer must agree."""
        value = self.value(f"{self.arch}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.wrong(key, "anepy computes layers of one shape")
            return value[0]
        return value

    def wrong(self, key: str, advice: str) -> ModelError:
        """Make the error about one value of the architecture."""
        value = self.value(f"{self.arch}.{key}")
        shown = "missing" if value is None else repr(value)[:80]
        return ModelError(f"model {self.path}: {self.arch}.{key} is {shown}; {advice}")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.of(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number above 0 is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number, of float32 as the shortest text that means it."""
        value = self.of(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.wrong(key, "a positive number is expected")
        return float(str(np.float32(value)))


def open_file(path: Path) -> Stored:
    """Find the tensors of a file and check them against its metadata.

    Raises:
        ModelError: the file is malformed, or something in it is missing or not supported.
    """
    reader = _reader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    meta = _Metadata(path, reader.fields)
    config = _config(meta, found)
    wanted = tensors.tensors(config)
    for tensor in wanted:
        if tensor.gguf not in found:
            raise ModelError(f"model {path} holds no tensor {tensor.gguf}; get it again")
        shape = tuple(int(n) for n in reversed(found[tensor.gguf].shape.tolist()))
        if shape != tensor.shape:
            raise ModelError(
                f"model {path}: tensor {tensor.gguf} has shape {list(shape)}, but the metadata "
                f"asks for {list(tensor.shape)}"
            )
    for name in set(found) - {tensor.gguf for tensor in wanted} - {ROPE_FACTORS}:
        raise ModelError(
            f"model {path} holds tensor {name}, which {meta.arch} has not here; anepy cannot "
            "compute with it"
        )
    fields = _tokenizer_fields(reader)
    return Stored(
        config,
        partial(_fill, path, found, wanted, meta.arch != "llama"),
        StoredTokenizer("gguf", fields=fields) if fields else None,
        _natural(wanted, found),
    )


def tokenizer_fields(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the metadata of a file's tokenizer: key -> (value types, value).

    Raises:
        ModelError: it is no whole GGUF file, or the package that reads it is missing.
    """
    return _tokenizer_fields(_reader(path))


def _tokenizer_fields(reader: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {
        key: (tuple(int(kind) for kind in field.types), field.contents())
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
    }


def _reader(path: Path) -> Any:
    """Open a file with the package gguf."""
    package = _gguf()
    with path.open("rb") as file:
        version = int.from_bytes(file.read(8)[4:], "little")
    known = package.gguf_reader.READER_SUPPORTED_VERSIONS
    if 0 < version < 0x10000 and version not in known:  # a larger one may be in the other order
        raise ModelError(
            f"model {path} is a GGUF file of version {version}, the package gguf reads "
            f"{' and '.join(map(str, known))}; convert it with llama.cpp, or get a newer one"
        )
    try:
        return package.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError):
        raise ModelError(
            f"model {path} is no whole GGUF file: it is truncated or damaged; get it again"
        ) from None


def _natural(wanted: list[Tensor], found: Mapping[str, Any]) -> str:
    """Return the storage that holds every matrix of a file as it is."""
    kinds = {found[tensor.gguf].tensor_type.name for tensor in wanted if len(tensor.shape) == 2}
    return {("Q8_0",): "q8", ("BF16",): "bf16"}.get(tuple(kinds), "f32")


def _config(meta: _Metadata, found: Mapping[str, Any]) -> ModelConfig:
    for key in meta.fields:
        name = key.removeprefix(f"{meta.arch}.")
        if name != key and name not in _READ | _HARMLESS and meta.value(key):
            raise meta.wrong(name, "anepy does not know it, and it may change results")
    if "token_embd.weight" not in found:
        raise ModelError(f"model {meta.path} holds no tensor token_embd.weight; get it again")
    vocabulary = int(found["token_embd.weight"].shape[-1])
    if meta.count("vocab_size", vocabulary) != vocabulary:
        raise meta.wrong("vocab_size", f"token_embd.weight has {vocabulary} rows")
    dim, heads = meta.count("embedding_length"), meta.count("attention.head_count")
    kv_heads = meta.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise meta.wrong("attention.head_count_kv", f"it must divide the {heads} heads")
    width = meta.count("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.count(key, width) != width:
            raise meta.wrong(key, f"anepy computes heads of one width, here {width}")
    if width % 2 or (meta.of("attention.key_length") is None and dim % heads):
        raise meta.wrong("attention.key_length", "anepy needs heads of an even number of channels")
    longest = meta.count("context_length")
    window = meta.of("attention.sliding_window")
    if window and window < longest:
        raise meta.wrong("attention.sliding_window", "anepy cannot compute such a model")
    theta = meta.number("rope.freq_base", 10000.0)
    return ModelConfig(
        dim=dim,
        hidden_dim=meta.count("feed_forward_length"),
        n_layers=meta.count("block_count"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=vocabulary,
        seq_len=longest,
        head_dim=None if width * heads == dim else width,
        norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_scaling(meta, found.get(ROPE_FACTORS), theta, width),
        qkv_bias="blk.0.attn_q.bias" in found,
        qk_norm=meta.arch == "qwen3",
        tied="output.weight" not in found,
    )


def _scaling(meta: _Metadata, divisors: Any, theta: float, width: int) -> dict[str, Any] | None:
    kind = meta.of("rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        raise meta.wrong("rope.scaling.type", "anepy computes none, linear and Llama 3's")
    key = "rope.scaling.factor"
    if f"{meta.arch}.{key}" not in meta.fields:
        key = "rope.scale_linear"
    # A factor of 0 stands for none.
    factor = meta.number(key, 1.0) if meta.of(key) and kind == "linear" else 1.0
    linear = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if divisors is None:
        return linear
    values = np.asarray(divisors.data, np.float64)
    try:
        if values.shape != (width // 2,):
            raise ValueError(f"there are {values.size} for heads of {width}")
        found = rope.scaling_of(values, theta, meta.of("rope.scaling.original_context_length"))
        if found is not None and (linear or meta.arch != "llama"):
            raise ValueError(f"{meta.arch} cannot have them here")
    except ValueError as error:
        raise ModelError(
            f"model {meta.path}: the factors of tensor {ROPE_FACTORS} are not supported: {error}"
        ) from None
    return found or linear


def _fill(
    path: Path,
    found: Mapping[str, Any],
    wanted: list[Tensor],
    half_split: bool,
    weights: Mapping[str, Array],
) -> None:
    dequantize = _gguf().quants.dequantize
    for tensor in wanted:
        stored = found[tensor.gguf]
        where = f"model {path}: tensor {tensor.gguf}"
        if isinstance(weights, StoredTensors) and stored.tensor_type.name == "Q8_0":
            blocks = stored.data
            if not np.isfinite(blocks.reshape(-1, Q8_BYTES)[:, :2].copy().view("<f2")).all():
                raise ModelError(
                    f"{where} has NaN or infinite weights: it is damaged; get it again"
                )
            if half_split and tensor.heads:
                blocks = tensors.from_half_split(blocks, tensor.heads)
            if weights.take_blocks(tensor.name, blocks):
                continue
        try:
            values = dequantize(stored.data, stored.tensor_type).reshape(tensor.shape)
        except NotImplementedError:  # from the package, for types that it does not know
            raise ModelError(
                f"{where} is {stored.tensor_type.name}, which the package gguf cannot read; get "
                "the model in F16, Q8_0 or a K type"
            ) from None
        if half_split and tensor.heads:
            values = tensors.from_half_split(values, tensor.heads)
        tensors.put(weights, tensor.name, values, where)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError("GGUF files need the package gguf; pip install 'anepy[gguf]'") from None
    return gguf


# -------------------------------------------------------------------------------------- writing


def check(config: ModelConfig) -> Any:
    """Refuse a model that llama.cpp cannot compute; return the package that writes files.

    Raises:
        ModelError: the model cannot be expressed, or the package is not installed.
    """
    arch = _architecture(config)
    scaling = config.rope_scaling or {"rope_type": "none"}
    if scaling["rope_type"] == "llama3" and arch != "llama":
        raise ModelError(
            f"llama.cpp's {arch} has no rope_scaling llama3; save a Hugging Face folder instead"
        )
    return _gguf()


def _architecture(config: ModelConfig) -> str:
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def save(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Array],
    dtype: str,
    tokenizer: StoredTokenizer | Pieces | None,
) -> int:
    """Write a file that llama.cpp loads, complete or not at all.

    Norms and biases are F32 whatever `dtype` says, and so is, instead of Q8_0, a matrix whose rows
    are no multiple of 32 long, for llama.cpp cuts rows into blocks of 32.

    Args:
        path: the file.
        config: the model's dimensions.
        weights: its tensors.
        dtype: "f32", "f16", "bf16" or "q8_0".
        tokenizer: one of a GGUF file, kept as it was, or another that such a file can hold. Else
            the file has none, and a warning says why.

    Returns:
        the bytes written.

    Raises:
        ModelError: the model or a weight cannot be expressed.
        OSError: the file cannot be written; an older one is unchanged.
    """
    package = check(config)
    arch = _architecture(config)
    with files.replacing(path) as file:
        writer = package.GGUFWriter(file.name, arch)
        try:
            _write_metadata(writer, package, config, dtype)
            _write_tokenizer(writer, package, path, config, tokenizer)
            _write_tensors(writer, package, config, weights, dtype, arch != "llama")
        finally:
            writer.close()
        return os.stat(file.name).st_size


def _write_metadata(writer: Any, package: Any, config: ModelConfig, dtype: str) -> None:
    c, width = config, config.head_width
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(package.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(c.rope_theta)
    scaling = c.rope_scaling or {"rope_type": "none"}
    if scaling["rope_type"] == "llama3":  # the rest follows from ROPE_FACTORS
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def _write_tokenizer(
    writer: Any,
    package: Any,
    path: Path,
    config: ModelConfig,
    tokenizer: StoredTokenizer | Pieces | None,
) -> None:
    try:
        fields = gguf_fields(tokenizer, config.vocab_size) if tokenizer is not None else {}
        reason = "the model has none"
    except TokenizerError as error:
        fields, reason = {}, str(error)
    except ModelError as error:
        raise ModelError(f"cannot write model {path}: {error}") from None
    for key, (kinds, value) in fields.items():
        types = [package.GGUFValueType(kind) for kind in kinds]
        # The writer refuses an empty list, which says no more than none.
        if value != []:
            writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    if fields:
        return
    writer.add_tokenizer_model("no_vocab")
    warnings.warn(
        f"{path} gets no tokenizer, so llama.cpp loads it but reads no text: {reason}",
        stacklevel=4,
    )


def _write_tensors(
    writer: Any,
    package: Any,
    config: ModelConfig,
    weights: Mapping[str, Array],
    dtype: str,
    half_split: bool,
) -> None:
    extra = []
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
        factors = rope.divisors(config.rope_theta, config.head_width, config.rope_scaling)
        extra = [factors.astype(np.float32)]
        writer.add_tensor_info(ROPE_FACTORS, extra[0].shape, extra[0].dtype, extra[0].nbytes)
    # First all names and sizes, then the numbers, one tensor at a time.
    planned = []
    for tensor in tensors.tensors(config):
        kind = package.GGMLQuantizationType[_kind(tensor, dtype)]
        shape, item = tensor.shape, np.dtype({"F32": "<f4", "F16": "<f2"}.get(kind.name, "u1"))
        if item == np.uint8:
            shape = package.quants.quant_shape_to_byte_shape(shape, kind)
        nbytes = math.prod(shape) * item.itemsize
        writer.add_tensor_info(tensor.gguf, shape, item, nbytes, raw_dtype=kind)
        planned.append((tensor, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra:
        writer.write_tensor_data(values)
    for tensor, kind in planned:
        values = weights[tensor.name]
        if half_split and tensor.heads:
            values = tensors.to_half_split(values, tensor.heads)
        if kind.name == "Q8_0":
            stored = package.quants.quantize(values, kind)
        else:
            stored = tensors.rounded(values, kind.name.lower(), tensor.name)
        writer.write_tensor_data(stored.view(np.uint8) if kind.name == "BF16" else stored)


def _kind(tensor: Tensor, dtype: str) -> str:
    """Return the type a tensor is stored in."""
    if len(tensor.shape) == 1 or (dtype == "q8_0" and tensor.shape[1] % 32):
        return "F32"
    return dtype.upper()
