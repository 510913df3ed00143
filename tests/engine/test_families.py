"""The engine on models made by transformers: logits, loss and gradients of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import needs
import numpy as np
import pytest
import tolerances
from reference import llama64 as ref
from tolerances import assert_tensors_close

from anepy.engine.decoder import Decoder
from anepy.engine.engine import Engine
from anepy.models.model import Model

# Beside transformers, which computes in float32 too.
LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4


def load(name: str, folder: Path) -> tuple[Any, Model]:
    return families.save(name, folder), Model.load(folder)


@pytest.mark.parametrize("name", families.CASES)
def test_step_on_the_cpu_equals_transformers_and_float64(tmp_path: Path, name: str) -> None:
    theirs, model = load(name, tmp_path)
    ids = families.sequence(theirs)
    expected, gradients = families.loss_and_gradients(theirs, ids)
    exact = ref.loss_and_gradients(model.weights, model.config, ids[:-1], ids[1:])
    with Engine(model, device="cpu", precision="fp32") as engine:
        logits = engine.logits(ids[:-1])
        assert np.abs(logits - families.logits_of(theirs, ids[:-1])).max() < LOGITS
        loss = engine.step(ids[:-1], ids[1:]).loss
        assert abs(loss - expected) < LOSS and abs(loss - exact[0]) < LOSS
        assert_tensors_close(dict(engine.gradients), gradients, GRADIENT)
        assert_tensors_close(dict(engine.gradients), exact[1], tolerances.FP32_GRADIENT)


@pytest.mark.parametrize("name", families.CASES)
def test_step_on_the_simulator_is_near_float64(tmp_path: Path, name: str) -> None:
    theirs, model = load(name, tmp_path)
    ids = families.sequence(theirs, 60)
    loss, gradients = ref.loss_and_gradients(model.weights, model.config, ids[:-1], ids[1:])
    with Engine(model, device="sim") as engine:
        stats = engine.step(ids[:-1], ids[1:])
        assert not stats.skipped and stats.loss == pytest.approx(loss, rel=2e-3)
        found = {name: g / stats.loss_scale for name, g in engine.gradients.items()}
    assert_tensors_close(
        found, gradients, tolerances.FP16_GRADIENT, min_cosine=tolerances.FP16_COSINE
    )


@pytest.mark.parametrize("name", families.CASES)
def test_decoder_equals_transformers(tmp_path: Path, name: str) -> None:
    theirs, model = load(name, tmp_path)
    ids = families.sequence(theirs)
    expected = families.logits_of(theirs, ids)
    with Decoder(model) as decoder:
        for at, (token, logits) in enumerate(zip(ids, expected, strict=True)):
            assert np.abs(decoder.forward(int(token), at) - logits).max() < LOGITS


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_trained_and_saved_model_is_the_same_in_transformers(tmp_path: Path, name: str) -> None:
    transformers = needs.peer("transformers")
    theirs, model = load(name, tmp_path / "a")
    ids = families.sequence(theirs)
    with Engine(model, device="cpu", precision="fp32") as engine:
        before = engine.step(ids[:-1], ids[1:]).loss
        engine.update(lr=1e-2)
        assert engine.evaluate(ids[:-1], ids[1:]) < before - 0.1
        logits = engine.logits(ids)
    model.save(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert np.abs(families.logits_of(again, ids) - logits).max() < LOGITS
