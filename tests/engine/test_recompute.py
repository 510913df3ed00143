"""Activations computed again in the backward pass: the same bits in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import needs
import numpy as np
import pytest
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_model

from anepy.engine.engine import Engine
from anepy.models.lora import Lora
from anepy.models.model import ModelConfig

CONFIGS = {"gqa": GQA, "norms": NORMS, "biases": BIASES}
LOWER_HALF = ("tok_embeddings*", "layers.0.*", "layers.1.attention*")


def trained(config: ModelConfig, recompute: bool, starts: bool, **options: Any) -> list[Any]:
    """Return what two updates, of steps of several sizes, computed on the way."""
    rng = np.random.default_rng(0)
    model, found = make_model(config), list[Any]()
    with Engine(model, recompute=recompute, **options) as engine:
        for shape in ((1, 66), (9, 66), (2, 33), (3, 64)):
            tokens = rng.integers(0, config.vocab_size, shape)
            targets = np.roll(tokens, -1, 1)
            targets[rng.random(shape) < 0.3] = -100
            begins = rng.random(shape) < 0.1 if starts else None
            stats = engine.step(tokens, targets, begins)
            found += [stats.loss, stats.skipped, bits(engine.gradients)]
            found.append(engine.evaluate(tokens, targets, begins))
            if shape[0] in (9, 3):
                engine.update(1e-3, grad_clip=1.0)
        engine.evaluate(tokens, targets)  # what compiles in the background is done then
        found.append(engine.compiles)
    return [*found, bits(model.weights)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["baseline", "opt", "opt-prealloc", "ane", "max"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recompute_has_the_bits_of_activations_that_are_kept(
    name: str, variant: str, precision: str
) -> None:
    needs.precision(precision)
    options = {"variant": variant, "device": "cpu", "precision": precision, "threads": 2}
    kept, again = (trained(CONFIGS[name], each, False, **options) for each in (False, True))
    assert again == kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("freeze", [(), LOWER_HALF, "layers.2.*", "*.w?.*"])
def test_recompute_has_the_same_bits_with_frozen_tensors_and_packed_documents(
    freeze: Any, starts: bool, precision: str
) -> None:
    needs.precision(precision)
    options = {"device": "cpu", "precision": precision, "freeze": freeze, "threads": 2}
    kept, again = (trained(GQA, each, starts, **options) for each in (False, True))
    assert again == kept


@pytest.mark.parametrize("variant", ["baseline", "max"])
@pytest.mark.parametrize("targets", [("wq", "w2"), ("wq", "wk", "wv", "wo", "w1", "w2", "w3")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recompute_has_the_same_bits_with_an_adapter(
    precision: str, targets: tuple[str, ...], variant: str
) -> None:
    if precision != "fp16":
        needs.precision(precision)
    found = []
    for recompute in (False, True):
        lora = Lora(rank=4, targets=targets, seed=1)
        device = "sim" if precision == "fp16" else "cpu"
        options = {"device": device, "precision": precision, "threads": 2, "lora": lora}
        options["variant"] = variant
        found.append((trained(SEPARATE, recompute, False, **options), bits(lora.weights)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "variant", ["baseline", "opt", "ane", "dynamic", "double-buffer", "resident", "max"]
)
def test_recompute_on_the_simulator_has_the_same_bits_and_compiles_no_more(variant: str) -> None:
    config = replace(SEPARATE, n_layers=3)
    options = {"variant": variant, "device": "sim", "threads": 2}
    kept, again = (trained(config, each, False, **options) for each in (False, True))
    assert again == kept


def test_a_step_that_overflows_is_skipped_as_without_recompute() -> None:
    tokens = np.arange(50)[None]
    for recompute in (False, True):
        with Engine(
            make_model(SEPARATE), device="sim", loss_scale=2.0**40, recompute=recompute
        ) as e:
            assert e.step(tokens, tokens).skipped and e.loss_scale == 2.0**39
            assert not any(gradient.any() for gradient in e.gradients.values())


def memory(layers: int, seq_len: int, **options: Any) -> int:
    config = ModelConfig(64, 192, layers, 4, 2, 100, seq_len)
    with Engine(make_model(config), **options) as engine:
        return engine.memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["opt", "max"])
def test_each_layer_adds_the_memory_of_its_input(variant: str, precision: str) -> None:
    """Beside it two norms' gradients and a few sums of squares, which do not grow with tokens."""
    needs.precision(precision)
    options = {"variant": variant, "device": "cpu", "precision": precision}
    for layers, others in ((4, 12), (12, 13)):
        grown = [
            memory(others, tokens, recompute=True, **options)
            - memory(layers, tokens, recompute=True, **options)
            for tokens in (256, 512)
        ]
        assert grown[1] - grown[0] == (others - layers) * 64 * 256 * 4
        assert 0 <= grown[0] - (others - layers) * 64 * 256 * 4 < (others - layers) * 8192
    kept, again = (memory(12, 512, recompute=each, **options) for each in (False, True))
    assert again < kept / 3.5


def test_frozen_weights_need_no_copies_of_factors() -> None:
    options = {"variant": "max", "device": "cpu", "precision": "fp32", "recompute": True}
    trained_all = memory(12, 512, **options)
    assert memory(12, 512, freeze="layers.*", **options) <= trained_all


def test_on_the_simulator_surfaces_are_those_of_one_layer() -> None:
    options = {"variant": "max", "device": "sim"}
    kept, again = (memory(8, 128, recompute=each, **options) for each in (False, True))
    # What weight gradients are made of has to outlive the backward pass there.
    assert again < 0.6 * kept
