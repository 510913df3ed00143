"""The engine: evaluation, statistics, settings, tokens, life cycle.

Gradients, update, variants and the decoder have modules of their own.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import weakref
from typing import Any

import needs
import numpy as np
import pytest
import tolerances
from cases import GQA, SEPARATE, bits, make_engine, make_model, mapped, message, sequence
from reference import llama64 as ref
from tolerances import relative_error

from anepy.engine import Decoder, Engine, StepStats
from anepy.engine.stats import PART, PHASES
from anepy.errors import ClosedError, ConfigError
from anepy.models.model import PRESETS, Model, ModelConfig
from anepy.native.info import library_info
from anepy.text.tokenizer import Tokenizer

# ----------------------------------------------------------------------------------- precision


def test_engine_says_why_auto_took_a_precision() -> None:
    with Engine(make_model(), device="cpu") as engine:
        assert engine.isa in engine.precision_note or "library" in engine.precision_note
        has = "has bf16" if engine.precision == "bf16" else "has no bf16"
        assert has in engine.precision_note or "library" in engine.precision_note
    with Engine(make_model(), device="sim", seq_len=16) as engine:
        assert engine.precision_note == "device sim computes in fp16"
    with Engine(make_model(), device="cpu", precision="fp32") as engine:
        assert engine.precision_note == ""


# ----------------------------------------------------------------------------------- assignment


def test_moments_and_gradients_take_arrays() -> None:
    """An update with gradients and moments from elsewhere is that with the engine's own."""
    tokens, targets = sequence(GQA, 20)
    with make_engine(GQA) as first, make_engine(GQA) as second:
        for _ in range(2):
            first.step(tokens, targets)
            first.update(lr=1e-2)
        first.step(tokens, targets)
        for name in first.model.weights:
            second.model.weights[name] = first.model.weights[name]
            second.adam_m[name] = first.adam_m[name]
            second.adam_v[name] = first.adam_v[name].astype(np.float64)
            second.gradients[name] = first.gradients[name]
        second.restore(accumulated=1, updates=2)
        for engine in (first, second):
            engine.update(lr=1e-2, grad_clip=0.1)
        assert bits(first.model.weights) == bits(second.model.weights)
        with pytest.raises(ConfigError, match="shape"):
            first.gradients["norm.weight"] = np.ones(3)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_weights_assigned_under_an_engine_count_after_restore(device: str) -> None:
    tokens, targets = sequence(GQA, 20)
    other = make_model(GQA)
    other.weights["norm.weight"] = np.full(GQA.dim, 0.5)
    with Engine(make_model(GQA), device=device, seq_len=64) as engine:
        before = engine.evaluate(tokens, targets)
        engine.model.weights["norm.weight"] = other.weights["norm.weight"]
        engine.restore(0, 0)
        with Engine(other, device=device, seq_len=64) as fresh:
            assert engine.evaluate(tokens, targets) == fresh.evaluate(tokens, targets) != before


# ---------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_logits_equal_the_reference(config: ModelConfig) -> None:
    with make_engine(config) as engine:
        for length in (70, 1, 64, 33, 65):
            tokens, _ = sequence(config, length)
            logits = engine.logits(tokens)
            assert logits.shape == (length, config.vocab_size) and logits.dtype == np.float32
            expected = ref.forward(engine.model.weights, config, tokens)
            assert relative_error(logits, expected) < tolerances.FP32_LOGITS


def test_logits_see_no_later_token() -> None:
    tokens, _ = sequence(GQA, 70)
    changed = tokens.copy()
    changed[66] = (changed[66] + 1) % GQA.vocab_size
    with make_engine() as engine:
        before, after = engine.logits(tokens), engine.logits(changed)
    assert before[:66].tobytes() == after[:66].tobytes()
    assert (before[66:] != after[66:]).any(axis=1).all()


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_evaluate_is_the_loss_of_a_step_and_changes_nothing(config: ModelConfig) -> None:
    with make_engine(config) as engine:
        tokens, targets = sequence(config, 50)
        engine.step(*sequence(config, 70))
        before = bits(engine.gradients), bits(engine.model.weights)
        loss = engine.evaluate(tokens, targets)
        engine.logits(tokens)
        assert (bits(engine.gradients), bits(engine.model.weights)) == before
        assert (engine.accumulated, engine.updates) == (1, 0)
        assert engine.step(tokens, targets).loss == loss


def test_evaluate_of_zero_weights_is_the_log_of_the_vocabulary() -> None:
    with Engine(Model(GQA)) as engine:
        assert engine.evaluate([1, 2, 3], [2, 3, 4]) == pytest.approx(math.log(523), rel=1e-6)


def test_real_model_has_the_published_losses() -> None:
    """Measured with llama2.c's own model.py in PyTorch."""
    model = Model.load(needs.data("stories260K.bin"))
    tokenizer = Tokenizer.load(needs.data("tok512.bin"), model.config.vocab_size)
    text = needs.data("tinystories_sample.txt").read_text("utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    published = (1.3160, 1.2386, 0.9522, 1.4934, 1.1879)
    for variant in ("baseline", "max"):
        with Engine(model, variant, "cpu", "fp32") as engine:
            losses = []
            for story in stories:
                ids = tokenizer.encode(story)[:513]
                losses.append(engine.evaluate(ids[:-1], ids[1:]))
        assert losses == pytest.approx(published, abs=tolerances.LOSS_VALUE)


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("variant", "allocates"),
    [("baseline", True), ("baseline+prealloc", False), ("opt", False), ("max", False)],
)
def test_step_heap_operations(variant: str, allocates: bool) -> None:
    with make_engine(GQA, variant) as engine:
        counts = [engine.step(*sequence(GQA, length)).allocations for length in (129, 5, 129)]
    assert len(set(counts)) == 1, counts
    assert (counts[0] > 0) is allocates


def test_step_heap_operations_fall_with_each_saving_switch() -> None:
    counts = []
    for variant in ("baseline", "baseline+fp16_cache", "baseline+prealloc"):
        with make_engine(GQA, variant) as engine:
            counts.append(engine.step(*sequence(GQA, 60)).allocations)
    assert counts[0] > counts[1] >= counts[2] == 0
    # Four products a layer; each reads one factor or both back from surfaces.
    assert 4 * GQA.n_layers <= counts[0] <= 8 * GQA.n_layers


@pytest.mark.parametrize("variant", ["baseline", "opt"])
@pytest.mark.parametrize("threads", [1, 2])
def test_step_phases_are_parts_of_the_step(variant: str, threads: int) -> None:
    phases = [phase.field for phase in PHASES if phase.kind == PART]
    with make_engine(GQA, variant, threads=threads) as engine:
        for length in (129, 1, 64):
            stats = engine.step(*sequence(GQA, length))
            times = {name: getattr(stats, name) for name in phases}
            assert all(ms >= 0 for ms in times.values()), times
            assert all(times[n] > 0 for n in ("device_ms", "classifier_ms", "softmax_ms")), times
            assert sum(times.values()) <= stats.step_ms * 1.05 + 1, times
            # Busy time is summed over the threads.
            assert 0 < stats.dw_ms <= threads * stats.step_ms * 1.05 + 1
            assert stats.tflops == pytest.approx(stats.flops / stats.step_ms / 1e9)


def flops(c: ModelConfig, n: int) -> float:
    """Count as the research programs do (docs/neural-engine.md#flops), K/V heads as they are."""
    d, h, kv = c.dim, c.hidden_dim, c.head_width * c.n_kv_heads
    forward = c.n_layers * n * (2 * 2 * d * d + 2 * 2 * d * kv + 3 * 2 * d * h)
    attention = c.n_layers * 2 * c.n_heads * 5 * n * n * c.head_width
    return 3 * forward + attention + 3 * 2 * c.vocab_size * d * n


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_step_flops_follow_the_formula(config: ModelConfig) -> None:
    assert round(flops(PRESETS["stories110M"], 256) / 1e6) == 174_248
    with make_engine(config) as engine:
        for length in (1, 33, 70):
            assert engine.step(*sequence(config, length)).flops == flops(config, length)


def test_step_of_fp32_is_never_scaled_or_skipped() -> None:
    with make_engine() as engine:
        stats = engine.step(*sequence(GQA, 10))
    assert isinstance(stats, StepStats)
    assert (stats.loss_scale, stats.skipped) == (1.0, False)


def test_step_of_nan_weights_has_a_nan_loss() -> None:
    with make_engine() as engine:
        engine.model.weights["layers.0.attention.wq.weight"][0, 0] = math.nan
        assert math.isnan(engine.step(*sequence(GQA, 40)).loss)
        assert math.isnan(engine.evaluate(*sequence(GQA, 40)))


# ------------------------------------------------------------------------------------- settings


def test_seq_len_defaults_to_the_model_and_limits_sequences() -> None:
    with make_engine() as engine:
        assert engine.seq_len == GQA.seq_len
    with make_engine(seq_len=9) as engine:
        assert engine.seq_len == 9
        assert engine.step(*sequence(GQA, 9)).loss > 0
        for call in (engine.step, engine.evaluate):
            said = message(lambda call=call: call(*sequence(GQA, 10)))
            assert "a sequence of 10 tokens, this engine takes 1 to 9" in said
        message(lambda: engine.logits(sequence(GQA, 10)[0]))
    for bad in (0, -1, GQA.seq_len + 1, 2**31, 2**32 + 5):
        assert str(bad) in message(lambda bad=bad: make_engine(seq_len=bad))


def test_threads_default_is_the_library_s_and_limits_hold() -> None:
    with make_engine() as engine:
        assert engine.threads == library_info()["threads"] >= 1
    with make_engine(threads=3) as engine:
        assert engine.threads == 3
    for bad in (0, -2, 257, 2**31, 2**32 + 1):
        assert str(bad) in message(lambda bad=bad: make_engine(threads=bad))


def test_more_threads_than_work_is_fine() -> None:
    config = ModelConfig(2, 1, 1, 1, 1, 1, 1)
    with Engine(Model.init(config), "baseline", "cpu", threads=64) as engine:
        assert engine.step([0], [0]).loss == 0.0
        engine.update(lr=0.1, grad_clip=1.0)
        assert engine.evaluate([0], [0]) == 0.0


# --------------------------------------------------------------------------------------- tokens


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "beyond": ([1, 523, 2], "[1] is 523, the vocabulary has 0 to 522"),
    "negative": ([1, 2, -1], "[2] is -1"),
    "far": ([1, 2**31, 2], "2147483648"),
    "far-negative": ([1, 5, -(2**31) - 1], "-2147483649"),
    "huge": (np.array([1, 2, 2**64 - 1], np.uint64), "18446744073709551615"),
    "too-huge": ([1, 2, 2**70], "expected integers"),
    "floats": ([1.0, 2.0, 3.0], "float64, expected integers"),
    "booleans": ([True, False, True], "bool, expected integers"),
    "strings": (["1", "2", "3"], "expected integers"),
    "text": ("Once", "expected integers"),
    "none": (None, "expected integers"),
    "one-number": (5, "shape ()"),
    "empty": ([], "shape (0,)"),
    "empty-integers": (np.zeros(0, np.int32), "shape (0,)"),
    "too-deep": ([[[1, 2, 3]]], "shape (1, 1, 3)"),
    "ragged": ([[1], [1, 2]], "expected integers"),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_bad_tokens_are_refused_and_change_nothing(kind: str) -> None:
    """Ragged lists were a ValueError; the message on 2^31 named the wrong end."""
    bad, says = BAD_TOKENS[kind]
    good = np.array([1, 2, 3])
    with make_engine() as engine:
        for call in (
            lambda: engine.step(bad, good),
            lambda: engine.evaluate(bad, good),
            lambda: engine.logits(bad),
            lambda: engine.step(good, bad),
            lambda: engine.evaluate(good, bad),
        )[: 3 if kind == "negative" else 5]:  # a negative target is not counted
            assert says in message(call)
        assert engine.accumulated == 0
        assert not any(gradient.any() for gradient in engine.gradients.values())


def test_tokens_and_targets_of_different_length() -> None:
    with make_engine() as engine:
        assert "3 tokens but 2 targets" in message(lambda: engine.step([1, 2, 3], [1, 2]))
        assert "1 tokens but 2 targets" in message(lambda: engine.evaluate([1], [1, 2]))


def test_tokens_of_every_integer_kind_are_the_same() -> None:
    ids = [1, 200, 3, 4]
    wide = np.repeat(np.array(ids, np.uint16), 2)
    kinds: list[Any] = [ids, tuple(ids), np.array(ids, np.int64), np.array(ids, np.uint16)]
    kinds += [np.array(ids, np.uint32), np.array(ids, np.uint8), np.array(ids, ">i4")]
    kinds += [np.array(ids, np.uint64), wide[::2], np.array(ids[::-1])[::-1]]
    kinds += [np.array(ids, np.int16).astype("<i2"), range(1, 5)]
    with make_engine() as engine:
        expected = engine.logits(np.array(ids, np.int32))
        for kind in kinds[:-1]:
            assert engine.logits(kind).tobytes() == expected.tobytes(), repr(kind)
        assert engine.logits(kinds[-1]).tobytes() == engine.logits([1, 2, 3, 4]).tobytes()


def test_tokens_may_be_read_only_and_are_not_changed() -> None:
    ids = np.arange(5, dtype=np.int32)
    ids.flags.writeable = False
    with make_engine() as engine:
        engine.step(ids, ids)
    assert ids.tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------ life cycle


def test_close_twice_then_every_use_is_refused() -> None:
    engine = make_engine()
    gradients = engine.gradients
    engine.step([1, 2], [2, 3])
    engine.close()
    engine.close()
    for call in (
        lambda: engine.step([1], [1]),
        lambda: engine.update(1e-3),
        lambda: engine.logits([1]),
        lambda: engine.evaluate([1], [1]),
        lambda: engine.restore(0, 0),
        lambda: engine.accumulated,
        lambda: engine.updates,
    ):
        assert "this Engine was closed" in message(call, ClosedError)
    assert gradients is engine.gradients and gradients["norm.weight"].any()
    assert engine.seq_len == GQA.seq_len


def test_context_manager_closes_even_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), make_engine() as engine:
        raise RuntimeError("mine")
    message(lambda: engine.step([1], [1]), ClosedError)
    assert engine.__enter__() is engine


LARGE = ModelConfig(64, 172, 1, 8, 4, 1 << 18, 16)  # 16 M parameters: 64 MiB an arena
ARENA = 64 << 20


def test_views_outlive_engine_and_model() -> None:
    before = mapped()
    engine = Engine(Model(LARGE), device="cpu")
    engine.step([1, 2], [2, 3])
    view = engine.gradients["norm.weight"]
    expected = np.array(view)
    assert mapped() - before > 4 * ARENA
    engine.close()
    forgotten = weakref.ref(engine)
    del engine
    gc.collect()
    assert forgotten() is None
    others = [Engine(Model(GQA)) for _ in range(5)]  # would reuse freed memory
    np.testing.assert_array_equal(view, expected)
    view += 1.0
    del others
    gc.collect()
    # One arena of four is still in use; stacks of earlier threads may have gone meanwhile.
    assert ARENA * 0.5 < mapped() - before < 2 * ARENA
    del view
    gc.collect()
    assert mapped() - before < ARENA * 0.5


def test_forgotten_engine_is_freed_with_its_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before_memory, before_threads = mapped(), threads()
    for _ in range(10):
        engine = Engine(Model(LARGE), device="cpu", threads=4)
        engine.step([1], [1])
        assert threads() == before_threads + 3
        del engine
        gc.collect()
        assert threads() == before_threads
    assert mapped() - before_memory < ARENA * 0.5


def test_engine_that_cannot_be_made_keeps_nothing() -> None:
    before = mapped()
    for _ in range(5):
        message(lambda: Engine(Model(LARGE), "nonsense"))
        message(lambda: Engine(Model(LARGE), device="cpu", threads=1000))
    gc.collect()
    assert mapped() - before < ARENA * 0.5


def test_two_engines_share_the_model_and_nothing_else() -> None:
    model = make_model()
    with Engine(model, "opt", "cpu", "fp32") as a, Engine(model, "baseline", "cpu", "fp32") as b:
        a.step(*sequence(GQA, 30))
        assert b.accumulated == 0 and not b.gradients["norm.weight"].any()
        loss = b.evaluate(*sequence(GQA, 30))
        a.update(lr=1e-2)
        assert b.evaluate(*sequence(GQA, 30)) < loss, "b does not see the new weights"
        a.close()
        assert b.step(*sequence(GQA, 30)).loss < loss


def test_weights_written_between_steps_are_used() -> None:
    with make_engine() as engine:
        tokens, targets = sequence(GQA, 20)
        before = engine.evaluate(tokens, targets)
        engine.model.weights["norm.weight"][...] *= 1.5
        expected, _ = ref.cross_entropy(ref.forward(engine.model.weights, GQA, tokens), targets)
        assert engine.evaluate(tokens, targets) == pytest.approx(expected, rel=1e-6) != before


def test_gradients_and_moments_are_writable_named_views() -> None:
    with make_engine() as engine:
        for arrays in (engine.gradients, engine.adam_m, engine.adam_v):
            assert {n: a.shape for n, a in arrays.items()} == ref.tensor_shapes(GQA)
            assert all(a.dtype == np.float32 and a.flags.writeable for a in arrays.values())
            assert not any(a.any() for a in arrays.values())
            with pytest.raises(ConfigError):
                arrays["x"] = np.zeros(1)


@pytest.mark.parametrize("kind", [Engine, Decoder])
def test_handles_are_neither_copied_nor_pickled(kind: type[Engine | Decoder]) -> None:
    """A copy shared the handle: closing one made the other a wild pointer."""
    with kind(make_model()) as owner:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=kind.__name__):
                call(owner)
