"""Lion, SGD with momentum and Muon: against float64, bit by bit, and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import needs
import numpy as np
import pytest
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_model, message, sequence
from reference import optimizers64 as ref
from reference.adamw64 import adamw, clip_gradients
from tolerances import assert_tensors_close, relative_error

from anepy.engine.engine import Engine
from anepy.errors import ConfigError
from anepy.native import find
from anepy.training.config import OPTIMIZERS

CONFIGS = {"gqa": GQA, "separate": SEPARATE, "norms": NORMS, "biases": BIASES}
OTHERS = ("lion", "sgd", "muon")
SETTINGS: dict[str, dict[str, Any]] = {
    "lion": {"lr": 1e-3, "beta1": 0.85, "beta2": 0.97},
    "sgd": {"lr": 0.05, "momentum": 0.8},
    "muon": {"lr": 1e-3, "matrix_lr": 0.02, "momentum": 0.9, "beta1": 0.85, "beta2": 0.95},
}
# Relative to a weight, as FP32_UPDATE; Muon's singular values near zero grow by 3.4 in each step.
UPDATE = {"lion": 1e-6, "sgd": 1e-6, "muon": 1e-5}


def expected_update(
    optimizer: str,
    weights: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    m: dict[str, np.ndarray],
    v: dict[str, np.ndarray],
    step: int,
    decay: float,
) -> None:
    options = SETTINGS[optimizer] | {"weight_decay": decay}
    if optimizer == "muon":
        ref.muon(weights, gradients, m, v, step, **options)
    else:
        getattr(ref, optimizer)(weights, gradients, m, **options)


@pytest.mark.parametrize("variant", ["baseline", "max"])
@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_match_float64(name: str, optimizer: str, variant: str) -> None:
    """Of the gradients as the engine has them, several updates, decay and clipping included."""
    config = CONFIGS[name]
    model = make_model(config)
    zeros = {key: np.zeros(w.shape) for key, w in model.weights.items()}
    m, v = zeros, {key: value.copy() for key, value in zeros.items()}
    with Engine(model, variant, "cpu", "fp32", threads=2, optimizer=optimizer) as engine:
        for step in range(1, 5):
            engine.step(*sequence(config, 40, seed=step))
            gradients = {key: g.astype(np.float64) for key, g in engine.gradients.items()}
            clip = 0.5 if step > 2 else None
            if clip is not None:
                clip_gradients(gradients, clip)
            before = {key: w.astype(np.float64) for key, w in model.weights.items()}
            wanted = {key: w.copy() for key, w in before.items()}
            expected_update(optimizer, wanted, gradients, m, v, step, 0.1)
            engine.update(weight_decay=0.1, grad_clip=clip, **SETTINGS[optimizer])
            assert not any(g.any() for g in engine.gradients.values())
            for key, w in model.weights.items():
                # Signs of Lion's sums differ where they are rounding alone.
                if optimizer == "lion":
                    off = np.abs(w - wanted[key]) > 1e-5 * np.abs(wanted[key]).max()
                    assert np.count_nonzero(off) <= 2e-3 * w.size + 1, key
                    model.weights[key] = wanted[key]
                    continue
                change = relative_error(w - before[key], wanted[key] - before[key])
                assert relative_error(w, wanted[key]) < UPDATE[optimizer], key
                assert change < (2e-3 if optimizer == "muon" else 1e-4), key
            assert_tensors_close(dict(engine.adam_m), m, 1e-5)
            kept = {key: v[key] for key in engine.adam_v}
            assert_tensors_close(dict(engine.adam_v), kept, 1e-5)


def test_muon_brings_singular_values_near_one() -> None:
    model = make_model(GQA)
    before = {name: w.copy() for name, w in model.weights.items()}
    with Engine(model, "max", "cpu", "fp32", optimizer="muon") as engine:
        engine.step(*sequence(GQA, 100))
        engine.update(lr=1e-3, matrix_lr=1.0)
    for name in ("layers.0.attention.wk.weight", "layers.1.feed_forward.w1.weight"):
        change = (before[name] - model.weights[name]).astype(np.float64)
        rows, cols = change.shape
        found = np.linalg.svd(change / max(1.0, rows / cols) ** 0.5, compute_uv=False)
        assert 0.6 < np.median(found) < 1.3 and found.max() < 1.3


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_optimizers_equal_pytorch(optimizer: str) -> None:
    """A matrix by torch.optim, with the gradients that the engine had."""
    torch = needs.peer("torch")
    model, name = make_model(GQA), "layers.1.feed_forward.w2.weight"
    options, before = SETTINGS[optimizer], model.weights[name].copy()
    p = torch.nn.Parameter(torch.tensor(before))
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Muon
    rate = options.get("matrix_lr", options["lr"])
    theirs = make([p], rate, momentum=options["momentum"], weight_decay=0.1)
    with Engine(model, "max", "cpu", "fp32", optimizer=optimizer) as engine:
        for step in range(3):
            engine.step(*sequence(GQA, 40, seed=step))
            p.grad = torch.tensor(engine.gradients[name].copy())
            theirs.step()
            engine.update(weight_decay=0.1, **options)
    # PyTorch's Muon multiplies in bfloat16.
    error = relative_error(model.weights[name] - before, p.detach().numpy() - before)
    assert error < (1e-5 if optimizer == "sgd" else 3e-2)


def test_settings_know_the_optimizers_of_the_library() -> None:
    lib, names = find.library(), []
    while name := lib.anepy_optimizer_name(len(names)):
        names.append(name.decode())
    assert tuple(names) == OPTIMIZERS


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [*((name, "f32") for name in OTHERS), *((name, "bf16") for name in OPTIMIZERS)],
)
def test_updates_have_the_same_bits_on_any_number_of_threads(optimizer: str, moments: str) -> None:
    found = []
    for threads in (1, 2, 3):
        model = make_model(GQA)
        options = {"optimizer": optimizer, "moments": moments, "threads": threads}
        with Engine(model, "max", "cpu", "fp32", **options) as engine:
            for step in range(3):
                engine.step(*sequence(GQA, 66, seed=step))
                engine.update(**SETTINGS.get(optimizer, {"lr": 1e-3}))
            found.append((bits(model.weights), bits(engine.adam_m), bits(engine.adam_v)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("optimizer", OTHERS)
def test_frozen_tensors_stay_and_the_others_move_as_without(optimizer: str) -> None:
    freeze = ("tok_embeddings*", "layers.0.*", "*.wk.*")
    whole, part = make_model(SEPARATE), make_model(SEPARATE)
    before = bits(part.weights)
    for model, frozen in ((whole, ()), (part, freeze)):
        with Engine(model, "max", "cpu", "fp32", freeze=frozen, optimizer=optimizer) as engine:
            engine.step(*sequence(SEPARATE, 40))
            engine.update(weight_decay=0.1, **SETTINGS[optimizer])
            trained = set(engine.adam_m)
    for name, w in part.weights.items():
        same = whole.weights[name].tobytes() if name in trained else before[name]
        assert w.tobytes() == same, name


def test_moments_that_are_not_kept_are_not_there() -> None:
    for optimizer in ("lion", "sgd"):
        with Engine(make_model(), "max", "cpu", optimizer=optimizer) as engine:
            assert engine.optimizer == optimizer and not engine.adam_v
            assert set(engine.adam_m) == set(engine.model.weights)
    with Engine(make_model(), "max", "cpu", optimizer="muon") as engine:
        names = engine.model.weights
        matrices = {n for n, w in names.items() if n.startswith("layers.") and w.ndim > 1}
        assert matrices and set(engine.adam_v) == set(names) - matrices


@pytest.mark.parametrize("optimizer", OTHERS)
def test_the_simulator_trains_with_it(optimizer: str) -> None:
    model = make_model(SEPARATE)
    tokens, targets = sequence(SEPARATE, 60)
    with Engine(model, device="sim", optimizer=optimizer) as engine:
        losses = []
        for _ in range(4):
            losses.append(engine.step(tokens, targets).loss)
            engine.update(**SETTINGS[optimizer])
        assert losses[-1] < losses[0] - 0.05


def widened(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what bf16 stands for, as float64."""
    bits32 = {key: value.astype(np.uint32) << 16 for key, value in tensors.items()}
    return {key: value.view(np.float32).astype(np.float64) for key, value in bits32.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_in_bf16_are_those_of_float64_rounded_without_a_trend(optimizer: str) -> None:
    """The update is exact for the moments it began with; they end beside what float64 says."""
    model, settings = make_model(GQA), SETTINGS.get(optimizer, {"lr": 1e-3, "beta2": 0.95})
    options = {"optimizer": optimizer, "moments": "bf16", "threads": 2}
    with Engine(model, "max", "cpu", "fp32", **options) as engine:
        for step in range(1, 4):
            engine.step(*sequence(GQA, 40, seed=step))
            gradients = {key: g.astype(np.float64) for key, g in engine.gradients.items()}
            wanted = {key: w.astype(np.float64) for key, w in model.weights.items()}
            m, v = widened(engine.adam_m), {key: np.zeros(w.shape) for key, w in wanted.items()}
            v |= widened(engine.adam_v)
            if optimizer == "adamw":
                adamw(wanted, gradients, m, v, step, **settings)
            else:
                expected_update(optimizer, wanted, gradients, m, v, step, 0.0)
            engine.update(**settings)
            if optimizer != "lion":  # of signs that float32 sees otherwise there are always some
                for key, w in model.weights.items():
                    assert relative_error(w, wanted[key]) < UPDATE.get(optimizer, 1e-6), key
            for found, exact in ((engine.adam_m, m), (engine.adam_v, v)):
                errors = []
                for key, value in widened(found).items():
                    error = value - exact[key]
                    least = 1e-5 * np.abs(exact[key]).max()  # sums that cancel, in float32
                    assert (np.abs(error) <= 2**-7 * np.abs(exact[key]) + least).all(), key
                    clear = np.abs(exact[key]) > 1e3 * least
                    errors.append((error[clear] / exact[key][clear]).ravel())
                relative = np.concatenate([*errors, np.zeros(0)])
                if len(relative):
                    spread = relative.std() / len(relative) ** 0.5
                    assert relative.std() > 1e-3 and abs(relative.mean()) < 5 * spread


def test_second_moments_in_bf16_forget() -> None:
    """Each update takes 0.1 % off, which rounding to nearest would undo for ever."""
    with Engine(make_model(GQA), "max", "cpu", "fp32", moments="bf16") as engine:
        tokens, targets = sequence(GQA, 8)
        name = "layers.0.feed_forward.w1.weight"
        for update in range(301):
            engine.step(tokens, targets)
            for gradient in engine.gradients.values():
                gradient[...] = 0.1 if update == 0 else 0.0
            engine.update(lr=0.0)
            if update == 0:
                first = widened(engine.adam_v)[name]
        left = widened(engine.adam_v)[name] / first
    assert left.mean() == pytest.approx(0.999**300, rel=0.01) and left.std() < 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_in_bf16_train_like_those_in_float32(optimizer: str) -> None:
    """The loss over 200 updates stays within 1 %."""
    often = 1.0 / np.arange(1, GQA.vocab_size + 1)  # Zipf's law, which the losses come down to
    lines = np.random.default_rng(3).choice(GQA.vocab_size, (200, 40), p=often / often.sum())
    settings = {
        "adamw": {"lr": 1e-3}, "lion": {"lr": 2e-4, "beta2": 0.99},
        "sgd": {"lr": 0.02, "momentum": 0.9}, "muon": {"lr": 1e-3, "matrix_lr": 3e-3},
    }  # fmt: skip
    curves = []
    for kind in ("f32", "bf16"):
        losses = []
        options = {"optimizer": optimizer, "moments": kind, "threads": 1}
        with Engine(make_model(GQA), "max", "cpu", "fp32", **options) as engine:
            for line in lines:
                losses.append(engine.step(line[:-1], line[1:]).loss)
                engine.update(**settings[optimizer])
        curves.append(np.array(losses).reshape(20, 10).mean(axis=1))
    exact, rounded = curves
    assert exact[-1] < 0.9 * exact[0] and (rounded != exact).any()
    assert np.abs(rounded / exact - 1).max() < 0.01, (rounded, exact)


def test_wrong_names_and_values_are_refused_in_one_line() -> None:
    assert "f32 or bf16" in message(lambda: Engine(make_model(), moments="f16"), ConfigError)
    with Engine(make_model(), "max", "cpu", moments="bf16") as engine:
        error = message(lambda: engine.adam_m.__setitem__("norm.weight", np.ones(GQA.dim)))
        assert "uint16" in error
    text = message(lambda: Engine(make_model(), optimizer="adam"), ConfigError)
    assert "unknown optimizer 'adam'" in text and "adamw, lion, sgd, muon" in text
    with Engine(make_model(), "max", "cpu", optimizer="muon") as engine:
        engine.step([1, 2], [2, 3])
        before = bits(engine.model.weights)
        for wrong in ({"momentum": 1.0}, {"momentum": -0.1}, {"matrix_lr": -1.0}):
            name = next(iter(wrong))
            assert name in message(lambda wrong=wrong: engine.update(1e-3, **wrong))
        assert bits(engine.model.weights) == before
