"""Loss and every gradient of the engine against the float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import children
import needs
import numpy as np
import numpy.typing as npt
import pytest
import tolerances
from cases import (
    BIASES,
    NARROW_HEADS,
    NORMS,
    WIDE_HEADS,
    bits,
    make_model,
    mapped,
    sequence,
    weights_of,
)
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error

from anepy.engine import Engine
from anepy.models.model import Model, ModelConfig
from anepy.native.info import library_info
from anepy.text.tokenizer import Tokenizer

# With biases, one K/V head and a classifier of its own.
WIDE_NORMS = ModelConfig(
    36, 52, 1, 3, 1, 97, 129, head_dim=66, norm_eps=0.01, qkv_bias=True, qk_norm=True, tied=False
)
# No dimension is a multiple of a kernel's tile (6 or 8 rows, 16 to 64 columns) or equals another;
# vocabularies lie below, just above and well above the 512 rows that soft-max takes at once.
CONFIGS = {
    "mha": ModelConfig(36, 52, 2, 3, 3, 97, 129),
    "gqa": ModelConfig(40, 70, 3, 10, 2, 523, 129),
    "mqa-separate": ModelConfig(52, 45, 1, 2, 1, 600, 129, tied=False),
    "wide": ModelConfig(132, 198, 1, 6, 3, 1031, 129, tied=False),
    "wide-heads": WIDE_HEADS,
    "narrow-heads": NARROW_HEADS,
    "biases": BIASES,
    "norms": NORMS,
    "norms-of-wide-heads": WIDE_NORMS,
}
# Sums beyond what products hold of a factor at once: 1024 terms, 2048, in bf16 4096.
BLOCKED = {
    "long-hidden": ModelConfig(20, 2064, 1, 2, 2, 40, 65),
    "long-dim": ModelConfig(1030, 34, 1, 5, 1, 70, 65, tied=False),
}
ALL = CONFIGS | BLOCKED
# Odd, within a block of 64 positions, exactly one, just more, and more than two; long before short.
LENGTHS = (129, 7, 65, 1, 64, 33)

PRECISIONS = ["fp32", "bf16"]

Arrays = dict[str, npt.NDArray[np.float64]]


@functools.cache
def expected(name: str, length: int) -> tuple[float, Arrays]:
    config = ALL[name]
    return ref.loss_and_gradients(weights_of(config), config, *sequence(config, length))


def clear(engine: Engine) -> None:
    for gradient in engine.gradients.values():
        gradient[...] = 0.0
    engine.restore(accumulated=0, updates=engine.updates)


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any], precision: str) -> None:
    """Compare gradients with the reference within the bars of this precision."""
    if precision == "fp32":
        assert_tensors_close(found, wanted, tolerances.FP32_GRADIENT)
    else:
        bars = tolerances.BF16_GRADIENT, tolerances.BF16_COSINE
        assert_tensors_close(found, wanted, bars[0], min_cosine=bars[1])


def loss_bar(precision: str) -> float:
    return tolerances.FP32_LOGITS if precision == "fp32" else tolerances.BF16_LOSS


def assert_step_is_exact(engine: Engine, name: str, length: int) -> None:
    """Compare one step from cleared gradients with the reference."""
    clear(engine)
    loss, gradients = expected(name, length)
    stats = engine.step(*sequence(ALL[name], length))
    assert relative_error(stats.loss, loss) < loss_bar(engine.precision)
    assert (stats.loss_scale, stats.skipped, engine.accumulated) == (1.0, False, 1)
    found, wanted = dict(engine.gradients), dict(gradients)
    if length == 1:  # one position attends only to itself, whatever q and k are
        for tensor in [n for n in wanted if n.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm")]:
            wanted.pop(tensor)
            # What rounding leaves of two sums that are equal: it depends on who adds them up.
            assert np.abs(found.pop(tensor)).max() < (1e-6 if engine.precision == "fp32" else 1e-2)
    else:
        weakest = min(float(np.linalg.norm(g)) for g in wanted.values())
        assert weakest > 1e-4, "too small to test anything"
    assert_close(found, wanted, engine.precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_every_tensor_matches_the_reference(
    name: str, variant: str, threads: int, precision: str
) -> None:
    needs.precision(precision)
    with Engine(make_model(ALL[name]), variant, "cpu", precision, threads=threads) as engine:
        for length in LENGTHS:
            assert_step_is_exact(engine, name, length)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", BLOCKED)
def test_gradients_of_sums_longer_than_a_block(name: str, variant: str, precision: str) -> None:
    needs.precision(precision)
    with Engine(make_model(ALL[name]), variant, "cpu", precision, threads=2) as engine:
        for length in (65, 33):
            assert_step_is_exact(engine, name, length)


def run_all_on_this_isa() -> None:
    """Check every configuration; the process of the next test runs this."""
    for name in CONFIGS:
        for variant, threads in (("baseline", 2), ("opt", 1)):
            with Engine(make_model(ALL[name]), variant, "cpu", threads=threads) as engine:
                assert engine.precision == ("bf16" if engine.isa.endswith("bf16") else "fp32")
                for length in (65, 1, 33):
                    assert_step_is_exact(engine, name, length)
                isa = engine.isa
    print(isa, library_info()["gemm"])


@pytest.mark.parametrize("isa", needs.KERNEL_SETS)
def test_gradients_on_every_instruction_set(isa: str) -> None:
    """The mask is read once per process, hence a process for each."""
    needs.kernel_set(isa)
    code = "from engine import test_gradients as t; t.run_all_on_this_isa()"
    result = children.run("-c", code, ANEPY_CPU_MASK=isa, ANEPY_BLAS="own")
    assert result.returncode == 0, result.stderr
    used, gemm = result.stdout.split()
    assert used == isa and gemm.endswith(isa), "the mask did not choose the kernels"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", CONFIGS)
def test_short_sequence_after_a_long_one_sees_nothing_of_it(
    name: str, variant: str, precision: str
) -> None:
    """Buffers keep the columns of the longest sequence so far; none may leak."""
    needs.precision(precision)
    results = []
    for before in ((), (129, 65)):
        with Engine(make_model(ALL[name]), variant, "cpu", precision) as engine:
            for length in before:
                engine.step(*sequence(ALL[name], length, seed=5))
            clear(engine)
            for length in (33, 1, 64):
                loss = engine.step(*sequence(ALL[name], length)).loss
                results.append((loss, {n: g.tobytes() for n, g in engine.gradients.items()}))
    half = len(results) // 2
    assert results[:half] == results[half:]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", ["gqa", "mqa-separate"])
def test_gradients_after_a_step_of_nan_see_nothing_of_it(
    name: str, variant: str, precision: str
) -> None:
    """Zero times what is left in a buffer is zero only if that is a number."""
    needs.precision(precision)
    with Engine(make_model(ALL[name]), variant, "cpu", precision) as engine:
        embedding = engine.model.weights["tok_embeddings.weight"]
        saved = embedding.copy()
        embedding[...] = np.nan
        assert np.isnan(engine.step(*sequence(ALL[name], 129)).loss)
        embedding[...] = saved
        for length in (33, 129, 1):
            assert_step_is_exact(engine, name, length)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", ["mha", "mqa-separate"])
def test_gradients_of_several_steps_add_up(name: str, variant: str, precision: str) -> None:
    needs.precision(precision)
    lengths = (33, 129, 1, 64)
    total: Arrays = {}
    for length in lengths:  # each weighs as much as it has targets
        for tensor, gradient in expected(name, length)[1].items():
            total[tensor] = total.get(tensor, 0.0) + gradient * (length / lengths[0])
    with Engine(make_model(ALL[name]), variant, "cpu", precision) as engine:
        for length in lengths:
            engine.step(*sequence(ALL[name], length))
        assert engine.accumulated == len(lengths) and engine.counted == sum(lengths)
        assert_close(dict(engine.gradients), total, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_do_not_depend_on_how_long_sequences_may_be(precision: str) -> None:
    """The same sequence in tight and in roomy engines: same sums in the same order."""
    needs.precision(precision)
    results = []
    for seq_len in (33, 64, 129):
        with Engine(make_model(ALL["gqa"]), "opt", "cpu", precision, seq_len=seq_len) as engine:
            engine.step(*sequence(ALL["gqa"], 33))
            results.append({n: g.tobytes() for n, g in engine.gradients.items()})
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_a_long_sequence_match_the_reference(precision: str) -> None:
    """Many blocks of 64 positions, the last not full; more than 1024 terms per weight gradient."""
    needs.precision(precision)
    config = ModelConfig(24, 40, 2, 2, 1, 61, 1100)
    tokens, targets = sequence(config, 1092)
    loss, gradients = ref.loss_and_gradients(weights_of(config), config, tokens, targets)
    with Engine(make_model(config), "opt", "cpu", precision, threads=2) as engine:
        stats = engine.step(tokens, targets)
        assert relative_error(stats.loss, loss) < loss_bar(precision)
        assert_close(dict(engine.gradients), gradients, precision)


# Attention over many blocks of 64 tokens, whose pieces wait for each other.
LONG = {
    "long-gqa": (ModelConfig(40, 70, 2, 10, 2, 97, 1100), (1100, 1024, 1037)),
    "long-mqa": (ModelConfig(32, 44, 1, 4, 1, 97, 2048), (2048, 1985)),
    "long-wide": (ModelConfig(132, 60, 1, 2, 2, 97, 1024), (1024, 1000)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt"])
@pytest.mark.parametrize("name", LONG)
def test_gradients_of_long_attention_match_the_reference(
    name: str, variant: str, precision: str
) -> None:
    needs.precision(precision)
    config, lengths = LONG[name]
    with Engine(make_model(config), variant, "cpu", precision) as engine:
        for length in (*lengths, 65):
            tokens, targets = sequence(config, length)
            loss, gradients = ref.loss_and_gradients(weights_of(config), config, tokens, targets)
            clear(engine)
            assert relative_error(engine.step(tokens, targets).loss, loss) < loss_bar(precision)
            assert_close(dict(engine.gradients), gradients, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("config", "n"), [(c, n[0]) for c, n in LONG.values()] + [(NORMS, 129)])
def test_attention_gives_the_same_bits_with_any_threads(
    config: ModelConfig, n: int, precision: str
) -> None:
    """With more threads than heads, several work on one and add up in turn."""
    needs.precision(precision)
    results = []
    for threads in (1, 2, 3, 7):
        with Engine(make_model(config), "opt", "cpu", precision, threads=threads) as engine:
            engine.step(*sequence(config, n))
            results.append(bits(engine.gradients))
    assert results[1:] == results[:1] * 3


def test_memory_of_long_sequences_grows_with_their_length_not_its_square() -> None:
    sizes = []
    for seq_len in (1024, 2048, 4096):
        before = mapped()
        with Engine(Model(ModelConfig(32, 44, 2, 8, 8, 97, seq_len)), device="cpu", threads=1):
            sizes.append(mapped() - before)
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("variant", ["baseline", "opt", "opt-fp16_cache", "opt-prealloc"])
def test_gradients_in_bf16_are_the_same_bits_in_every_run(variant: str) -> None:
    """With the same threads, and with others: each element is summed by one thread in one order."""
    needs.precision("bf16")
    results = []
    for threads in (2, 2, 1, 3):
        with Engine(make_model(ALL["wide"]), variant, "cpu", "bf16", threads=threads) as engine:
            losses = [engine.step(*sequence(ALL["wide"], n)).loss for n in (129, 65, 33)]
            results.append((losses, {n: g.tobytes() for n, g in engine.gradients.items()}))
    assert results[1:] == results[:1] * 3


def test_gradients_with_extreme_logits_stay_finite_and_right() -> None:
    """Confident models have logits in the hundreds: soft-max must not overflow."""
    name = "mha"
    model = make_model(ALL[name])
    model.weights["tok_embeddings.weight"][...] *= 40
    tokens, targets = sequence(ALL[name], 33)
    weights = {n: np.array(w) for n, w in model.weights.items()}
    assert np.abs(ref.forward(weights, model.config, tokens)).max() > 150
    loss, gradients = ref.loss_and_gradients(weights, model.config, tokens, targets)
    with Engine(model, "opt", "cpu", "fp32") as engine:
        assert relative_error(engine.step(tokens, targets).loss, loss) < tolerances.FP32_LOGITS
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
def test_gradients_of_a_real_model_on_real_text(variant: str, precision: str) -> None:
    needs.precision(precision)
    model = Model.load(needs.data("stories260K.bin"))
    tokenizer = Tokenizer.load(needs.data("tok512.bin"), model.config.vocab_size)
    text = needs.data("tinystories_sample.txt").read_text("utf-8").split("<|endoftext|>")[1]
    ids = np.array(tokenizer.encode(text.strip())[:257])
    assert len(ids) == 257
    loss, gradients = ref.loss_and_gradients(model.weights, model.config, ids[:-1], ids[1:])
    with Engine(model, variant, "cpu", precision) as engine:
        stats = engine.step(ids[:-1], ids[1:])
        assert relative_error(stats.loss, loss) < loss_bar(precision)
        assert precision == "fp32" or abs(stats.loss - loss) < 1e-3
        assert_close(dict(engine.gradients), gradients, precision)
