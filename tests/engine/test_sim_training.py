"""Training on the simulated Neural Engine: fp16 programs, loss scaling, baked weights."""

from __future__ import annotations

import math
from pathlib import Path

import needs
import numpy as np
import pytest
from reference import llama64
from tolerances import FP16_COSINE, FP16_GRADIENT, assert_tensors_close

from anepy.engine import Engine
from anepy.errors import ConfigError
from anepy.models.model import Model, ModelConfig, RopeScaling
from anepy.text.data import Sampler, TokenData
from anepy.text.tokenizer import Tokenizer
from anepy.training.config import TrainConfig
from anepy.training.trainer import Trainer

GQA = ModelConfig(64, 96, 2, 8, 4, 160, 128)
ODD_HEADS = ModelConfig(96, 80, 1, 3, 1, 97, 64, tied=False)
WIDE_HEADS = ModelConfig(
    64, 96, 2, 4, 2, 160, 128, 32, 1e-6, 1e6, RopeScaling("llama3", 8.0, 1.0, 4.0, 256)
)
NARROW_HEADS = ModelConfig(
    100, 80, 1, 3, 1, 97, 64, 20, 1e-3, 500.0, RopeScaling("linear", 2.5), tied=False
)
BIASES = ModelConfig(64, 96, 2, 6, 2, 160, 128, 20, qkv_bias=True)
NORMS = ModelConfig(64, 96, 2, 4, 2, 160, 128, 32, 1e-6, 1e6, qk_norm=True)
ODD_NORMS = ModelConfig(72, 80, 1, 6, 2, 97, 64, 20, 1e-3, qkv_bias=True, qk_norm=True, tied=False)
WIDE = ModelConfig(768, 2048, 2, 12, 12, 1000, 256)


def make(config: ModelConfig, seed: int = 1) -> tuple[Model, dict[str, np.ndarray]]:
    """Return a model with random weights and the same weights in float64."""
    # Biases of 0.5 make all keys alike unless products are as large: dq is then a small difference
    # of large terms, which fp16 has rounded (3 % of it with weights of 0.02).
    weights = llama64.random_weights(config, seed, 0.1 if config.qkv_bias else 0.02)
    model = Model(config)
    for name, value in weights.items():
        model.weights[name][...] = value
    return model, {name: value.astype(np.float64) for name, value in model.weights.items()}


def sequence(config: ModelConfig, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, n + 1, dtype=np.int32)
    return ids[:-1], ids[1:]


def unscaled(engine: Engine, scale: float) -> dict[str, np.ndarray]:
    return {name: value / scale for name, value in engine.gradients.items()}


def check_gradients(
    model: Model,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    targets: np.ndarray,
    variant: str = "max",
) -> None:
    loss, expected = llama64.loss_and_gradients(weights, model.config, tokens, targets)
    with Engine(model, variant, "sim", seq_len=max(64, len(tokens))) as engine:
        stats = engine.step(tokens, targets)
        assert not stats.skipped
        assert stats.loss == pytest.approx(loss, rel=2e-3)
        gradients = unscaled(engine, stats.loss_scale)
    assert_tensors_close(gradients, expected, FP16_GRADIENT, min_cosine=FP16_COSINE)


STEPS = {
    "gqa": (GQA, 128),
    "gqa-33-tokens": (GQA, 33),
    "gqa-7-tokens": (GQA, 7),
    "odd-heads-untied": (ODD_HEADS, 64),
    "dim-768": (WIDE, 256),
    "wide-heads": (WIDE_HEADS, 100),
    "narrow-heads": (NARROW_HEADS, 64),
    "biases": (BIASES, 100),
    "norms": (NORMS, 100),
    "norms-of-odd-heads": (ODD_NORMS, 64),
}


@pytest.mark.parametrize(("config", "n"), STEPS.values(), ids=STEPS)
def test_step_gradients_match_float64(config: ModelConfig, n: int) -> None:
    model, weights = make(config)
    check_gradients(model, weights, *sequence(config, n))


OFFLOADS = ("offload_rmsnorm", "offload_classifier", "offload_softmax")


@pytest.mark.parametrize(
    "variant",
    ["baseline", "opt", "ane", "dynamic", "double-buffer", "max+dynamic_weights"]
    + [f"opt+{switch}" for switch in OFFLOADS]
    + [f"dynamic+{switch}" for switch in OFFLOADS]
    + ["resident", "resident-offload_rmsnorm", "max+fused_layer", "baseline+offload_dw"],
)
def test_step_gradients_of_every_variant_match_float64(variant: str) -> None:
    for config in (GQA, ODD_HEADS, WIDE_HEADS, NARROW_HEADS, BIASES, NORMS, ODD_NORMS):
        model, weights = make(config)
        check_gradients(model, weights, *sequence(config, 50), variant)


@pytest.mark.parametrize(
    "variant", ["ane", "dynamic+offload_classifier", "opt+offload_softmax", "resident"]
)
def test_vocabulary_in_two_parts_matches_float64(variant: str) -> None:
    """Classifier programs take 32768 tokens at most."""
    config = ModelConfig(32, 32, 1, 2, 2, 40007, 64, tied=False)
    model, weights = make(config)
    tokens, targets = sequence(config, 20)
    targets[:3] = 0, 32768, 40006
    check_gradients(model, weights, tokens, targets, variant)


def test_step_of_a_trained_model_matches_float64() -> None:
    model = Model.load(needs.data("stories260K.bin"))
    tokenizer = Tokenizer.load(needs.data("tok512.bin"))
    ids = np.array(tokenizer.encode(needs.data("tinystories_sample.txt").read_text())[:257])
    weights = {name: value.astype(np.float64) for name, value in model.weights.items()}
    check_gradients(model, weights, ids[:-1], ids[1:])


def curve(model: Model, data: TokenData, steps: int, **options: object) -> tuple[np.ndarray, int]:
    """Train with an update after every step; return the losses and how many steps were skipped."""
    sampler = Sampler(data, 128, 0)
    losses, skipped = [], 0
    with Engine(model, seq_len=128, **options) as engine:  # type: ignore[arg-type]
        while len(losses) < steps:
            tokens, targets = sampler.next()
            while (stats := engine.step(tokens, targets)).skipped:
                skipped += 1
            losses.append(stats.loss)
            engine.update(lr=1e-3)
    return np.array(losses), skipped


def test_fine_tuning_follows_the_fp32_curve(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(needs.data("tok512.bin"))
    text = needs.data("tinyshakespeare.txt").read_text()[:40000]
    data = TokenData.from_array(np.array(tokenizer.encode(text), dtype=np.uint16))

    def model() -> Model:
        return Model.load(needs.data("stories260K.bin"))

    exact, _ = curve(model(), data, 100, device="cpu")
    losses, skipped = curve(model(), data, 100, device="sim")
    assert skipped == 0
    assert np.max(np.abs(losses - exact) / exact) < 0.01
    # An absurd scale costs skipped steps, not learning.
    absurd, skipped = curve(model(), data, 100, device="sim", loss_scale=2.0**40)
    assert skipped > 10
    assert np.max(np.abs(absurd - exact) / exact) < 0.01


def test_training_from_scratch_learns_like_fp32() -> None:
    from anepy.training import demo

    data = demo.data(n_stories=100)
    config = ModelConfig(64, 96, 2, 4, 2, 259, 128)
    exact, _ = curve(Model.init(config), data, 40, device="cpu")
    losses, _ = curve(Model.init(config), data, 40, device="sim")
    assert losses[-1] < 0.8 * losses[0]
    assert np.max(np.abs(losses - exact) / exact) < 0.01


def test_skipped_step_keeps_what_was_accumulated() -> None:
    """The scale halves, so must the sum; the overflowing step itself leaves no trace."""
    model, _ = make(GQA)
    tokens, targets = sequence(GQA, 64)
    with Engine(model, "opt", "sim", seq_len=64) as engine:
        first = engine.step(tokens, targets)
        before = unscaled(engine, engine.loss_scale)
        model.weights["norm.weight"][0] *= 1e7  # on the host: the loss overflows fp16 on its way
        stats = engine.step(tokens, targets)
        model.weights["norm.weight"][0] /= 1e7
        assert stats.skipped and engine.accumulated == 1
        assert engine.loss_scale == first.loss_scale / 2
        after = unscaled(engine, engine.loss_scale)
        assert_tensors_close(after, before, 1e-6)


def test_injected_nan_never_reaches_the_weights() -> None:
    model, _ = make(GQA)
    tokens, targets = sequence(GQA, 64)
    with Engine(model, device="sim", seq_len=64) as engine:
        engine.step(tokens, targets)
        before = model.arena.copy()
        engine.gradients["layers.1.feed_forward.w2.weight"][3, 4] = math.nan
        stats = engine.update(lr=1e-2)
        assert stats.skipped
        np.testing.assert_array_equal(model.arena, before)
        assert engine.accumulated == 0 and not np.any(engine.gradients["norm.weight"])
        engine.step(tokens, targets)
        assert not engine.update(lr=1e-2).skipped
        assert np.isfinite(model.arena).all() and np.any(model.arena != before)


def test_variants_that_move_memory_are_bit_identical() -> None:
    tokens, targets = sequence(GQA, 100)
    results = []
    for variant in ("baseline", "baseline+skip_dead_reads+prealloc", "opt", "dynamic"):
        model, _ = make(GQA)
        with Engine(model, variant=variant, device="sim") as engine:
            for _ in range(2):
                engine.step(tokens, targets)
            results.append(np.concatenate([value.ravel() for value in engine.gradients.values()]))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_shorter_sequence_is_not_touched_by_an_earlier_one() -> None:
    model, _ = make(GQA)
    long, short = sequence(GQA, 128, seed=3), sequence(GQA, 20, seed=4)
    with Engine(model, device="sim") as engine:
        alone = engine.step(*short).loss
        expected = {name: value.copy() for name, value in engine.gradients.items()}
        engine.restore(0, 0)
        engine.step(*long)
        engine.restore(0, 0)
        assert engine.step(*short).loss == alone
        for name, value in engine.gradients.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_update_recompiles_the_baked_weights() -> None:
    model, _ = make(GQA)
    tokens, targets = sequence(GQA, 64)
    with Engine(model, device="sim", seq_len=64) as engine:
        before = engine.step(tokens, targets).loss
        assert engine.update(lr=1e-2).compile_ms > 0
        after = engine.evaluate(tokens, targets)
    assert after < before - 0.1
    with Engine(model, device="cpu", seq_len=64) as engine:
        assert engine.evaluate(tokens, targets) == pytest.approx(after, rel=2e-3)


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    from anepy.training import demo

    data = demo.data(n_stories=50)
    config = ModelConfig(32, 64, 1, 2, 2, 259, 64)

    def train(steps: int, resume: Path | None = None) -> tuple[np.ndarray, Path]:
        settings = TrainConfig(steps=steps, accum=2, seq=64, device="sim", lr=1e-3)
        path = tmp_path / f"{steps}.npz"
        with Trainer(Model.init(config), data, settings, resume=resume) as trainer:
            for _ in trainer:
                pass
            trainer.save_checkpoint(path)
            return trainer.model.arena.copy(), path

    whole, _ = train(6)
    _, half = train(4)
    resumed, _ = train(6, resume=half)
    np.testing.assert_array_equal(resumed, whole)


@pytest.mark.parametrize("chip", ["m1", "m2", "m3", "m4", "m5"])
def test_every_chip_runs_the_programs(chip: str) -> None:
    model, _ = make(GQA)
    tokens, targets = sequence(GQA, 64)
    with Engine(model, device=f"sim:{chip}", seq_len=64) as engine:
        assert engine.device == "sim" and engine.precision == "fp16"
        assert not engine.step(tokens, targets).skipped


@pytest.mark.parametrize("device", ["sim:m9", "sim:", "simulator", "sim:m1x"])
def test_unknown_chip_is_refused(device: str) -> None:
    model, _ = make(GQA)
    with pytest.raises(ConfigError, match=r"unknown (chip|device)"):
        Engine(model, device=device)


def test_background_compile_is_one_update_stale_unless_weights_are_dynamic() -> None:
    """The exact weights of every step are checked in ckernels/weights.c."""
    tokens, targets = sequence(GQA, 64)

    def losses(variant: str) -> list[float]:
        model, _ = make(GQA)
        with Engine(model, variant, "sim", seq_len=64) as engine:
            found = []
            for _ in range(4):
                found.append(engine.step(tokens, targets).loss)
                engine.update(lr=1e-3)
            return [*found, engine.evaluate(tokens, targets)]

    plain, stale = losses("baseline"), losses("double-buffer")
    assert stale[0] == plain[0] == stale[1] and stale[2] == plain[1]
    assert stale[4] != stale[3]  # an evaluation waits for the newest weights
    assert losses("double-buffer+dynamic_weights") == plain
