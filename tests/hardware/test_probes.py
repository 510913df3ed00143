"""Probes: right on every simulated chip, and wrong as soon as one thing about a device is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anepy.engine import adapt, engine
from anepy.errors import NativeError
from anepy.hardware import ask as probe
from anepy.hardware import probes as probe_list
from anepy.hardware.probe_mil import DeviceRunner, in_dialect, weight_file
from anepy.hardware.probes import CHIPS, PROBES, find
from anepy.hardware.program import Program

NAMES = [item.name for item in PROBES]
Array = np.ndarray
Run = Callable[[Any, Sequence[Array], Sequence[Array], int], None]


# ------------------------------------------------------------------------- as they should be


@pytest.mark.parametrize("dialect", ["1.3", "1.0"])
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_answers_as_expected(chip: str, dialect: str) -> None:
    runner = DeviceRunner(f"sim:{chip}", dialect)
    answers = {item.name: probe.ask(item, runner, chip) for item in PROBES if item.name != "budget"}
    assert {name: a["reason"] for name, a in answers.items() if a["verdict"] != "ok"} == {}
    values = {name: answer["values"] for name, answer in answers.items()}
    assert values["saturation"]["product"] == 32752
    assert values["slice"]["keeps_5000"] == (chip not in ("m1", "m2"))
    results = [{"name": name} | answer for name, answer in answers.items()]
    assert adapt.adaptations(results) == []
    json.dumps(results)  # plain values only


def test_a_chip_that_is_not_what_it_says_is_noticed() -> None:
    answer = probe.ask(find("slice"), DeviceRunner("sim:m4"), "m1")
    assert answer["verdict"] == "differs" and "expected" in answer["reason"]
    assert probe.ask(find("slice"), DeviceRunner("sim:m4"), None)["verdict"] == "ok"


OTHERS = {
    "flush": {
        "numerics": {"fixed"},  # 2^-17 is lost on its way in
        "subnormal": {"inputs_flushed", "results_flushed", "sum_flushed"},
    },
    "float": {"numerics": {"fixed", "sticky", "dropped"}, "saturation": {"product"}},
    "exact": {
        "numerics": {"fixed", "sticky", "dropped", "away", "codes", "tables"},
        "saturation": {"product"},
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arithmetic_is_noticed_by_the_values_that_tell_it(name: str) -> None:
    for asked in ("subnormal", "numerics", "saturation"):
        answer = probe.ask(find(asked), DeviceRunner(f"sim:m4,numerics={name}"), "m4")
        values, expected = answer["values"], answer["expected"]
        wrong = {key for key in expected if values[key] != expected[key]}
        assert wrong == OTHERS[name].get(asked, set()), (asked, answer)


def test_texts_in_the_older_dialect_have_no_scalar_of_the_newer() -> None:
    made = []

    class Recording(DeviceRunner):
        def compile(self, text: str, weights: Any = None) -> Program:
            made.append((in_dialect(text, "1.0"), weights))
            return super().compile(text, weights)

    for item in PROBES:
        if item.name not in ("budget", "layer", "dialect"):
            item.run(Recording("sim", "1.0"))
    assert len(made) > 15
    for text, weights in made:
        assert text.startswith("program(1.0)") and "ios18" not in text
        with Program(text, weights, rules={"scalar_type": "error", "dialect": "error"}):
            pass


def test_device_of_engines_has_the_dialect() -> None:
    assert DeviceRunner("sim", "1.0").engine_device() == "sim:dialect=1.0"
    assert DeviceRunner("sim:m1", "1.3").engine_device() == "sim:m1,dialect=1.3"


# ---------------------------------------------------------------------------- faulty devices


class Wrapped:
    """A program that runs through a fault."""

    def __init__(self, program: Program, run: Run) -> None:
        self._program, self._run = program, run
        self.compiled = True

    def run_slots(
        self, inputs: Sequence[Array], outputs: Sequence[Array], function: int = 0
    ) -> None:
        self._run(self._program, inputs, outputs, function)

    def reload(self, weights: Any) -> None:
        self._program.reload(weights)

    def close(self) -> None:
        self._program.close()


class Faulty(DeviceRunner):
    """A device with one fault."""

    def __init__(self, run: Run | None = None, **rules: Any) -> None:
        super().__init__("sim:m4")
        self._run, self._rules = run, rules

    def compile(self, text: str, weights: Any = None) -> Any:
        made = Program(in_dialect(text, self.dialect), weights, rules=self._rules or None)
        return made if self._run is None else Wrapped(made, self._run)


def changed(change: Callable[[Array], Array | float]) -> Faulty:
    """Make a device that changes every output."""

    def run(program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int) -> None:
        program.run_slots(ins, outs, index)
        with np.errstate(all="ignore"):
            for out in outs:
                out[...] = change(out)

    return Faulty(run)


def without_writing(program: Program, ins: Any, outs: Any, index: int) -> None:
    pass


def first_answer_again() -> Faulty:
    """Make a device whose second evaluation fails unnoticed: outputs are those of the first."""
    kept: list[Array] = []

    def run(program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int) -> None:
        if not kept:
            program.run_slots(ins, outs, index)
            kept.extend(out.copy() for out in outs)
        for out, old in zip(outs, kept, strict=True):
            out[...] = old

    return Faulty(run)


def slots(inputs: Sequence[int], outputs: Sequence[int]) -> Faulty:
    """Make a device that binds surfaces in another order, where there are as many."""

    def run(program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int) -> None:
        if len(ins) == len(inputs):
            ins, outs = [ins[i] for i in inputs], [outs[i] for i in outputs]
        program.run_slots(ins, outs, index)

    return Faulty(run)


def first_procedure_only(
    program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int
) -> None:
    program.run_slots(ins, outs, 0)


def needs_surfaces_of(nbytes: int) -> Faulty:
    def run(program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int) -> None:
        if min(surface.nbytes for surface in (*ins, *outs)) < nbytes:
            raise NativeError(-40, "device", "status=0x1d")
        program.run_slots(ins, outs, index)

    return Faulty(run)


def equal_surfaces_only(
    program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int
) -> None:
    if len({surface.nbytes for surface in ins}) > 1:
        raise NativeError(-40, "device", "status=0x1d")
    program.run_slots(ins, outs, index)


class Compiler(Faulty):
    """A device whose compiler has a fault: it gets text and weights, and may change them."""

    def __init__(self, change: Callable[[str, Any], tuple[str, Any]]) -> None:
        super().__init__()
        self._change = change

    def compile(self, text: str, weights: Any = None) -> Any:
        text, weights = self._change(in_dialect(text, self.dialect), weights)
        return Program(text, weights)


def transposed(text: str, weights: Any) -> tuple[str, Any]:
    if weights is None:
        return text, weights
    (name, data), *_ = weights.items()
    matrix = np.frombuffer(data[-2048:], np.float16).reshape(32, 32)
    return text, {name: data[:-2048] + np.ascontiguousarray(matrix.T).tobytes()}


def shifted(text: str, weights: Any) -> tuple[str, Any]:
    if weights is None:
        return text, weights
    (name, data), *_ = weights.items()
    return text, {name: data[:-2048] + data[-2048 - 64 : -64]}


def refuses(*words: str) -> Callable[[str, Any], tuple[str, Any]]:
    def compile(text: str, weights: Any) -> tuple[str, Any]:
        if any(word in text for word in words):
            raise NativeError(-40, "device", "ANECCompile() FAILED: InvalidMILProgram")
        return text, weights

    return compile


def other_offset(text: str, weights: Any) -> tuple[str, Any]:
    return text.replace("begin = begin", "begin = first"), weights


class Reloading(Faulty):
    """A device that computes with the weights that were put in place."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def compile(self, text: str, weights: Any = None) -> Any:
        runner = self

        class Loaded(Wrapped):
            def reload(self, new: Any) -> None:
                data, _ = weight_file(np.full((1, 32, 1, 64), 3 * runner._factor))
                self._program = Program(text, {"weight.bin": data})

        return Loaded(Program(text, weights), lambda p, i, o, f: p.run_slots(i, o, f))


class Cached(Faulty):
    """A device that takes a text for the same program whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, bytes] = {}

    def compile(self, text: str, weights: Any = None) -> Any:
        again = text in self._made
        weights = self._made.setdefault(text, weights)
        made = Wrapped(Program(text, weights), lambda p, i, o, f: p.run_slots(i, o, f))
        made.compiled = not again
        return made


class Restless(Faulty):
    """A device whose every seventh compilation fails once."""

    count = 0

    def compile(self, text: str, weights: Any = None) -> Any:
        self.count += 1
        if self.count % 7 == 0:
            raise NativeError(-40, "device", "ANECCompile() FAILED CompilationFailure")
        return super().compile(text, weights)


class Spent(Faulty):
    """A device whose programs are wrong, without a word, from the 13th on."""

    count = 0

    def compile(self, text: str, weights: Any = None) -> Any:
        self.count += 1
        return (changed(lambda x: x * 0) if self.count > 12 else Faulty()).compile(text, weights)


def nothing(out: Array) -> float:
    return 0.0


def noise(out: Array) -> Array:
    return out * np.float16(1.03)


# (fault, probe, verdict, words of the reason or values, detail the library adapts to)
FAULTS: dict[str, tuple[Callable[[], DeviceRunner], str, str, Any, str]] = {
    "add-one-too-much": (lambda: changed(lambda x: x + 1), "add", "failed", "x + 1: 2", ""),
    "add-not-written": (lambda: Faulty(without_writing), "add", "failed", "was not written", ""),
    "add-stale": (first_answer_again, "add", "failed", "x + 1", ""),
    "add-refused": (lambda: Compiler(refuses("add(")), "add", "failed", "ANECCompile", ""),
    "binding-declared": (lambda: slots([1, 2, 0], [0, 1]), "binding", "differs",
                         {"inputs": "declaration", "outputs": "name"}, ""),
    "binding-outputs": (lambda: slots([0, 1, 2], [1, 0]), "binding", "differs",
                        {"inputs": "name", "outputs": "declaration"}, ""),
    "binding-neither": (lambda: slots([2, 1, 0], [0, 1]), "binding", "failed", "neither by", ""),
    "blob-transposed": (lambda: Compiler(transposed), "blob", "failed", "read transposed", ""),
    "blob-shifted": (lambda: Compiler(shifted), "blob", "failed", "permutation", ""),
    "procedures-first": (lambda: Faulty(first_procedure_only), "procedures", "differs",
                         {"usable": False}, "procedures=no"),
    "procedures-none": (lambda: Compiler(refuses("procedure001")), "procedures", "differs",
                        {"usable": False}, "procedures=no"),
    "reload-works": (lambda: Reloading(1), "reload", "differs", {"new_weights": True}, ""),
    "reload-mixes": (lambda: Reloading(0.5), "reload", "failed", "replaced under a loaded", ""),
    "reuse-stale": (Cached, "reuse", "differs", {"loads_again": True, "right": False}, "reuse=no"),
    "budget-silent": (Spent, "budget", "ok", {"limit": 12}, "budget=12"),
    "budget-none": (lambda: Compiler(refuses("add(")), "budget", "failed", "ANECCompile", ""),
    "procedures-no-single": (lambda: Compiler(refuses("main")), "procedures", "failed",
                             "ANECCompile", ""),
    "procedures-wrong-single": (lambda: changed(nothing), "procedures", "failed",
                                "one function", ""),
    "dynamic-zeros": (lambda: changed(nothing), "dynamic", "failed", "two inputs is wrong", ""),
    "subnormal-flushed": (lambda: changed(lambda x: np.where(np.abs(x) < 2.0**-14, 0, x)),
                          "subnormal", "differs", {"results_flushed": True}, ""),
    "numerics-rounded": (lambda: changed(lambda x: np.where(x == 2050, 2048, x)), "numerics",
                         "differs", {"away": False, "fixed": True}, ""),
    "subnormal-wrong": (lambda: changed(lambda x: x + np.float16(1)), "subnormal", "failed",
                        "neither it nor 0", ""),
    "saturation-clipped": (lambda: changed(lambda x: np.clip(x, -32752, 32752)), "saturation",
                           "failed", "neither right nor inf", ""),
    "saturation-early": (lambda: changed(lambda x: np.where(x > 20000, np.inf, x)), "saturation",
                         "differs", {"sum": 20000.0, "product": 20000.0}, ""),
    "sums-rounded": (lambda: changed(lambda x: np.where(x == 2304, 2302, x)), "sums", "failed",
                     "sums 768 times 3 to 2302", ""),
    "sums-clipped": (lambda: changed(lambda x: np.clip(x, -65504, 65504)), "sums", "differs",
                     {"overflows": False}, ""),
    "sums-wrapped": (lambda: changed(lambda x: np.where(np.isinf(x), 11264, x)), "sums", "failed",
                     "768 times 100", ""),
    "slice-elsewhere": (lambda: Compiler(other_offset), "slice", "failed", "slice of the last", ""),
    "slice-4094": (lambda: changed(lambda x: np.minimum(x, 4094)), "slice", "failed",
                   "became 4094", ""),
    "programs-noise": (lambda: changed(noise), "programs", "failed", "sdpa_fwd, ffn_fwd", ""),
    "programs-nan": (lambda: changed(lambda x: x * np.float16(np.nan)), "programs", "failed",
                     "sdpa_fwd", ""),
    "surface-accepted": (lambda: Faulty(surface_size="off"), "surface", "failed",
                         "half the size is accepted", ""),
    "floor-128K": (lambda: needs_surfaces_of(131072), "floor", "ok",
                   {"smallest": 131072, "unequal": False}, "surface=131072"),
    "floor-none": (lambda: needs_surfaces_of(1 << 20), "floor", "failed", "no surface from", ""),
    "floor-equal": (lambda: Faulty(equal_surfaces_only), "floor", "ok",
                    {"smallest": 4096, "unequal": False}, ""),
    "dialect-old": (lambda: Compiler(refuses("ios18")), "dialect", "differs",
                    {"1.3": False, "1.0": True}, "dialect=1.0"),
    "dialect-new": (lambda: Compiler(refuses("ios16")), "dialect", "differs",
                    {"1.3": True, "1.0": False}, ""),
    "dialect-none": (lambda: Compiler(refuses("ios")), "dialect", "failed", "InvalidMIL", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_device_is_noticed(fault: str) -> None:
    make, name, verdict, found, detail = FAULTS[fault]
    answer = probe.ask(find(name), make(), "m4")
    assert answer["verdict"] == verdict, answer
    if isinstance(found, str):
        assert found in answer["reason"] and answer["values"] == {}, answer
    else:
        assert answer["values"].items() >= found.items(), answer
    assert "\n" not in answer["reason"]
    results = [{"name": name} | answer]
    assert [item["detail"] for item in adapt.adaptations(results)] == ([detail] if detail else [])
    if verdict == "differs":
        assert "expected" in answer["reason"]


def test_failure_that_passes_is_not_the_end_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_list.time, "sleep", lambda seconds: None)
    answer = probe.ask(find("budget"), Restless(), "m4")
    assert answer["verdict"] == "ok" and answer["values"]["limit"] is None
    assert answer["values"]["transient"] > 10


def test_product_with_an_odd_depth_that_is_zero_is_told_but_no_failure() -> None:
    """M1: a reduction that is no multiple of 32 gives zeros; the library has none."""

    def run(program: Program, ins: Sequence[Array], outs: Sequence[Array], index: int) -> None:
        program.run_slots(ins, outs, index)
        if program.inputs["a_in"].shape[-1] % 32:
            outs[0][...] = 0

    answer = probe.ask(find("dynamic"), Faulty(run), "m1")
    assert (answer["verdict"], answer["values"]) == ("ok", {"k64": True, "k48": False})


@pytest.mark.parametrize("part", ["gradient", "loss", "infinite"])
def test_layer_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    class Wrong(engine.Engine):
        def step(self, tokens: Any, targets: Any) -> Any:
            stats = super().step(tokens, targets)
            if self.device == "cpu":
                return stats
            if part == "gradient":
                self.gradients["layers.1.attention.wk.weight"][...] *= np.float32(1.05)
            changes = {"gradient": {}, "loss": {"loss": stats.loss * 1.01}}
            return replace(stats, **changes.get(part, {"skipped": True}))

    monkeypatch.setattr(engine, "Engine", Wrong)
    answer = probe.ask(find("layer"), DeviceRunner("sim"), "m4")
    assert answer["verdict"] == "failed"
    words = {"gradient": "layers.1.attention.wk.weight by 5", "loss": "off by 1.0%"}
    assert words.get(part, "not finite") in answer["reason"]


def test_every_probe_can_fail() -> None:
    noticed = {name for _, name, verdict, _, _ in FAULTS.values() if verdict != "ok"}
    assert noticed | {"layer", "budget", "floor"} == set(NAMES)
    for item in adapt.ADAPTATIONS:
        assert any(name == item.probe and detail for _, name, _, _, detail in FAULTS.values())
