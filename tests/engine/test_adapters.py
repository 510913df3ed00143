"""Low-rank adapters in the engine: gradients, updates, what stays as it is, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import families
import needs
import numpy as np
import pytest
import tolerances
from cases import (
    BIASES,
    GQA,
    NARROW_HEADS,
    NORMS,
    SEPARATE,
    WIDE_HEADS,
    bits,
    make_model,
    message,
    sequence,
)
from reference import adapters64
from reference import llama64 as ref
from tolerances import assert_tensors_close

from anepy.engine import Engine
from anepy.engine.flops import flops_per_step
from anepy.errors import ConfigError, NativeError
from anepy.models.lora import TARGETS, Lora
from anepy.models.model import Model, ModelConfig

CONFIGS = {
    "gqa": GQA,
    "separate": SEPARATE,
    "wide-heads": WIDE_HEADS,
    "narrow-heads": NARROW_HEADS,
    "biases": BIASES,
    "norms": NORMS,
}
# Neighbours with one input, gaps between them, one alone; ranks of one row, odd, above a piece.
SHAPES = {
    "all": (8, TARGETS),
    "gaps": (3, ("wq", "wv", "w3")),
    "low": (1, ("wv", "w1")),
    "outputs": (5, ("wo", "w2")),
    "high": (70, ("wk", "wv", "w2")),
}
BARS = {
    "fp32": (tolerances.FP32_GRADIENT, None),
    "bf16": (tolerances.BF16_GRADIENT, tolerances.BF16_COSINE),
}
LENGTH = 40


def adapter(config: ModelConfig, shape: str = "all", seed: int = 0) -> Lora:
    """Make an adapter whose B is not zero, of a size that matters beside the weights."""
    rank, targets = SHAPES[shape]
    lora = Lora(rank, 2.0 * rank, targets, seed)
    lora.attach(config)
    random = np.random.default_rng(seed)
    for name, weight in lora.weights.items():
        if name.endswith("lora_b"):
            weight[...] = random.normal(0.0, 0.3 / math.sqrt(rank), weight.shape)
    return lora


def batch(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draw two sequences, of which some targets are not counted."""
    rows = [sequence(config, LENGTH, seed) for seed in (1, 2)]
    tokens, targets = (np.stack(each) for each in zip(*rows, strict=True))
    targets[0, 5:20] = -100
    return tokens, targets


def expected(
    model: Model, lora: Lora, tokens: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    weights = adapters64.adapted(model.weights, lora.weights, lora.scale)
    loss, gradients = ref.loss_and_gradients(weights, model.config, tokens, targets)
    return loss, adapters64.adapter_gradients(gradients, lora.weights, lora.scale)


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_float64_for_any_number_of_threads(
    name: str, shape: str, precision: str
) -> None:
    needs.precision(precision)
    model, lora = make_model(CONFIGS[name]), adapter(CONFIGS[name], shape)
    tokens, targets = batch(model.config)
    loss, gradients = expected(model, lora, tokens, targets)
    tolerance, cosine = BARS[precision]
    found = []
    for threads in (1, 2):
        with Engine(model, device="cpu", precision=precision, threads=threads, lora=lora) as engine:
            stats = engine.step(tokens, targets)
            assert stats.loss == pytest.approx(loss, rel=1e-5 if cosine is None else 2e-2)
            assert_tensors_close(dict(engine.gradients), gradients, tolerance, min_cosine=cosine)
            found.append(bits(engine.gradients))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", families.CASES)
def test_family_equals_float64(tmp_path: Path, name: str) -> None:
    theirs = families.save(name, tmp_path)
    model = Model.load(tmp_path)
    lora, ids = adapter(model.config), families.sequence(theirs)
    loss, gradients = expected(model, lora, ids[:-1], ids[1:])
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        assert abs(engine.step(ids[:-1], ids[1:]).loss - loss) < 1e-5
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)


@pytest.mark.parametrize("variant", ["baseline", "baseline+prealloc", "opt", "ane", "max"])
@pytest.mark.parametrize("precision", BARS)
def test_every_variant_computes_the_same(precision: str, variant: str) -> None:
    needs.precision(precision)
    model, lora = make_model(GQA), adapter(GQA)
    tokens, targets = batch(GQA)
    _, gradients = expected(model, lora, tokens, targets)
    tolerance, cosine = BARS[precision]
    with Engine(model, variant, "cpu", precision, lora=lora, seq_len=64) as engine:
        engine.step(tokens, targets)
        assert_tensors_close(dict(engine.gradients), gradients, tolerance, min_cosine=cosine)


@pytest.mark.parametrize("storage", ["bf16", "q8"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_base_may_be_stored_smaller(device: str, storage: str) -> None:
    config = ModelConfig(64, 96, 2, 4, 2, 211, 64)  # rows of whole blocks
    model, lora = make_model(config).stored(storage), adapter(config)
    tokens, targets = batch(config)
    _, gradients = expected(model, lora, tokens, targets)
    precision = "fp32" if device == "cpu" else "fp16"
    bar = tolerances.FP32_GRADIENT if device == "cpu" else tolerances.FP16_GRADIENT
    with Engine(model, device=device, precision=precision, lora=lora) as engine:
        stats = engine.step(tokens, targets)
        found = {name: g / stats.loss_scale for name, g in engine.gradients.items()}
        assert_tensors_close(found, gradients, bar)
        engine.update(lr=1e-3)


@pytest.mark.parametrize("precision", BARS)
def test_recompute_has_the_same_bits(precision: str) -> None:
    needs.precision(precision)
    model, lora = make_model(GQA), adapter(GQA)
    found = []
    for recompute in (False, True):
        with Engine(
            model, device="cpu", precision=precision, lora=lora, recompute=recompute
        ) as engine:
            engine.step(*batch(GQA))
            found.append(bits(engine.gradients))
    assert found[0] == found[1]


SIM = [
    ("max", "all"),
    ("baseline", "all"),
    ("ane", "gaps"),
    ("dynamic+concurrent_dw", "high"),
    ("double-buffer", "outputs"),
    ("opt+prealloc+offload_rmsnorm-skip_dead_reads", "low"),
    ("opt-prealloc", "all"),
]


@pytest.mark.parametrize(("variant", "shape"), SIM)
@pytest.mark.parametrize("name", CONFIGS)
def test_step_on_the_simulator_is_near_float64(name: str, variant: str, shape: str) -> None:
    model, lora = make_model(CONFIGS[name]), adapter(CONFIGS[name], shape)
    tokens, targets = batch(model.config)
    loss, gradients = expected(model, lora, tokens, targets)
    with Engine(model, variant, "sim", lora=lora, seq_len=64) as engine:
        stats = engine.step(tokens, targets)
        assert not stats.skipped and stats.loss == pytest.approx(loss, rel=2e-3)
        found = {name: g / stats.loss_scale for name, g in engine.gradients.items()}
    assert_tensors_close(
        found, gradients, tolerances.FP16_GRADIENT, min_cosine=tolerances.FP16_COSINE
    )


@pytest.mark.parametrize("variant", ["max", "double-buffer", "dynamic"])
def test_programs_are_compiled_once(variant: str) -> None:
    model, lora = make_model(NORMS), Lora(rank=4)
    tokens, targets = sequence(NORMS, LENGTH)
    with Engine(model, variant, "sim", lora=lora, seq_len=64) as engine:
        compiled, first = engine.compiles, engine.step(tokens, targets).loss
        assert compiled == 1
        for _ in range(50):
            engine.update(lr=2e-3)
            assert not engine.stale
            last = engine.step(tokens, targets).loss
        assert last < first - 1.0
        engine.restore(engine.accumulated, engine.updates)
        assert engine.evaluate(tokens, targets) == pytest.approx(last, rel=1e-6)
        assert engine.compiles == compiled


def test_damaged_gradient_on_the_simulator_is_skipped() -> None:
    model, lora = make_model(GQA), adapter(GQA)
    lora.weights["layers.2.feed_forward.w2.lora_b"][...] = 3e4
    with Engine(model, device="sim", lora=lora, seq_len=64) as engine:
        tokens, targets = sequence(GQA, LENGTH)
        assert engine.step(tokens, targets).skipped


def test_products_of_several_parts_equal_float64() -> None:
    # More rows than the panels of a product hold.
    config = ModelConfig(36, 2100, 1, 2, 2, 61, 64)
    model, lora = make_model(config), adapter(config)
    tokens, targets = sequence(config, LENGTH)
    _, gradients = expected(model, lora, tokens, targets)
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        engine.step(tokens, targets)
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)


def test_logits_and_losses_have_the_adapter_in_them() -> None:
    model, lora = make_model(GQA), adapter(GQA)
    tokens, targets = batch(GQA)
    exact = ref.forward(adapters64.adapted(model.weights, lora.weights, lora.scale), GQA, tokens[0])
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        assert tolerances.relative_error(engine.logits(tokens[0]), exact) < tolerances.FP32_LOGITS
        loss, _ = expected(model, lora, tokens, targets)
        assert engine.evaluate(tokens, targets) == pytest.approx(loss, rel=1e-5)


def test_new_adapter_changes_nothing() -> None:
    model, tokens = make_model(GQA), batch(GQA)[0]
    with (
        Engine(model, device="cpu", precision="fp32", lora=Lora(rank=4)) as engine,
        Engine(model, device="cpu", precision="fp32") as plain,
    ):
        np.testing.assert_array_equal(engine.logits(tokens), plain.logits(tokens))


def test_update_trains_the_adapter_alone() -> None:
    model, lora = make_model(BIASES), adapter(BIASES)
    before, arena = bits(model.weights), lora.arena.copy()
    tokens, targets = batch(BIASES)
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        assert list(engine.gradients) == list(lora.weights) == list(engine.adam_m)
        assert set(engine.frozen) == set(model.weights)
        for _ in range(2):
            engine.step(tokens, targets)
        gradient = {name: g / 2 for name, g in engine.gradients.items()}
        engine.update(lr=0.01, weight_decay=0.1)
        loss = engine.evaluate(tokens, targets)
    assert bits(model.weights) == before
    start = dict(zip(lora.weights, np.split(arena, _ends(lora)), strict=True))
    for name, weight in lora.weights.items():
        # The first step of AdamW: the sign of the gradient, beside decay of every matrix.
        g = gradient[name].astype(np.float64)
        old = start[name].reshape(weight.shape).astype(np.float64)
        wanted = old * (1 - 0.01 * 0.1) - 0.01 * g / (np.abs(g) + 1e-8)
        assert tolerances.relative_error(weight, wanted) < tolerances.FP32_UPDATE
    assert loss < expected(model, _with(lora, arena), tokens, targets)[0]


def _ends(lora: Lora) -> list[int]:
    return np.cumsum([weight.size for weight in lora.weights.values()])[:-1].tolist()


def _with(lora: Lora, arena: np.ndarray) -> Lora:
    lora.arena[...] = arena
    return lora


def test_steps_add_and_norms_are_those_of_the_adapter() -> None:
    model, lora = make_model(NORMS), adapter(NORMS, "gaps")
    tokens, targets = batch(NORMS)
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        engine.step(tokens, targets)
        once = {name: g.copy() for name, g in engine.gradients.items()}
        engine.step(tokens, targets)
        for name, g in engine.gradients.items():
            np.testing.assert_array_equal(g, once[name] * 2)
        del g
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in once.values()))
        assert engine.update(lr=0.0, grad_clip=1e9).grad_norm == pytest.approx(norm, rel=1e-6)
        buckets = []
        engine.step(tokens, targets)
        engine.reduce(lambda bucket: buckets.append(bucket.size))
        assert len(buckets) == NORMS.n_layers and sum(buckets) == lora.arena.size


def test_frozen_base_costs_no_memory_for_itself() -> None:
    model, lora = make_model(GQA), adapter(GQA)
    with Engine(model, device="cpu", precision="fp32", lora=lora) as engine:
        assert sum(m.size for m in engine.adam_m.values()) == lora.arena.size


def test_operations_are_those_of_the_thin_products() -> None:
    n, config = 64, GQA
    plain = flops_per_step(config, n)
    lora = adapter(config, "outputs")
    with Engine(make_model(config), device="cpu", precision="fp32", lora=lora) as engine:
        tokens, targets = sequence(config, n)
        counted = engine.step(tokens, targets).flops
    thin = 3 * 2 * n * lora.arena.size
    wide = plain["bwd_dw"] + plain["classifier"] / 3
    assert counted == pytest.approx(plain["total"] - wide + thin, rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    model, lora = make_model(GQA), adapter(GQA)
    assert "frozen already" in message(lambda: Engine(model, lora=lora, freeze="*norm*"))
    assert "other" in message(lambda: Engine(make_model(NORMS), lora=lora))
    assert "rank is 513" in message(lambda: Engine(model, lora=Lora(rank=513)), ConfigError)
    with Engine(model, device="cpu", lora=lora) as engine:
        assert "is frozen" in message(lambda: engine.adam_m.__setitem__("norm.weight", [0.0]))
        with pytest.raises(KeyError):
            engine.gradients["norm.weight"]
        assert "nothing to apply" in message(lambda: engine.update(lr=1.0), NativeError)
