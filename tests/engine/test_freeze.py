"""Frozen tensors: what is trained is trained with the same bits, what is not costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import needs
import numpy as np
import pytest
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_model, message, sequence

from anepy.engine import Engine
from anepy.engine.flops import flops_per_step
from anepy.models.freezing import frozen_names, patterns, trained_text
from anepy.models.model import ModelConfig

EMBEDDING = "tok_embeddings.weight"
# Two runs of products in one group, biases without their weights, a layer in part, only the top.
PATTERNS: dict[str, tuple[ModelConfig, Sequence[str]]] = {
    "embedding": (SEPARATE, [EMBEDDING]),
    "tied": (GQA, [EMBEDDING, "layers.0.*"]),
    "classifier": (SEPARATE, ["output.weight", "layers.1.feed_forward.*"]),
    "middle": (GQA, ["*.wk.weight", "*.w3.weight"]),
    "biases": (BIASES, ["*.weight"]),
    "no-biases": (BIASES, ["*.bias", "*norm*", "*.wq.*"]),
    "attention": (BIASES, [EMBEDDING, "*.attention.w*"]),
    "heads": (NORMS, ["*.wq.*", "*.q_norm.*", "*.attention_norm.*"]),
    "head-norms": (NORMS, ["*.w*.weight", EMBEDDING]),
    "top": (SEPARATE, [EMBEDDING, "layers.*"]),
    "last-half": (GQA, [EMBEDDING, "layers.[01].*", "layers.2.attention*", "layers.2.ffn_norm*"]),
}
RUNS = [
    ("cpu", "fp32", "max"),
    ("cpu", "fp32", "baseline+prealloc"),
    ("cpu", "bf16", "opt"),
    ("cpu", "bf16", "baseline"),
    ("sim", "fp16", "max"),
    ("sim", "fp16", "opt+offload_rmsnorm-skip_dead_reads"),
    ("sim", "fp16", "baseline"),
    ("sim", "fp16", "ane"),
    ("sim", "fp16", "dynamic+concurrent_dw"),
    ("sim", "fp16", "double-buffer"),
]


def make(
    config: ModelConfig, run: tuple[str, str, str], freeze: str | Sequence[str] = ()
) -> Engine:
    device, precision, variant = run
    needs.precision(precision)
    model = make_model(config)
    return Engine(model, variant, device, precision, threads=2, seq_len=64, freeze=freeze)


def steps(engine: Engine) -> list[float]:
    """Make two steps of two sequences; return their losses."""
    losses = []
    for seed in (1, 2):
        tokens, targets = sequence(engine.model.config, 40, seed)
        stats = engine.step(np.stack([tokens, targets]), np.stack([targets, tokens]))
        assert not stats.skipped
        losses.append(stats.loss)
    return losses


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("run", RUNS, ids=["-".join(run) for run in RUNS])
def test_what_is_trained_has_the_bits_of_a_run_that_trains_everything(
    case: str, run: tuple[str, str, str]
) -> None:
    config, freeze = PATTERNS[case]
    with make(config, run) as whole, make(config, run, freeze) as part:
        before = bits(part.model.weights)
        trained = set(before) - set(part.frozen)
        assert part.frozen and list(part.gradients) == [n for n in before if n in trained]
        for _ in range(2):
            assert steps(part) == steps(whole)
            gradients = bits(part.gradients)
            assert gradients == {name: bits(whole.gradients)[name] for name in gradients}
            for engine in (whole, part):
                assert not engine.update(lr=1e-2, weight_decay=0.1).skipped
            after, expected = bits(part.model.weights), bits(whole.model.weights)
            assert all(after[n] == (expected if n in trained else before)[n] for n in before)
            assert bits(part.adam_m) == {n: bits(whole.adam_m)[n] for n in gradients}
            assert bits(part.adam_v) == {n: bits(whole.adam_v)[n] for n in gradients}
            for name in part.frozen:  # the next steps start from the same weights
                whole.model.weights[name][...] = part.model.weights[name]
            for engine in (whole, part):
                engine.restore(0, engine.updates, engine.loss_scale, unit=engine.unit)


@pytest.mark.parametrize("case", PATTERNS)
def test_arenas_hold_what_is_trained(case: str) -> None:
    config, freeze = PATTERNS[case]
    run = ("cpu", "fp32", "baseline+prealloc")
    with make(config, run) as whole, make(config, run, freeze) as part:
        shapes = {name: value.shape for name, value in part.model.weights.items()}
        size = sum(math.prod(shapes[name]) for name in shapes if name not in part.frozen)
        assert part._grads.size == part._m.size == part._v.size == size < whole._m.size
        assert {name: part.gradients[name].shape for name in part.gradients} == {
            name: shape for name, shape in shapes.items() if name not in part.frozen
        }


def test_factors_of_frozen_products_are_not_kept() -> None:
    run = ("sim", "fp16", "opt")
    with make(GQA, run) as whole, make(GQA, run, ["*.w?.weight"]) as part:
        width, c = 64, GQA
        kept = 3 * c.dim + 3 * c.hidden_dim + c.dim + c.n_heads * c.head_width
        kept += c.n_heads * c.head_width + 2 * c.n_kv_heads * c.head_width
        floats = c.n_layers * width * kept
        assert whole.memory - part.memory > 4 * floats  # and as halves, and sums of squares
        steps(part)
        assert part.memory < whole.memory


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norm_is_that_of_the_trained_gradients(case: str, precision: str) -> None:
    """Whether products take the sums of squares (from the second update on) or the update does."""
    config, freeze = PATTERNS[case]
    with make(config, ("cpu", precision, "max"), freeze) as engine:
        for _ in range(3):
            steps(engine)
            exact = math.sqrt((engine._grads.astype(np.float64) ** 2).sum())
            scale = engine.counted / engine.unit
            norm = engine.update(lr=1e-3, grad_clip=1e-2).grad_norm
            assert norm == pytest.approx(exact / scale, rel=1e-6)


def test_flops_are_those_that_are_computed() -> None:
    c, n = SEPARATE, 40
    width, kv = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
    attention, feed_forward = 2 * c.dim * width + 2 * c.dim * kv, 3 * c.dim * c.hidden_dim
    scores, vocabulary = 10 * width * n * n, 2 * c.dim * c.vocab_size * n

    def counts(*freeze: str) -> dict[str, int]:
        flops = flops_per_step(c, n, freeze=freeze)
        assert flops["fwd"] == 2 * n * c.n_layers * (attention + feed_forward)
        with make(c, ("cpu", "fp32", "max"), freeze) as engine:
            assert engine.step(*sequence(c, n)).flops == flops["total"]
        assert flops["total"] == sum(flops.values()) - flops["total"]
        return flops

    both = 2 * n * (attention + feed_forward)
    assert counts()["classifier"] == 3 * vocabulary
    frozen = counts("*.wk.weight", "*.w1.weight", "output.weight")
    assert frozen["bwd_dx"] == 2 * both and frozen["sdpa_bwd"] == 2 * scores
    assert frozen["bwd_dw"] == 2 * both - 4 * n * (c.dim * kv + c.dim * c.hidden_dim)
    assert frozen["classifier"] == 2 * vocabulary
    upper = counts(EMBEDDING, "layers.0.*")
    assert upper["bwd_dx"] == upper["bwd_dw"] == both and upper["sdpa_bwd"] == scores
    half = counts(EMBEDDING, "layers.0.*", "layers.1.att*")
    assert half["bwd_dx"] == half["bwd_dw"] == 2 * n * feed_forward and half["sdpa_bwd"] == 0
    top = counts(EMBEDDING, "layers.*")
    assert top["bwd_dx"] == top["bwd_dw"] == top["sdpa_bwd"] == 0


def test_a_frozen_tensor_has_no_gradient_and_says_so() -> None:
    name = "layers.1.attention.wk.weight"
    with make(GQA, ("cpu", "fp32", "max"), "*.wk.weight") as engine:
        assert engine.frozen == tuple(f"layers.{i}.attention.wk.weight" for i in range(3))
        for tensors in (engine.gradients, engine.adam_m, engine.adam_v):
            assert name not in tensors and len(tensors) == len(engine.model.weights) - 3
            with pytest.raises(KeyError, match=f"{name} is frozen"):
                tensors[name]
            with pytest.raises(KeyError, match=r"layers\.9"):
                tensors["layers.9.norm"]
            assert f"{name} is frozen" in message(lambda t=tensors: t.__setitem__(name, 0.0))


def test_damage_above_a_frozen_part_still_stops_the_update() -> None:
    """In fp32 nothing but the gradient that the pass ends with tells of it."""
    with make(GQA, ("cpu", "fp32", "max"), [EMBEDDING, "layers.[01].*"]) as engine:
        engine.model.weights["layers.2.ffn_norm.weight"][3] = np.inf
        engine.step(*sequence(GQA, 20))
        assert engine.update(lr=1e-3).skipped


@pytest.mark.parametrize("case", PATTERNS)
def test_reduce_lends_what_is_trained(case: str) -> None:
    config, freeze = PATTERNS[case]
    with make(config, RUNS[0], freeze) as engine:
        steps(engine)
        before, lent = engine._grads.copy(), []
        engine.reduce(lambda bucket: (lent.append(bucket.size), bucket.__imul__(2.0)))
        assert sum(lent) == engine._grads.size and 0 not in lent
        parts = {name.split(".")[1] if name[:6] == "layers" else name for name in engine.gradients}
        layers = sum(part.isdecimal() for part in parts)
        assert layers <= len(lent) == engine.ready.buckets <= layers + 2
        assert np.array_equal(engine._grads, 2 * before)
        exact = math.sqrt((engine._grads.astype(np.float64) ** 2).sum())
        norm = engine.update(lr=1e-3).grad_norm
        assert norm == pytest.approx(exact / 2, rel=1e-6)  # two steps


def test_engines_of_one_model_may_freeze_different_tensors() -> None:
    model = make_model(GQA)
    with (
        Engine(model, "max", "cpu", "fp32", freeze="layers.*") as top,
        Engine(model, "max", "cpu", "fp32", freeze=EMBEDDING) as rest,
    ):
        for engine in (top, rest, top):
            engine.step(*sequence(GQA, 30))
            engine.update(lr=1e-3)
        assert set(top.gradients) == {EMBEDDING, "norm.weight"} and EMBEDDING not in rest.gradients


def test_patterns_that_cannot_be_meant_are_refused() -> None:
    names = list(make_model(GQA).weights)
    assert frozen_names(names, "layers.0.*w[123]*") == [n for n in names if "layers.0.feed" in n]
    assert frozen_names(names, ()) == [] and patterns("a") == ("a",) == patterns(["a"])
    text = message(lambda: make(GQA, RUNS[0], ["layers.0.*", "layers.7.*"]))
    assert "'layers.7.*'" in text and "layers.0.attention.wq.weight" in text
    assert "'Norm.weight'" in message(lambda: make(GQA, RUNS[0], "Norm.weight"))
    assert EMBEDDING in message(lambda: make(GQA, RUNS[0], "output.weight"))
    assert "nothing is left to train" in message(lambda: make(GQA, RUNS[0], ["norm*", "[lt]*"]))
    assert "freeze is 3" in message(lambda: make(GQA, RUNS[0], 3))  # type: ignore[arg-type]
    assert "freeze is [1]" in message(lambda: patterns([1]))  # type: ignore[list-item]


def test_words_for_what_is_trained() -> None:
    assert trained_text(57, 12, 15_191_712, 3_100_000) == (
        "12 of 57 tensors, 3.1 of 15.2 M parameters"
    )
    assert trained_text(47, 46, 260_032, 227_264) == "46 of 47 tensors, 227.3 of 260.0 K parameters"


# More columns than logits exist for at once where the classifier is frozen; two chunks of it.
LONG = ModelConfig(48, 64, 2, 4, 2, vocab_size=1100, seq_len=320, tied=False)
LONG_RUNS = [*RUNS[:4], RUNS[6]]


def make_long(run: tuple[str, str, str], freeze: str | Sequence[str] = ()) -> Engine:
    device, precision, variant = run
    needs.precision(precision)
    return Engine(make_model(LONG), variant, device, precision, threads=2, freeze=freeze)


@pytest.mark.parametrize("run", LONG_RUNS, ids=["-".join(run) for run in LONG_RUNS])
@pytest.mark.parametrize(("count", "n"), [(1, 300), (3, 70), (2, 128), (1, 1)])
def test_logits_of_a_frozen_classifier_are_made_in_part_with_the_same_bits(
    run: tuple[str, str, str], count: int, n: int
) -> None:
    random = np.random.default_rng(5)
    tokens, targets = random.integers(0, LONG.vocab_size, (2, count, n))
    targets[:, 2 : n // 3] = -100
    targets[-1, 100:260] = -100  # none is counted in some columns
    found = []
    for freeze in ((), "output.weight"):
        with make_long(run, freeze) as engine:
            steps = [engine.step(tokens, targets) for _ in range(2)]
            assert not steps[1].skipped
            gradients = bits(engine.gradients)
            gradients.pop("output.weight", None)
            losses, logits = engine.losses(tokens, targets), engine.logits(tokens)
            told = [stats.loss for stats in steps] + [engine.evaluate(tokens, targets)]
            found.append((told, losses.tobytes(), logits.tobytes(), gradients))
    assert found[0] == found[1]


def test_logits_made_in_part_take_less_memory() -> None:
    run = ("cpu", "fp32", "max")
    with make_long(run) as whole, make_long(run, "output.weight") as part:
        assert whole.memory - part.memory == (320 - 128) * LONG.vocab_size * 4
