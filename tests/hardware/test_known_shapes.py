"""One layer of models that people have, on the simulator: Qwen3-0.6B and Llama-3.2-1B."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tolerances
from reference import llama64 as ref
from tolerances import assert_tensors_close

from anepy.engine import Engine
from anepy.errors import UnsupportedError
from anepy.hardware import programs as mil
from anepy.hardware.program import CHIPS, Program
from anepy.models.model import Model, ModelConfig, RopeScaling

SCALING = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
SHAPES = {
    "Qwen3-0.6B": ModelConfig(1024, 3072, 1, 16, 8, 151936, 2048, 128, 1e-6, 1e6, qk_norm=True),
    "Llama-3.2-1B": ModelConfig(2048, 8192, 1, 32, 8, 128256, 2048, 64, 1e-5, 5e5, SCALING),
}
# The widest surfaces that each chip takes for all programs, with scores of all heads in one.
WIDEST = {"Qwen3-0.6B": 1920, "Llama-3.2-1B": 960}


@pytest.mark.parametrize("shape", SHAPES)
def test_step_gradients_match_float64(shape: str) -> None:
    """With a smaller vocabulary, which float64 would spend its time on."""
    config = dataclasses.replace(SHAPES[shape], vocab_size=500)
    model = Model(config)
    for name, value in ref.random_weights(config, 1).items():
        model.weights[name][...] = value
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 18, dtype=np.int32)
    loss, expected = ref.loss_and_gradients(model.weights, config, ids[:-1], ids[1:])
    with Engine(model, "max", "sim:m1", seq_len=64) as engine:
        stats = engine.step(ids[:-1], ids[1:])
        assert not stats.skipped and stats.loss == pytest.approx(loss, rel=1e-3)
        found = {name: g / stats.loss_scale for name, g in engine.gradients.items()}
    assert_tensors_close(
        found, expected, tolerances.FP16_GRADIENT, min_cosine=tolerances.FP16_COSINE
    )


def texts(model: Model, name: str, width: int, dialect: str) -> list[tuple[str, bytes]]:
    """Write a program, or its parts, whose weights are inputs: none has to be there."""
    parts = mil.describe(model.table, name, width=width).parts
    found = [mil.describe(model.table, name, width=width, part=i, live=True) for i in range(parts)]
    return [mil.generate(model, [program], dialect) for program in found]


@pytest.mark.parametrize("dialect", ["1.3", "1.0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_program_is_within_the_limits_of_every_chip(shape: str, dialect: str) -> None:
    """But for the soft-max of a whole vocabulary, which `max` leaves to the host."""
    model = Model(SHAPES[shape])
    for name in mil.names():
        if name == "softmax":
            continue
        for width in (64, WIDEST[shape]):
            for text, blob in texts(model, name, width, dialect):
                files = {mil.WEIGHT_FILE: blob} if blob else {}
                for chip in CHIPS:
                    Program(text, files, chip=chip, strict=True).close()


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_longer_sequences_are_refused_in_one_line(shape: str) -> None:
    with pytest.raises(UnsupportedError, match=r"sdpa_bwd2: a_in is .* takes 65536 channels"):
        texts(Model(SHAPES[shape]), "sdpa_bwd2", WIDEST[shape] + 64, "1.3")
