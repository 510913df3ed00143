"""Hugging Face's `config.json`: from the settings of a family to a `ModelConfig` and back.

Families are rows of one table. What a family's `config.json` leaves out has the value that its
class in transformers has. A setting that anepy does not compute is refused by its name, and so is
one that it does not know, unless it is known to change no result or says "no".

Source: the configuration and modelling files of the families in transformers 4.57 and 5.24.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ModelError
from ..system.files import parsed
from .model import ModelConfig


@dataclass(frozen=True)
class Family:
    """One kind of model in transformers.

    Attributes:
        architecture: the class that computes it.
        defaults: what its configuration has where `config.json` says nothing.
        qkv_bias: q, k and v have biases.
        qk_norm: every head of q and k is normalized.
    """

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False


_COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "head_dim": None,
}
_LLAMA = _COMMON | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("LlamaForCausalLM", _LLAMA),
        "mistral": Family("MistralForCausalLM", _MISTRAL),
        "qwen2": Family("Qwen2ForCausalLM", _QWEN2, qkv_bias=True),
        "qwen3": Family("Qwen3ForCausalLM", _QWEN2 | {"head_dim": 128}, qk_norm=True),
    }
)

# What `_config` reads.
_READ = {
    *_QWEN2,
    "model_type",
    "architectures",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "layer_types",
}
# What changes no result: how a model is stored, was made, and generates.
_HARMLESS = {
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "repetition_penalty",
    "return_dict",
    "sep_token_id",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "use_cache",
    "vocab_file",
}


class _Settings:
    """A `config.json` with its family's defaults, read value by value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.given = json_object(path)
        kind = str(self.given.get("model_type"))
        if kind not in FAMILIES:
            raise self.wrong("model_type", f"anepy reads {', '.join(FAMILIES)}", "is not supported")
        self.family = FAMILIES[kind]
        names = self.given.get("architectures")
        if names is not None and names != [self.family.architecture]:
            raise self.wrong(
                "architectures", f"anepy reads {self.family.architecture}", "is not supported"
            )

    def wrong(self, key: str, advice: str, problem: str = "is wrong") -> ModelError:
        """Make the error about one setting."""
        value = self.given.get(key, "missing")
        text = json.dumps(value)
        if len(text) > 80:
            text = text[:77] + "..."
        return ModelError(f"model {self.path.parent}: {key} {text} {problem}; {advice}")

    def value(self, key: str) -> Any:
        """Return a setting, or the family's default where the file leaves it out."""
        return self.given.get(key, self.family.defaults.get(key))

    def count(self, key: str, least: int = 1) -> int:
        """Return a setting that must be a whole number."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"a whole number of at least {least} is expected")
        return value

    def number(self, key: str, where: Mapping[str, Any] | None = None) -> float:
        """Return a setting that must be a positive number, of a dictionary within the file."""
        value = self.value(key) if where is None else where.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            what = "a positive number is expected"
            if where is None:
                raise self.wrong(key, what)
            raise ModelError(
                f"model {self.path.parent}: {key} {value!r} of its RoPE is wrong; {what}"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a setting that must be true or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false is expected")
        return value

    def unsupported(self, key: str) -> ModelError:
        """Make the error about a setting that anepy does not compute."""
        return self.wrong(key, "anepy cannot compute such a model", "is not supported")


def read(path: Path) -> ModelConfig:
    """Read a `config.json` of one of `FAMILIES`.

    Raises:
        ModelError: a setting is missing, wrong, not supported, or not known.
    """
    s = _Settings(path)
    for key, value in s.given.items():
        if key in _READ or key in _HARMLESS or key.startswith("_"):
            continue
        if value is not None and value not in (False, 0, "", [], {}):
            raise s.wrong(
                key, "anepy does not know it, and it may change results", "is not supported"
            )
    if s.value("hidden_act") not in ("silu", "swish"):
        raise s.unsupported("hidden_act")
    heads = s.count("num_attention_heads")
    kv_heads = heads if s.value("num_key_value_heads") is None else s.count("num_key_value_heads")
    if heads % kv_heads:
        raise s.wrong("num_key_value_heads", f"it must divide num_attention_heads {heads}")
    dim, layers, longest = (
        s.count(key) for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings")
    )
    if s.value("head_dim") is not None:
        width = s.count("head_dim")
    elif dim % heads:
        raise s.wrong("hidden_size", f"num_attention_heads {heads} does not divide it")
    else:
        width = dim // heads
    if width % 2:
        raise ModelError(f"model {path.parent}: head_dim {width} is odd; RoPE turns pairs")
    _refuse_windows(s, layers, longest)
    theta, scaling = _rope(s, longest)
    return ModelConfig(
        dim=dim,
        hidden_dim=s.count("intermediate_size"),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=s.count("vocab_size"),
        seq_len=longest,
        head_dim=None if width * heads == dim else width,
        norm_eps=s.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=s.family.qkv_bias,
        qk_norm=s.family.qk_norm,
        tied=s.flag("tie_word_embeddings"),
    )


def _refuse_windows(s: _Settings, layers: int, longest: int) -> None:
    """Refuse attention that does not see the whole sequence; a window of its length does."""
    kinds = s.given.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise s.unsupported("layer_types")
    if s.value("sliding_window") is None or s.count("sliding_window") >= longest:
        return
    if "use_sliding_window" in s.family.defaults and (
        kinds is not None
        or not s.flag("use_sliding_window")
        or s.count("max_window_layers", 0) >= layers
    ):
        return
    if "sliding_window" in s.given:
        raise s.unsupported("sliding_window")
    raise ModelError(
        f"model {s.path.parent}: sliding_window is left out, which means "
        f"{s.value('sliding_window')}, and is not supported; write null if there is no window"
    )


# What each kind of scaling takes.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _rope(s: _Settings, longest: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling, from `rope_parameters` (5) or `rope_scaling` (4)."""
    both = [s.given.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(each, dict) for each in both):
        raise s.wrong("rope_scaling", "rope_scaling and rope_parameters must be objects")
    # transformers takes rope_scaling where both are given; that they differ is a mistake.
    if both[0] and both[1] and _without_theta(both[0]) != _without_theta(both[1]):
        raise s.wrong("rope_scaling", "rope_parameters says otherwise")
    given = _without_theta(both[0] or both[1])
    theta = None
    for each in (*both, s.given):
        if each.get("rope_theta") is None:
            continue
        here = s.number("rope_theta", each)
        if theta not in (None, here):
            raise s.wrong("rope_theta", f"rope_theta is {theta} in another place; keep one")
        theta = here
    for each in (given, s.given):
        if each.pop("partial_rotary_factor", None) not in (None, 1):
            raise ModelError(
                f"model {s.path.parent}: partial_rotary_factor is not supported; anepy turns "
                "whole heads"
            )
    kind = given.pop("rope_type")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ModelError(
            f"model {s.path.parent}: rope_type {kind!r} is not supported; anepy computes "
            f"{', '.join(_SCALINGS)}"
        )
    if kind == "llama3":
        # The one at top level comes first; where there is none, the length.
        last = "original_max_position_embeddings"
        given[last] = s.given.get(last) or given.get(last) or longest
    for key, value in given.items():
        if key not in _SCALINGS[kind] and value is not None:
            raise ModelError(
                f"model {s.path.parent}: {key} {value!r} is not supported with rope_type {kind}"
            )
    numbers: dict[str, Any] = {key: s.number(key, given) for key in _SCALINGS[kind]}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ModelError(
            f"model {s.path.parent}: low_freq_factor {numbers['low_freq_factor']} is not below "
            f"high_freq_factor {numbers['high_freq_factor']}"
        )
    length = numbers.get("original_max_position_embeddings", 0.0)
    if length % 1:
        raise ModelError(
            f"model {s.path.parent}: original_max_position_embeddings {length} is no whole number"
        )
    if length:
        numbers["original_max_position_embeddings"] = int(length)
    if theta is None:
        theta = float(s.family.defaults["rope_theta"])
    return theta, {"rope_type": kind, **numbers} if numbers else None


def _without_theta(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings without their base, the kind under its newer name."""
    found = {key: value for key, value in given.items() if key not in ("rope_theta", "type")}
    found["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    return found


def json_object(path: Path) -> dict[str, Any]:
    try:
        found = parsed(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}; get it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; get it again")
    return found


def write(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Describe a model as a `config.json` that transformers 4 and 5 read.

    Raises:
        ModelError: no family computes such a model.
    """
    c = config
    if c.qkv_bias and c.qk_norm:
        raise ModelError("no Hugging Face model has qkv_bias and qk_norm; save a model with one")
    width = c.head_width
    if c.qk_norm or c.qkv_bias:
        kind = "qwen3" if c.qk_norm else "qwen2"
    else:
        # LlamaConfig refuses a hidden size that the number of heads does not divide.
        kind = "mistral" if c.dim % c.n_heads else "llama"
    found = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": width,
        "max_position_embeddings": c.seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": dict(c.rope_scaling) if c.rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied,
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype],
    }
    if kind == "mistral":
        found["sliding_window"] = None
    elif kind == "llama":
        found |= {"attention_bias": False, "mlp_bias": False}
    else:
        found |= {"use_sliding_window": False, "sliding_window": None}
    return found
