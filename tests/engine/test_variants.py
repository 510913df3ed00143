"""Variants, devices and precisions by name; switches change speed, never the numbers."""

from __future__ import annotations

from typing import Any

import needs
import numpy as np
import pytest
from cases import GQA, SEPARATE, bits, make_engine, message, sequence

from anepy import variants
from anepy.comparing.estimates import LOSS_TOLERANCE, agreement
from anepy.engine import Engine
from anepy.engine.device import devices
from anepy.errors import ConfigError
from anepy.models.model import Model, ModelConfig
from anepy.native import abi
from anepy.native.info import library_info
from anepy.text.data import Sampler, TokenData
from anepy.text.tokenizer import Tokenizer

MEMORY_SWITCHES = ("prealloc", "fp16_cache", "skip_dead_reads", "concurrent_dw", "vector_embed")


# ------------------------------------------------------------------------- variants and devices


OFFLOADS = ("offload_rmsnorm", "offload_classifier", "offload_softmax")
OPT = ("simd_adam", "fp16_cache", "prealloc", "concurrent_dw", "skip_dead_reads", "vector_embed")


@pytest.mark.parametrize(
    ("variant", "switches"),
    [
        ("baseline", ()),
        ("opt", OPT),
        ("max", OPT),
        ("baseline+simd_adam", ("simd_adam",)),
        ("baseline+vector_embed+prealloc", ("prealloc", "vector_embed")),
        ("opt-fp16_cache", tuple(s for s in OPT if s != "fp16_cache")),
        ("opt-fp16_cache+fp16_cache", OPT),
        ("opt+fp16_cache-fp16_cache", tuple(s for s in OPT if s != "fp16_cache")),
        ("opt+simd_adam", OPT),
        ("baseline-simd_adam", ()),
        ("max-offload_softmax", OPT),
        ("double-buffer-background_compile", ()),
        ("ane", OFFLOADS),
        ("opt+offload_softmax", (*OPT, "offload_softmax")),
    ],
)
def test_variant_stands_for_its_switches(variant: str, switches: tuple[str, ...]) -> None:
    with make_engine(GQA, variant) as engine:
        assert set(engine.switches) == set(switches) and engine.variant == variant
        assert engine.step([1, 2], [2, 3]).loss > 0


@pytest.mark.parametrize("text", ["", "Opt", " opt", "opt ", "optimal", "opt,ane", "x" * 5000])
def test_variant_unknown_name_lists_the_known(text: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert "unknown variant" in said and "double-buffer, resident, max" in said


@pytest.mark.parametrize(
    "text", ["opt+", "opt-", "opt++prealloc", "opt+Prealloc", "opt+opt", "opt+no", "baseline-max"]
)
def test_variant_unknown_switch_lists_the_known(text: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert "unknown switch" in said and all(switch in said for switch in OPT)


@pytest.mark.parametrize(
    ("text", "switch"),
    [
        ("dynamic", "dynamic_weights"),
        ("double-buffer", "background_compile"),
        ("ane+background_compile", "background_compile"),
        ("resident", "dynamic_weights"),
        ("opt+offload_dw", "offload_dw"),
        ("opt+fused_layer", "fused_layer"),
    ],
)
def test_variant_without_meaning_on_the_cpu_is_refused(text: str, switch: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert f"'{text}'" in said and f"switch {switch} means nothing on device cpu" in said


@pytest.mark.parametrize(("vocabulary", "fits"), [(65536, True), (65537, False), (70000, False)])
def test_softmax_of_a_vocabulary_too_large_for_a_program_stays_on_the_host(
    vocabulary: int, fits: bool
) -> None:
    model = Model.init(ModelConfig(32, 48, 1, 2, 2, vocabulary, 64), seed=1)
    tokens = np.array([vocabulary - 1, 0, 5, 69, 70], np.int32)
    losses = []
    for variant in ("opt", "max", "max+dynamic_weights"):
        with Engine(model, variant, "sim") as engine:
            assert ("offload_softmax" in engine.switches) == (fits and variant != "opt")
            assert ("offload_classifier" in engine.switches) == (variant != "opt")
            losses.append(engine.step(tokens, tokens).loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    for variant in () if fits else ("ane", "opt+offload_softmax", "max+offload_softmax"):
        said = message(lambda text=variant: Engine(model, text, "sim"))
        assert f"'{variant}': switch offload_softmax takes a vocabulary of up to 65536" in said
        assert f"the model has {vocabulary}; leave it out" in said
    Engine(model, "ane", "cpu").close()  # where a tensor may have any number of channels


@pytest.mark.parametrize("option", ["variant", "device", "precision"])
@pytest.mark.parametrize("text", ["a\nb", "opt\0x", "cpu\0", "fp32\0", "\udcff", "é" * 300])
def test_names_with_odd_characters_are_refused_in_one_line(option: str, text: str) -> None:
    r"""`opt\0x` was taken for `opt`; an undecodable argument was a UnicodeEncodeError."""
    assert f"unknown {option}" in message(lambda: Engine(Model(GQA), **{option: text}))


def test_variants_lists_what_works_here() -> None:
    found = variants("cpu")
    assert found["baseline"] == () and set(found["opt"]) == set(OPT)
    assert set(found["ane"]) == set(OFFLOADS) and "dynamic" not in found
    for name in found:
        make_engine(GQA, name).close()


def test_device_ane_says_why_not() -> None:
    needs.no_neural_engine()
    said = message(lambda: Engine(Model(GQA), device="ane"))
    assert "device ane" in said and "--device cpu" in said
    assert said == {device.name: device.reason for device in devices()}["ane"]


def test_device_unknown_lists_the_known() -> None:
    for name in ("tpu", "", "CPU", "cpu "):
        said = message(lambda name=name: Engine(Model(GQA), device=name))
        assert f"unknown device '{name}'" in said and "auto" in said and "cpu" in said


def test_device_cpu_is_usable_and_described() -> None:
    cpu = {device.name: device for device in devices()}["cpu"]
    assert cpu.usable and cpu.reason
    with Engine(Model(GQA), device="cpu", precision="fp32") as engine:
        assert (engine.device, engine.precision) == ("cpu", "fp32")
        assert engine.isa == library_info()["isa"] in library_info()["isa_available"]


def test_device_auto_is_one_that_works() -> None:
    with Engine(Model(GQA)) as engine:
        assert {device.name: device.usable for device in devices()}[engine.device]
        assert engine.precision in ("fp32", "bf16", "fp16")
        assert engine.step([1, 2], [2, 3]).loss > 0


def test_precision_unknown_or_not_of_the_device() -> None:
    said = message(lambda: Engine(Model(GQA), device="cpu", precision="int8"))
    assert "unknown precision 'int8'" in said and "auto, fp32, bf16, fp16" in said
    said = message(lambda: Engine(Model(GQA), device="cpu", precision="fp16"))
    assert "fp16 is not available on device cpu" in said


# ------------------------------------------------------------------- the same numbers, every time


def train(variant: str, threads: int | None = None, config: ModelConfig = GQA) -> list[Any]:
    """Return every bit of a short training: losses, gradients, weights and moments."""
    results: list[Any] = []
    with make_engine(config, variant, threads=threads) as engine:
        for number, length in enumerate((70, 33, 65, 1, 64, 70)):
            results.append(engine.step(*sequence(config, length, number)).loss)
            if number % 2:
                results.append(bits(engine.gradients))
                results.append(engine.update(lr=1e-2, grad_clip=1.0, weight_decay=0.1).grad_norm)
        results += [bits(engine.model.weights), bits(engine.adam_m), bits(engine.adam_v)]
        results.append(engine.logits(sequence(config, 50)[0]).tobytes())
    return results


@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
def test_training_twice_is_bit_identical(variant: str) -> None:
    assert train(variant) == train(variant)


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane"])
def test_training_does_not_depend_on_the_threads(variant: str, config: ModelConfig) -> None:
    one = train(variant, 1, config)
    for threads in (2, 3, 5):
        assert train(variant, threads, config) == one, f"{threads} threads"


@pytest.mark.parametrize("switch", MEMORY_SWITCHES)
def test_switch_that_only_moves_memory_changes_no_bit(switch: str) -> None:
    assert train(f"baseline+{switch}") == train("baseline")
    assert train(f"opt-{switch}") == train("opt")


# ------------------------------------------------------- fifty steps of fine-tuning a real model


def places() -> list[tuple[str, str]]:
    """List every device with every precision it has here."""
    found = []
    for device in ("cpu", "sim"):
        for precision in LOSS_TOLERANCE:
            try:
                Engine(Model(GQA), "baseline", device, precision).close()
            except ConfigError:
                continue
            found.append((device, precision))
    return found


@pytest.mark.parametrize(("device", "precision"), places())
def test_fifty_steps_of_every_variant_agree_with_the_baseline(device: str, precision: str) -> None:
    tokenizer = Tokenizer.load(needs.data("tok512.bin"))
    text = needs.data("tinyshakespeare.txt").read_text()[:50000]
    data = TokenData.from_array(np.array(tokenizer.encode(text), dtype=np.uint16))

    def curve(variant: str) -> list[float]:
        sampler, losses = Sampler(data, 128, 0), []
        model = Model.load(needs.data("stories260K.bin"))
        with Engine(model, variant, device, precision, seq_len=128) as engine:
            for step in range(1, 51):
                losses.append(engine.step(*sampler.next()).loss)
                if step % 10 == 0:
                    engine.update(lr=3e-4)
        return losses

    baseline = curve("baseline")
    assert np.mean(baseline[-10:]) < 0.9 * np.mean(baseline[:10])
    alike = {"dynamic", *(f"baseline+{switch}" for switch in MEMORY_SWITCHES)}
    on_device = ("offload_dw", "fused_layer") if device == "sim" else ()
    switches = ("simd_adam", *OFFLOADS, *on_device)
    for variant in {*variants(device), *alike, *(f"baseline+{switch}" for switch in switches)}:
        if variant == "dynamic" and device == "cpu":
            continue
        losses = curve(variant)
        if variant == "double-buffer":  # one update stale; ckernels/weights.c checks each step
            assert losses[:10] == baseline[:10]
            assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
        elif variant in alike:
            assert losses == baseline, variant
        else:
            found = agreement(baseline, losses, LOSS_TOLERANCE[precision])
            assert found.agrees, (variant, found)


# ------------------------------------------------------------------------------------ the library


def test_library_info_is_consistent() -> None:
    info = library_info()
    assert info["isa"] in info["isa_available"] and info["isa_available"][-1] == "scalar"
    assert info["gemm"].endswith(info["isa"]) and info["compiler"].split()[0] in ("gcc", "clang")
    assert 1 <= info["cores"] and 1 <= info["threads"] <= 256
    assert info["abi"] == abi.ABI_VERSION
