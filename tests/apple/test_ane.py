"""The Neural Engine device: the unmodified Apple sources on Linux, against strict stand-ins.

Nothing here says how fast a Neural Engine is, or that one was seen. What is shown: calls are made
in the documented order with the documented arguments, results are those of the simulator bit for
bit, and whatever the framework does wrong becomes an error sentence that leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from ckernels import gnustep, toolchain

import apple
from anepy.models.model import Model, ModelConfig

pytestmark = needs.LINUX  # a Mac has the real one

CHILD = Path(__file__).with_name("ane_child.py")
CLEAN = {"broken_rule": "", "live": 0, "loaded": 0, "folders": [], "gpu": [0, 0]}
GQA = [64, 96, 2, 8, 4, 160, 128]
BIASES = [64, 96, 2, 6, 2, 160, 128, 20, 1e-5, 1e4, None, True]
NORMS = [64, 96, 2, 4, 2, 160, 128, 32, 1e-6, 1e6, None, False, True]
WIDE = [768, 2048, 2, 12, 12, 512, 128]
LARGER = [256, 512, 1, 4, 4, 61, 64]  # weights are larger than 64 KiB
TINY = [32, 48, 1, 2, 2, 61, 64]
REQUEST = (
    "requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:"
)
# What may go wrong at each call, and what the first time of it leads to.
FAULTS: dict[str, dict[str, str]] = {
    "_ANEInMemoryModelDescriptor": {"missing": "error"},
    "_ANEInMemoryModel": {"missing": "error"},
    "_ANEModel": {"missing": "error"},
    "_ANERequest": {"missing": "error"},
    "_ANEIOSurfaceObject": {"missing": "error"},
    "_ANEDeviceInfo": {"missing": "same"},
    "dlopen": {"nil": "error", "hang": "error"},
    "hasANE": {"missing": "same", "nil": "error", "throw": "error", "hang": "error"},
    "aneSubType": {"missing": "same", "nil": "same", "throw": "error", "hang": "error"},
    "NSTemporaryDirectory": {"nil": "same"},  # the first one looks for what killed runs left
    "dataWithContentsOfFile:options:error:": {"refuse": "error", "silent": "error"},
    "modelWithMILText:weights:optionsPlist:": {"nil": "error"},
    "inMemoryModelWithDescriptor:": {"nil": "error"},
    "setModelURL:": {},
    "compiledModelExists": {"lie": "same"},
    "purgeCompiledModel": {},
    "compileWithQoS:options:error:": {"refuse": "same", "silent": "same"},
    "loadWithQoS:options:error:": {"refuse": "same", "silent": "same", "lie": "same"},
    "unloadWithQoS:error:": {"refuse": "error", "silent": "error"},
    "evaluateWithQoS:options:request:error:": {"refuse": "error", "silent": "error"},
    "modelAttributes": {"nil": "same", "lie": "same"},
    "model": {"nil": "same"},
    "inputSymbolIndicesForProcedureIndex:": {"nil": "same", "lie": "same"},
    "outputSymbolIndicesForProcedureIndex:": {"nil": "same", "lie": "same"},
    "objectWithIOSurface:": {"nil": "error"},
    REQUEST: {"nil": "error"},
    "IOSurfaceCreate": {"nil": "error", "lie": "error"},
    "IOSurfaceGetBaseAddress": {"nil": "error"},
    "IOSurfaceLock": {"refuse": "error"},
    "IOSurfaceUnlock": {"refuse": "error"},
}
SOURCES = sorted((apple.LIBSRC / "device" / "ane").glob("*.m"))
# Never executed: memory, a thread or a folder that the system refuses; what a forked child does,
# which leaves without a profile; exceptions of C++, which GNUstep's runtime does not catch; and a
# net below another: a device that failed reads nothing any more. Lines without a text belong to
# these.
UNCOVERED = (
    "no memory for",
    "no thread for",
    "an exception of C++",
    "device ane: cannot create %.300s",
    "forked",
    "open it here",
    "holds no result",
    "program that writes it",
)
PRIVATE = list(FAULTS)[list(FAULTS).index("modelWithMILText:weights:optionsPlist:") :]
for call in PRIVATE:
    if not call.startswith("IOSurface"):
        FAULTS[call] |= {"missing": "error", "throw": "error", "hang": "error"}

# Engines that would compute something else, or nothing, and what is said of them.
REFUSED: list[tuple[dict[str, int], str]] = [
    ({"framework": 0}, "AppleNeuralEngine.framework does not open"),
    ({"engine": 0}, "no Neural Engine"),
    ({"family": 12}, r"family h12 takes no MIL programs, h13 \(M1\) is the first"),
    ({"attributes": 0}, "the loaded program does not name its inputs"),
    (
        {"equal": 1},
        "evaluating: procedure000: .*status=0x1d : statusType=0x9: sizes of surfaces differ",
    ),
    ({"rename": 1}, "input 0 of the loaded program is not one of its.* the program is in"),
    ({"stride": 1}, r"256 bytes between channels of a_in, not 128"),
    ({"wide": 1}, r"w1_wq does not fit its surface"),
    ({"loads": 0}, "does not load: com.apple.appleneuralengine 6: createProgram"),
    ({"files": 0}, r"does not load: \S+ 10 \(macOS 27 loads programs with one weight file only\)"),
    ({"padded": 1}, r"procedure000: \S+ 42 \(a surface is too small for rows padded to 64 bytes\)"),
    ({"types": 1}, r"has another -\[_ANEModel inputSymbolIndicesForProcedureIndex:\]"),
]

Runner = Callable[..., Any]


def run_child(
    library: Path, folder: Path, *command: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ane_child.py on a library, with a temporary folder of its own."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, CHILD, *command],
        env={
            **os.environ,
            "ANEPY_LIB": str(library),
            "TMPDIR": str(temporary),
            "LLVM_PROFILE_FILE": str(folder / "%p.profraw"),
            **env,
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture
def child(ane_library: Path, tmp_path: Path) -> Runner:
    """Return a function that calls a command of ane_child.py in a process of its own."""

    def call(command: str, **options: Any) -> Any:
        result = run_child(ane_library, tmp_path, command, json.dumps(options))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return call


def check_same(child: Runner, device: str = "ane", **options: Any) -> dict[str, Any]:
    """Train on the stand-in engine and on the simulator; both must give the same bits."""
    settings = options.pop("settings", {})
    seen = child("train", device=device, settings=settings, **options)
    expected = child("train", device="sim", **options)
    assert {key: seen[key] for key in CLEAN} == CLEAN
    assert seen["digest"] == expected["digest"]
    return seen


def test_tiny_model_trains_like_on_the_simulator(child: Runner) -> None:
    seen = check_same(child, model=GQA, updates=3)
    assert seen["compiles"] == 4  # one text for all programs, at the start and after each update


@pytest.mark.parametrize("variant", ["opt", "dynamic", "opt+metal_dw", "resident"])
def test_biases_train_like_on_the_simulator(child: Runner, variant: str) -> None:
    check_same(child, model=BIASES, variant=variant)


@pytest.mark.parametrize("variant", ["baseline", "max", "dynamic", "opt+metal_dw", "resident"])
def test_norms_of_heads_train_like_on_the_simulator(child: Runner, variant: str) -> None:
    check_same(child, model=NORMS, variant=variant)


@pytest.mark.parametrize("variant", ["baseline", "max", "dynamic", "opt+metal_dw", "resident"])
def test_frozen_tensors_train_like_on_the_simulator(child: Runner, variant: str) -> None:
    freeze = ["layers.0.*", "*.wk.weight", "*.w1.weight", "tok_embeddings*"]
    seen = check_same(child, model=BIASES, variant=variant, freeze=freeze)
    assert seen["digest"] != check_same(child, model=BIASES, variant=variant)["digest"]


@pytest.mark.parametrize("targets", ["wq,wk,wv,wo,w1,w2,w3", "wv,wo"])
@pytest.mark.parametrize("variant", ["baseline", "max", "dynamic", "double-buffer", "resident"])
def test_adapters_train_like_on_the_simulator(child: Runner, variant: str, targets: str) -> None:
    lora = {"rank": 5, "targets": targets}
    seen = check_same(child, model=NORMS, variant=variant, lora=lora, updates=3)
    assert seen["compiles"] == 1  # one text for all programs, at the start


@pytest.mark.parametrize("variant", ["max", "max+dynamic_weights"])
def test_large_vocabulary_trains_like_on_the_simulator(child: Runner, variant: str) -> None:
    """Of more tokens than a program may have channels: the host takes the soft-max."""
    check_same(child, model=[32, 48, 1, 2, 2, 70000, 64], variant=variant)


def test_dim_768_trains_like_on_the_simulator(child: Runner) -> None:
    check_same(child, model=WIDE, updates=1, seq=128)


def test_stories_model_trains_like_on_the_simulator(child: Runner) -> None:
    check_same(child, model=str(needs.data("stories260K.bin")), updates=1, seq=256)


@pytest.mark.parametrize(
    "variant",
    [
        "baseline",
        "opt",
        "ane",
        "dynamic",
        "double-buffer",
        "max",
        "max+dynamic_weights",
        "max-dynamic_weights",
        "baseline+offload_rmsnorm",
        "baseline+offload_classifier",
        "baseline+offload_softmax",
        "opt+metal_dw",
        "baseline+metal_dw",
        "dynamic+metal_dw",
        "resident",
        "resident-fused_layer",
        "baseline+offload_dw",
        "max+fused_layer",
        "baseline+offload_dw+metal_dw",
    ],
)
def test_variants_train_like_on_the_simulator(child: Runner, variant: str) -> None:
    check_same(child, model=GQA, variant=variant)


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({"shuffle": 1}, "ane"),  # procedures numbered otherwise
        ({"reverse": 1, "suffix": 0}, "ane"),
        ({"attributes": 0}, "ane"),  # a program that says nothing: one surface, one place
        ({"dialect": 10}, "ane"),
        ({"procedures": 0}, "ane"),
        ({"rename": 3}, "ane"),  # procedure000@default
        ({"rename": 2}, "ane"),  # functions under other names: a text for each program then
        ({"procedures": 0, "dialect": 10}, "ane"),
        ({"family": 13}, "ane"),
        ({"family": 17}, "ane:surface=131072"),
        ({}, "ane:dialect=1.0,procedures=no,reuse=no"),
        ({}, "ane:dialect=1.3,budget=9,timeout=60000"),
    ],
    ids=str,
)
def test_engines_that_differ_give_the_same_results(
    child: Runner, settings: dict[str, int], device: str
) -> None:
    check_same(child, device, model=TINY, settings=settings, variant="baseline")


@pytest.mark.parametrize(
    "settings",
    [{"reverse": 1}, {"shuffle": 1, "suffix": 0}, {"reverse": 1, "procedures": 0}],
    ids=str,
)
def test_live_weights_are_bound_by_name(child: Runner, settings: dict[str, int]) -> None:
    """Programs with several inputs: the order they are declared in is not the engine's."""
    for variant in ("dynamic", "resident"):
        check_same(child, model=TINY, settings=settings, variant=variant)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_engine_that_would_be_wrong_is_refused(
    child: Runner, settings: dict[str, int], message: str
) -> None:
    model = LARGER if {"equal", "wide"} & set(settings) else TINY
    seen = child("refused", device="ane", settings=settings, model=model, variant="dynamic")
    assert re.search(message, seen["error"]), seen["error"]
    assert {key: seen[key] for key in CLEAN} == CLEAN
    kept = re.search(r"the program is in (\S+)", seen["error"])
    assert seen["kept"] == ([Path(kept.group(1)).name] if kept else [])


def test_identical_programs_do_not_disturb_each_other(child: Runner) -> None:
    """The second one is loaded from what the first has compiled, and outlives it."""
    seen = child("twins", model=TINY)
    assert seen["compiles"] == [1, 0] and seen["folders_open"] == 2
    assert seen["after"] == seen["before"]
    assert {key: seen[key] for key in CLEAN} == CLEAN


def test_budget_ends_training_before_anything_is_compiled(child: Runner) -> None:
    seen = child("budget", model=TINY)
    assert seen["name"] == "CompileBudgetError"
    assert "has made 3 of the 3 it may" in seen["error"]
    assert seen["calls"] == 3
    assert {key: seen[key] for key in CLEAN} == CLEAN


def test_forked_process_is_refused_and_its_parent_goes_on(child: Runner) -> None:
    seen = child("fork", model=TINY)
    assert "before this process was forked" in seen["child"]
    assert seen["after"] == seen["before"]
    assert {key: seen[key] for key in CLEAN} == CLEAN


def test_folders_of_killed_processes_are_removed(
    ane_library: Path, child: Runner, tmp_path: Path
) -> None:
    mine = tmp_path / "tmp" / f"anepy-{os.getpid()}-abcdef"
    others = tmp_path / "tmp" / "anepy-notes"
    for folder in (mine, others):
        folder.mkdir(parents=True)
    result = run_child(ane_library, tmp_path, "die", "{}")
    assert result.returncode == -9 and len(list((tmp_path / "tmp").iterdir())) == 3
    assert child("train", device="ane", model=TINY)["folders"] == [mine.name, others.name]


@pytest.mark.parametrize(("reverse", "difference"), [(0, 1.0), (1, -1.0)])
def test_text_on_its_own_meets_the_engine_as_it_is(
    child: Runner, reverse: int, difference: float
) -> None:
    """Slots are the engine's, so a probe sees its order; sizes and weights are the caller's."""
    seen = child("trial", settings={"reverse": reverse})
    assert seen["sub"] == difference
    assert (seen["compiled"], seen["again"]) == (True, False)
    assert "status=0x1d" in seen["small"] and "size of a surface" in seen["small"]
    assert (seen["before"], seen["after"]) == (16.0, 16.0)
    assert "loading again" in seen["reload"] and "as told" in seen["reload"]
    assert "the program is refused" in seen["refused"]
    assert "is not @model_path/weights/NAME" in seen["name"]
    assert "38 surfaces, 36 are the most" in seen["many"]
    # Where one weight file loads only, several become one: 32 * 0.25 * 32 * 0.5.
    assert (seen["packed"], seen["packed after"]) == (128.0, 128.0)
    assert {key: seen[key] for key in CLEAN} == CLEAN


def test_temporary_folder_that_cannot_be_written_is_named(child: Runner) -> None:
    seen = child("damage", model=TINY)
    assert "cannot create a folder in" in seen["missing"] and "/missing: No" in seen["missing"]
    assert "cannot write" in seen["full"] and "model.mil: File too large" in seen["full"]
    assert {key: seen[key] for key in CLEAN} == CLEAN


def command_line(
    library: Path, folder: Path, *words: str | Path
) -> subprocess.CompletedProcess[str]:
    (folder / "tmp").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-m", "anepy", *words],
        env={
            **os.environ,
            "ANEPY_LIB": str(library),
            "ANEPY_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "tmp"),
            "LLVM_PROFILE_FILE": str(folder / "%p.profraw"),
        },
        cwd=toolchain.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_training_on_the_command_line_goes_on_beyond_the_budget(
    ane_library: Path, tmp_path: Path
) -> None:
    """Restarts included, the trained model is the simulator's, byte for byte."""
    made = tmp_path / "fresh.bin"
    Model.init(ModelConfig(*TINY[:5], 300, 64), seed=3).save(made)
    data = tmp_path / "data.bin"
    ids = np.random.default_rng(0).integers(0, 300, 2000)
    ids.astype("<u2").tofile(data)
    saved = {}
    for device in ("ane:budget=3", "sim"):
        saved[device] = tmp_path / f"{device[:3]}.bin"
        result = command_line(
            ane_library, tmp_path, "train", made, "--data", data, "--steps", "6", "--accum", "1",
            "--seq", "64", "--lr", "1e-2", "--variant", "baseline", "--device", device,
            "--save", saved[device], "--checkpoint", tmp_path / f"{device[:3]}.npz",
        )  # fmt: skip
        assert ("new process" in result.stdout + result.stderr) == ("budget" in device)
    assert saved["ane:budget=3"].read_bytes() == saved["sim"].read_bytes()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_probes_find_the_engine_as_it_should_be(ane_library: Path, tmp_path: Path) -> None:
    result = command_line(ane_library, tmp_path, "probe", "--device", "ane", "--json")
    report = json.loads(result.stdout)
    assert len(report["probes"]) > 15
    assert {probe["verdict"] for probe in report["probes"]} == {"ok"}
    assert list((tmp_path / "tmp").iterdir()) == []


def test_files_are_private_while_they_are_there(child: Runner) -> None:
    seen = child("modes", model=TINY)
    assert seen["modes"] == {"": "700", "model.mil": "600", "weights": "700",
                             "weights/weight.bin": "600"}  # fmt: skip


def check_records(records: list[dict[str, Any]], baseline: bool = True) -> Iterator[str]:
    """Yield what is wrong with the outcome of any injected fault."""
    for record in records:
        call, kind, nth = record["call"], record["kind"], record["nth"]
        about = f"{call} {kind} {nth}: {record}"
        allowed = {"error", "same", "recovered"} if nth > 1 else {"error", "same"}
        stated = baseline and (kind == "missing" or nth == 1)
        expected = FAULTS[call][kind] if stated else None
        if record["outcome"] not in allowed or expected not in (None, record["outcome"]):
            yield f"outcome: {about}"
        if record["outcome"] != "same" and "device ane" not in record["text"]:
            yield f"sentence: {about}"
        if kind == "missing" and expected == "error" and call not in record["text"]:
            yield f"not named: {about}"
        if record["hits"] < 1:
            yield f"did not happen: {about}"
        # What never came back, or threw, could not be unloaded.
        rule = record.pop("broken_rule")
        if rule and (kind not in ("hang", "throw") or "without unloading" not in rule):
            yield f"rule: {about}: {rule}"
        if any(record[key] for key in ("objects", "live", "loaded", "folders")):
            yield f"left behind: {about}"
        refused = "the program is in" in record["text"]
        if bool(record["kept"]) != refused:
            yield f"kept: {about}"


NAMES = {"settings": {"rename": 2}, "variant": "baseline"}


def selection(variant: str = "baseline") -> str:
    kinds = {call: list(kinds) for call, kinds in FAULTS.items()}
    return json.dumps({"selected": kinds, "variant": variant})


@pytest.fixture(scope="module")
def fault_run(
    ane_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tmp" / "anepy-999999999-abcdef").mkdir(parents=True)  # of a process that is gone
    result = run_child(ane_library, folder, "faults", selection())
    assert result.returncode == 0, result.stderr
    # What only other tests reach, once more for the coverage.
    for settings, _ in REFUSED:
        options = {"device": "ane:timeout=9000", "settings": settings, "model": LARGER}
        run_child(ane_library, folder, "refused", json.dumps({**options, "variant": "dynamic"}))
    for command in ("fork", "damage", "twins"):
        run_child(ane_library, folder, command, json.dumps({"model": TINY}))
    run_child(ane_library, folder, "trial")
    run_child(ane_library, folder, "train", json.dumps({"device": "ane", "model": TINY, **NAMES}))
    return folder, json.loads(result.stdout)


def test_every_fault_of_every_call_is_an_error_that_leaves_nothing(
    fault_run: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, records = fault_run
    assert len(records) > 250
    assert list(check_records(records)) == []


@pytest.mark.parametrize("variant", ["max+dynamic_weights", "max+background_compile", "resident"])
def test_faults_of_other_variants_are_errors_as_well(
    ane_library: Path, tmp_path: Path, variant: str
) -> None:
    result = run_child(ane_library, tmp_path, "faults", selection(variant))
    assert result.returncode == 0, result.stderr
    assert list(check_records(json.loads(result.stdout), baseline=False)) == []


def test_all_calls_are_covered(child: Runner) -> None:
    assert sorted(child("names")) == sorted(FAULTS)


def sanitizer(name: str) -> str:
    """Return the sanitizer as a library, for a Python that is not built with it."""
    file = f"libclang_rt.{name}-{platform.machine()}.so"
    runtime = toolchain.run([gnustep.compiler(), f"-print-file-name={file}"]).stdout.strip()
    return str(needs.file(Path(runtime), file, "libclang-rt-19-dev"))


def test_faults_touch_no_foreign_memory_and_leak_none(tmp_path: Path) -> None:
    """The same faults under AddressSanitizer."""
    runtime = sanitizer("asan")
    library = apple.build(tmp_path, ("--asan", "--ubsan"))
    result = run_child(
        library, tmp_path, "faults", selection(),
        LD_PRELOAD=runtime, PYTHONMALLOC="malloc",
        ASAN_OPTIONS="detect_leaks=1", LSAN_OPTIONS="exitcode=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert list(check_records(json.loads(result.stdout))) == []
    # Leaks of the interpreter are reported as well; ours have the library in their stack.
    assert "LeakSanitizer" in result.stderr
    leaks = re.split(r"\n\n", result.stderr)
    assert [leak for leak in leaks if "libanepy.so" in leak and "leak of" in leak] == []


def test_threads_share_nothing_unguarded(tmp_path: Path) -> None:
    """Compiling beside evaluations, and calls that come back late, under ThreadSanitizer."""
    runtime = sanitizer("tsan")
    library = apple.build(tmp_path, ("--tsan",))
    late = {call: ["hang"] for call, kinds in FAULTS.items() if "hang" in kinds}
    commands = [
        ("train", {"device": "ane", "model": GQA, "variant": "double-buffer"}),
        ("faults", {"selected": late, "variant": "max+background_compile"}),
    ]
    for command, options in commands:
        result = run_child(
            library, tmp_path, command, json.dumps(options),
            LD_PRELOAD=runtime, TSAN_OPTIONS="exitcode=0",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        # GNUstep's locks, which are not instrumented, are reported for their order.
        assert "data race" not in result.stderr, result.stderr[:4000]


def test_sources_of_the_device_are_covered(
    ane_library: Path, fault_run: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """At least 95 % of the lines; tests/README.md says which are not, and why."""
    folder, _ = fault_run
    suffix = gnustep.compiler().removeprefix("clang")
    merged = tmp_path / "merged"
    raw = sorted(folder.glob("*.profraw"))
    toolchain.run([needs.program(f"llvm-profdata{suffix}"), "merge", "-o", merged, *raw])
    cover = needs.program(f"llvm-cov{suffix}")
    words = [ane_library, f"-instr-profile={merged}", *SOURCES]
    summary = json.loads(toolchain.run([cover, "export", "-summary-only", *words]).stdout)
    files = {Path(entry["filename"]) for entry in summary["data"][0]["files"]}
    assert set(SOURCES) <= files
    shown = toolchain.run([cover, "show", *words]).stdout
    missed = re.findall(r"^ *\d+\| +0\|(.*)$", shown, re.MULTILINE)
    unknown = [
        line for line in missed if '"' in line and not any(text in line for text in UNCOVERED)
    ]
    assert unknown == []
    assert summary["data"][0]["totals"]["lines"]["percent"] >= 95.0
