"""Resident training: weights as inputs, layers as programs, weight gradients on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_model, message, sequence
from tolerances import FP16_GRADIENT, assert_tensors_close

from anepy.engine import Engine
from anepy.hardware import predict
from anepy.models.lora import Lora
from anepy.models.model import PRESETS, Model, ModelConfig

SHAPES = {"gqa": GQA, "separate": SEPARATE, "biases": BIASES, "norms": NORMS}


def unscaled(engine: Engine) -> dict[str, np.ndarray]:
    return {name: value / engine.gradient_scale for name, value in engine.gradients.items()}


def accumulated(config: ModelConfig, variant: str, **options: Any) -> dict[str, np.ndarray]:
    """Return the gradients of three steps of different lengths."""
    with Engine(make_model(config), variant, "sim", **options) as engine:
        for number, length in enumerate((64, 33, 50)):
            assert not engine.step(*sequence(config, length, number)).skipped
        return unscaled(engine)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_several_steps_are_those_of_other_variants(name: str) -> None:
    expected = accumulated(SHAPES[name], "dynamic")
    for variant in ("resident", "baseline+offload_dw", "baseline+fused_layer"):
        found = accumulated(SHAPES[name], variant)
        assert_tensors_close(found, expected, FP16_GRADIENT)


def test_programs_are_compiled_once_in_fifty_updates() -> None:
    config = ModelConfig(32, 48, 2, 2, 2, 61, 64)
    tokens, targets = sequence(config, 64)
    with Engine(Model.init(config), "resident", "sim:m4") as engine:
        losses = []
        for _ in range(50):
            losses.append(engine.step(tokens, targets).loss)
            assert engine.update(lr=3e-3).compile_ms < 1000
        assert engine.compiles == 1
    assert losses[-1] < 0.5 * losses[0] and np.all(np.isfinite(losses))


def test_step_of_stories110m_takes_three_dispatches_a_layer_and_four() -> None:
    resident = predict.count(PRESETS["stories110M"], "resident", 256)
    assert resident.dispatches == 3 * 12 + 4
    assert resident.host_flops == resident.dw_flops == resident.host_exps == 0


@pytest.mark.parametrize(
    ("variant", "dispatches"),
    [
        ("baseline", 2 * 6),
        ("baseline+offload_dw", 2 * 7),
        ("baseline+fused_layer", 2 * 2),
        ("baseline+offload_classifier+offload_dw", 2 * 7 + 3),
        ("resident-fused_layer", 2 * 9 + 6),
        ("resident-offload_dw", 2 * 2 + 3),
        ("resident", 2 * 3 + 4),
    ],
)
def test_dispatches_of_a_step(variant: str, dispatches: int) -> None:
    config = ModelConfig(64, 96, 2, 4, 2, 160, 64)
    with Engine(make_model(config), variant, "sim", seq_len=64) as engine:
        assert engine.step(*sequence(config, 64)).dispatches == dispatches


@pytest.mark.parametrize("variant", ["resident", "baseline+offload_dw"])
def test_skipped_step_takes_back_what_it_had_added(variant: str) -> None:
    """Of a step whose gradients overflow below the layers that are done already."""
    tokens, targets = sequence(GQA, 64)
    for power in range(12, 40):
        with Engine(make_model(GQA), variant, "sim", seq_len=64, loss_scale=2.0**power) as engine:
            assert not engine.step(tokens, targets).skipped
            before = unscaled(engine)
            same = np.full(64, 7)  # all add up, so this overflows before others do
            if not engine.step(same, same + 1).skipped:
                continue
            assert engine.accumulated == 1
            assert_tensors_close(unscaled(engine), before, 1e-5)
            assert not engine.step(tokens, targets).skipped
            break
    else:
        pytest.fail("no scale at which the second step overflows and the first does not")


def test_overflow_of_the_first_step_leaves_nothing() -> None:
    tokens, targets = sequence(GQA, 64)
    with Engine(make_model(GQA), "resident", "sim", seq_len=64, loss_scale=2.0**40) as engine:
        skipped = 0
        while engine.step(tokens, targets).skipped:
            skipped += 1
        found = unscaled(engine)
    assert skipped > 5
    with Engine(make_model(GQA), "dynamic", "sim", seq_len=64) as engine:
        engine.step(tokens, targets)
        assert_tensors_close(found, unscaled(engine), FP16_GRADIENT)


@pytest.mark.parametrize("freeze", ["layers.0.*", "*.w?.*", ("tok_embeddings*", "layers.*.wq.*")])
def test_frozen_tensors_have_no_gradient_and_others_the_same(freeze: Any) -> None:
    found = accumulated(GQA, "resident", freeze=freeze)
    expected = accumulated(GQA, "resident")
    assert found.keys() < expected.keys()
    assert_tensors_close(found, {name: expected[name] for name in found}, 1e-6)


def test_adapters_keep_their_products_on_the_host() -> None:
    found = []
    for variant in ("dynamic", "resident"):
        lora = Lora(4, 8, ("wq", "wv", "wo", "w1", "w2"), seed=3)
        with Engine(make_model(NORMS), variant, "sim", seq_len=64, lora=lora) as engine:
            lora.arena[...] = np.random.default_rng(5).standard_normal(lora.arena.size) * 0.1
            stats = engine.step(*sequence(NORMS, 50))
            assert stats.dw_nbytes == 0
            found.append(unscaled(engine))
    assert_tensors_close(found[1], found[0], FP16_GRADIENT)


def test_threads_do_not_change_a_bit() -> None:
    found = []
    for threads in (1, 3):
        with Engine(make_model(GQA), "resident", "sim", threads=threads) as engine:
            for number in range(3):
                engine.step(*sequence(GQA, 70, number))
            found.append(bits(engine.gradients))
    assert found[0] == found[1]


def test_norm_of_the_gradient_is_that_of_the_gradients() -> None:
    with Engine(make_model(GQA), "resident", "sim") as engine:
        for _ in range(3):
            for number in range(2):
                engine.step(*sequence(GQA, 70, number))
            mean = np.concatenate([g.ravel() for g in unscaled(engine).values()]) / 140
            norm = engine.update(lr=1e-4, grad_clip=1.0).grad_norm
            assert norm == pytest.approx(float(np.linalg.norm(mean.astype(np.float64))), rel=1e-5)


def test_program_too_large_for_the_engine_is_named() -> None:
    wide = Model(ModelConfig(64, 16000, 1, 128, 128, 64, 64, 64))
    said = message(lambda: Engine(wide, "baseline+offload_dw", "sim", seq_len=64))
    assert "layer_dw" in said and "takes at most 65536" in said
