"""How large a model to train on some data within some time, by this machine's measured speed.

A model of N parameters wants about 20 N tokens, each of which costs about 6 N operations ("Training
Compute-Optimal Large Language Models", Hoffmann et al. 2022), and learns from a text read up to
four times nearly as well as from new text ("Scaling Data-Constrained Language Models", Muennighoff
et al. 2023).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..engine.engine import Engine
from ..engine.flops import flops_per_step
from ..models.model import Model, ModelConfig, TensorTable
from ..text.data import TokenData

_TOKENS_PER_PARAMETER = 20
_READINGS = 4
_BATCH = 8
_LONGEST = 256  # tokens of a sequence
_MEASURED_S = 1.0


@dataclass(frozen=True)
class Suggestion:
    """A model and how to train it.

    Attributes:
        config: its dimensions.
        parameters: how many weights it has.
        batch: sequences per step.
        steps: as many as fit the time, or as the data is worth.
        seconds: how long they take.
        readings: how often the data is read.
    """

    config: ModelConfig
    parameters: int
    batch: int
    steps: int
    seconds: float
    readings: float


def shape(width: int, vocab_size: int, seq_len: int) -> ModelConfig:
    """Return dimensions of usual proportions for a width that is a multiple of 32."""
    layers = max(2, round(width / 64))
    heads = max(2, width // (32 if width < 384 else 64))
    while width % heads or (width // heads) % 2:
        heads -= 1
    hidden = 32 * round(width * 8 / 3 / 32)
    return ModelConfig(width, hidden, layers, heads, heads, vocab_size, seq_len)


def suggest(data: TokenData, vocab_size: int, seconds: float) -> Suggestion:
    """Choose a model for data and a time.

    Args:
        data: what it will be trained on.
        vocab_size: of the data's tokenizer.
        seconds: how long training may take.

    Returns:
        The largest model that both are enough for; the smallest there is if they are for none.
    """
    seq_len = min(_LONGEST, max(8, (len(data) - 1) // 2))
    speed = _flops_per_s(shape(128, vocab_size, seq_len))
    by_time = math.sqrt(seconds * speed / (6 * _TOKENS_PER_PARAMETER))
    by_data = _READINGS * len(data) / _TOKENS_PER_PARAMETER
    config = size = None
    for candidate in _ladder(vocab_size, seq_len):
        parameters = TensorTable(candidate).size
        if config is not None and parameters > min(by_time, by_data):
            break
        config, size = candidate, parameters
    assert config is not None and size is not None
    per_step = flops_per_step(config, seq_len, _BATCH)["total"] / _flops_per_s(config)
    tokens = _BATCH * seq_len
    enough = max(1, math.ceil(_READINGS * len(data) / tokens))
    steps = max(1, min(enough, round(seconds / per_step)))
    return Suggestion(config, size, _BATCH, steps, steps * per_step, steps * tokens / len(data))


def _ladder(vocab_size: int, seq_len: int) -> Iterator[ModelConfig]:
    for width in (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024):
        yield shape(width, vocab_size, seq_len)


def _flops_per_s(config: ModelConfig) -> float:
    """Train a fresh model for a second; return FLOPs per second, by the formula of reports."""
    random = np.random.default_rng(0)
    size = (_BATCH, config.seq_len)
    tokens = random.integers(0, config.vocab_size, size).astype(np.int32)
    times: list[float] = []
    with Engine(Model.init(config), seq_len=config.seq_len) as engine:
        until = time.perf_counter() + _MEASURED_S
        while len(times) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            engine.step(tokens, tokens)
            engine.update(lr=0.0)
            times.append(time.perf_counter() - began)
    return flops_per_step(config, config.seq_len, _BATCH)["total"] / float(np.median(times[1:]))
