"""Loss and every gradient of the engine against the float64 reference."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tolerances
from cases import make_model, sequence, weights_of
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error

from anepy import _native
from anepy.engine import Engine, library_info
from anepy.model import Model, ModelConfig
from anepy.tokenizer import Tokenizer

TESTS = Path(__file__).resolve().parent
# No dimension is a multiple of a kernel's tile (6 or 8 rows, 16 to 64 columns) or equals another;
# vocabularies lie below, just above and well above the 512 rows that soft-max takes at once.
CONFIGS = {
    "mha": ModelConfig(36, 52, 2, 3, 3, 97, 129),
    "gqa": ModelConfig(40, 70, 3, 10, 2, 523, 129),
    "mqa-separate": ModelConfig(52, 44, 1, 2, 1, 600, 129, tied=False),
    "wide": ModelConfig(132, 198, 1, 6, 3, 1031, 129, tied=False),
}
# Sums and rows beyond the blocks of the matrix product: 1024 terms, 1536 rows.
BLOCKED = {
    "long-hidden": ModelConfig(20, 1040, 1, 2, 2, 40, 65),
    "long-dim": ModelConfig(1030, 34, 1, 5, 1, 70, 65, tied=False),
}
ALL = CONFIGS | BLOCKED
# Odd, within a block of 64 positions, exactly one, just more, and more than two; long before short.
LENGTHS = (129, 7, 65, 1, 64, 33)

Arrays = dict[str, npt.NDArray[np.float64]]


@functools.cache
def expected(name: str, length: int) -> tuple[float, Arrays]:
    config = ALL[name]
    return ref.loss_and_gradients(weights_of(config), config, *sequence(config, length))


def clear(engine: Engine) -> None:
    for gradient in engine.gradients.values():
        gradient[...] = 0.0
    engine.restore(accumulated=0, updates=engine.updates)


def assert_step_is_exact(engine: Engine, name: str, length: int) -> None:
    """Compare one step from cleared gradients with the reference."""
    clear(engine)
    loss, gradients = expected(name, length)
    stats = engine.step(*sequence(ALL[name], length))
    assert relative_error(stats.loss, loss) < tolerances.FP32_LOGITS
    assert (stats.loss_scale, stats.skipped, engine.accumulated) == (1.0, False, 1)
    found, wanted = dict(engine.gradients), dict(gradients)
    if length == 1:  # one position attends only to itself, whatever q and k are
        for tensor in [n for n in wanted if n.endswith(("wq.weight", "wk.weight"))]:
            wanted.pop(tensor)
            assert np.abs(found.pop(tensor)).max() < 1e-7
    else:
        weakest = min(float(np.linalg.norm(g)) for g in wanted.values())
        assert weakest > 1e-4, "too small to test anything"
    assert_tensors_close(found, wanted, tolerances.FP32_GRADIENT)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_every_tensor_matches_the_reference(
    name: str, variant: str, threads: int
) -> None:
    with Engine(make_model(ALL[name]), variant, "cpu", "fp32", threads=threads) as engine:
        for length in LENGTHS:
            assert_step_is_exact(engine, name, length)


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", BLOCKED)
def test_gradients_of_sums_longer_than_a_block(name: str, variant: str) -> None:
    with Engine(make_model(ALL[name]), variant, "cpu", "fp32", threads=2) as engine:
        for length in (65, 33):
            assert_step_is_exact(engine, name, length)


def run_all_on_this_isa() -> None:
    """Check every configuration; the process of the next test runs this."""
    for name in CONFIGS:
        for variant, threads in (("baseline", 2), ("opt", 1)):
            with Engine(make_model(ALL[name]), variant, "cpu", "fp32", threads=threads) as engine:
                for length in (65, 1, 33):
                    assert_step_is_exact(engine, name, length)
                isa = engine.isa
    print(isa, library_info()["gemm"])


ISAS = {
    "x86_64": ["scalar", "avx2", "avx512", "avx512bf16"],
    "aarch64": ["scalar", "neon", "neonbf16"],
}


@pytest.mark.parametrize(
    "isa", ISAS.get(platform.machine().replace("arm64", "aarch64"), ["scalar"])
)
def test_gradients_on_every_instruction_set(isa: str) -> None:
    """The mask is read once per process, hence a process for each."""
    if isa not in library_info()["isa_available"]:
        pytest.skip(f"this processor has no {isa}, or ANEPY_CPU_MASK hides it")
    code = "import test_gradients as t; t.run_all_on_this_isa()"
    environment = os.environ | {
        "ANEPY_CPU_MASK": isa,
        "ANEPY_LIB": _native.library()._name,
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    used, gemm = result.stdout.split()
    assert used == isa and gemm.endswith(isa), "the mask did not choose the kernels"


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", CONFIGS)
def test_short_sequence_after_a_long_one_sees_nothing_of_it(name: str, variant: str) -> None:
    """Buffers keep the columns of the longest sequence so far; none may leak."""
    results = []
    for before in ((), (129, 65)):
        with Engine(make_model(ALL[name]), variant, "cpu", "fp32") as engine:
            for length in before:
                engine.step(*sequence(ALL[name], length, seed=5))
            clear(engine)
            for length in (33, 1, 64):
                loss = engine.step(*sequence(ALL[name], length)).loss
                results.append((loss, {n: g.tobytes() for n, g in engine.gradients.items()}))
    half = len(results) // 2
    assert results[:half] == results[half:]


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", ["gqa", "mqa-separate"])
def test_gradients_after_a_step_of_nan_see_nothing_of_it(name: str, variant: str) -> None:
    """Zero times what is left in a buffer is zero only if that is a number."""
    with Engine(make_model(ALL[name]), variant, "cpu", "fp32") as engine:
        embedding = engine.model.weights["tok_embeddings.weight"]
        saved = embedding.copy()
        embedding[...] = np.nan
        assert np.isnan(engine.step(*sequence(ALL[name], 129)).loss)
        embedding[...] = saved
        for length in (33, 129, 1):
            assert_step_is_exact(engine, name, length)


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
@pytest.mark.parametrize("name", ["mha", "mqa-separate"])
def test_gradients_of_several_steps_add_up(name: str, variant: str) -> None:
    lengths = (33, 129, 1, 64)
    total: Arrays = {}
    for length in lengths:
        for tensor, gradient in expected(name, length)[1].items():
            total[tensor] = total.get(tensor, 0.0) + gradient
    with Engine(make_model(ALL[name]), variant, "cpu", "fp32") as engine:
        for length in lengths:
            engine.step(*sequence(ALL[name], length))
        assert engine.accumulated == len(lengths)
        assert_tensors_close(dict(engine.gradients), total, tolerances.FP32_GRADIENT)


def test_gradients_do_not_depend_on_how_long_sequences_may_be() -> None:
    """The same sequence in tight and in roomy engines: same sums in the same order."""
    results = []
    for seq_len in (33, 64, 129):
        with Engine(make_model(ALL["gqa"]), "opt", "cpu", "fp32", seq_len=seq_len) as engine:
            engine.step(*sequence(ALL["gqa"], 33))
            results.append({n: g.tobytes() for n, g in engine.gradients.items()})
    assert results[0] == results[1] == results[2]


def test_gradients_of_a_long_sequence_match_the_reference() -> None:
    """Many blocks of 64 positions, the last not full; more than 1024 terms per weight gradient."""
    config = ModelConfig(24, 40, 2, 2, 1, 61, 1100)
    tokens, targets = sequence(config, 1092)
    loss, gradients = ref.loss_and_gradients(weights_of(config), config, tokens, targets)
    with Engine(make_model(config), "opt", "cpu", "fp32", threads=2) as engine:
        stats = engine.step(tokens, targets)
        assert relative_error(stats.loss, loss) < tolerances.FP32_LOGITS
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)


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


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
def test_gradients_of_a_real_model_on_real_text(
    shared: Callable[[str], Path], variant: str
) -> None:
    model = Model.load(shared("stories260K.bin"))
    tokenizer = Tokenizer.load(shared("tok512.bin"), model.config.vocab_size)
    text = shared("tinystories_sample.txt").read_text("utf-8").split("<|endoftext|>")[1]
    ids = np.array(tokenizer.encode(text.strip())[:257])
    assert len(ids) == 257
    loss, gradients = ref.loss_and_gradients(model.weights, model.config, ids[:-1], ids[1:])
    with Engine(model, variant, "cpu", "fp32") as engine:
        stats = engine.step(ids[:-1], ids[1:])
        assert relative_error(stats.loss, loss) < tolerances.FP32_LOGITS
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)
