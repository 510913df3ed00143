"""Small models, engines and sequences that several test modules use, and how errors must look."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import needs
import numpy as np
import numpy.typing as npt
import pytest
from reference import llama64 as ref

from anepy.engine import Engine
from anepy.errors import AnepyError, ConfigError
from anepy.models.model import Model, ModelConfig, RopeScaling

GQA = ModelConfig(40, 70, 3, 10, 2, 523, 129)
SEPARATE = ModelConfig(52, 44, 2, 2, 1, 600, 70, tied=False)
# Heads whose channels together are more, or fewer, than those of the model, and what else Llama 3
# and Qwen do differently. Every share of the pairs is scaled: none, some, all.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
LINEAR = RopeScaling("linear", 2.5)
WIDE_HEADS = ModelConfig(
    36, 52, 2, 3, 1, 97, 129, head_dim=20, norm_eps=0.01, rope_theta=500.0, rope_scaling=LLAMA3
)
NARROW_HEADS = ModelConfig(
    44, 70, 2, 6, 2, 523, 129, 6, 1e-6, rope_theta=1e6, rope_scaling=LINEAR, tied=False
)
BIASES = ModelConfig(44, 52, 2, 6, 2, 211, 129, head_dim=10, qkv_bias=True)
NORMS = ModelConfig(52, 60, 2, 6, 2, 211, 129, head_dim=14, norm_eps=1e-6, qk_norm=True)
# Large enough that a step lasts while another thread does something.
BUSY = ModelConfig(256, 1024, 3, 4, 4, 4000, 256)


# Paths below a folder with a file "file" and a folder "folder", and why none can be written.
BAD_TARGETS = [
    ("missing/c.npz", "no folder"),
    ("file/c.npz", "no folder"),
    ("folder", "it is a folder"),
    ("/dev/null", "not a regular file"),
]


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Draw weights that take soft-max and SwiGLU out of their linear range, at every width."""
    return ref.random_weights(config, seed, 1.2 / math.sqrt(config.dim))


def make_model(config: ModelConfig = GQA, seed: int = 0) -> Model:
    model = Model(config)
    for name, values in weights_of(config, seed).items():
        model.weights[name][...] = values
    return model


def make_engine(config: ModelConfig = GQA, variant: str = "opt", **options: Any) -> Engine:
    return Engine(make_model(config), variant, "cpu", "fp32", **options)


def sequence(config: ModelConfig, length: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw tokens and targets; ids repeat, the first and the last of the vocabulary occur."""
    ids = np.random.default_rng((seed, length)).integers(0, config.vocab_size, length + 1)
    ids[length // 2 :: 3] = ids[0]
    ids[0], ids[-1] = config.vocab_size - 1, 0
    return ids[:-1], ids[1:]


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    """Return what was raised, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def message(call: Callable[[], object], kind: type[AnepyError] = ConfigError) -> str:
    """Return what a call that must fail says, in one line."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and "\0" not in text and len(text) < 600
    return text


def bits(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def mapped() -> int:
    """Return the bytes of address space in use."""
    needs.proc()
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
