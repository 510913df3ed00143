"""Weight gradients on the GPU: device/metal as it is, against a stand-in for Metal (standin/metal).

The stand-in computes late and on another thread, and says when memory was reused too early, was not
aligned, or was described wrongly. `check.c` there holds the checks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import needs
import pytest
from ckernels import gnustep, mutate, toolchain

from anepy import Engine, Model, ModelConfig
from anepy.errors import AnepyError

pytestmark = needs.LINUX  # a Mac has the real one

LIBSRC = toolchain.ROOT / "libsrc"
METAL = LIBSRC / "device" / "metal" / "metal.m"
FOLDER = gnustep.STANDIN / "metal"
NATIVE = [toolchain.ROOT / "tests" / "ckernels" / name for name in ("check.c", "fixture.c")]
# Where the look-ups by name of the library arrive.
NAMES = ["-Ddlsym=gpu_dlsym", "-DNSClassFromString=gpu_class"]
COVERAGE = ["-fprofile-instr-generate", "-fcoverage-mapping"]
# Never executed: memory that the system refuses, and a matrix the engine forgot to announce.
UNCOVERED = ("no memory for", "is not in memory shared")


@dataclass(frozen=True)
class Program:
    """The checks, and all that is needed to build them again with one file changed."""

    path: Path
    compiler: str
    flags: list[str]
    objc: list[str]
    objects: dict[Path, Path]
    link: list[str]


def build(folder: Path, options: Sequence[str] = (), extra: Sequence[str] = ()) -> Program:
    """Build with the options of build_lib.sh and further flags for the device and for linking."""
    compiler = gnustep.compiler()
    flags = toolchain.script_flags(folder, "--werror", *options)
    objc = [*gnustep.objc_flags(folder), f"-I{FOLDER}"]
    objects: dict[Path, Path] = {}

    def compile_all(sources: list[Path], more: list[str]) -> None:
        made = toolchain.compile_files(compiler, [*flags, *more], sources, folder)
        objects.update(zip(sources, made, strict=True))

    compile_all(toolchain.library_sources(), [])
    compile_all([METAL], [*objc, *NAMES, *extra])
    compile_all(sorted(FOLDER.glob("*.m")), objc)
    compile_all([*sorted(FOLDER.glob("*.c")), *NATIVE], ["-Itests/ckernels", f"-I{FOLDER}"])
    link = [flag for flag in [*flags, *extra] if flag.startswith(("-fsanitize=", "-fprofile-in"))]
    return finish(Program(folder / "run", compiler, flags, objc, objects, link))


def finish(program: Program) -> Program:
    words = [*program.link, "-pthread", *program.objects.values(), "-o", program.path]
    toolchain.run([program.compiler, *words, *gnustep.LIBRARIES])
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build(tmp_path_factory.mktemp("metal"))


def assert_passes(*command: str | Path, env: dict[str, str] | None = None) -> None:
    result = toolchain.run(command, env=env, check=False)
    output = result.stdout + result.stderr
    summary = re.search(r"^(\d+) checks, 0 failures$", output, re.MULTILINE)
    assert result.returncode == 0 and summary and int(summary[1]) > 100, output[-6000:]
    assert "stand-in:" not in output


@pytest.mark.parametrize("group", ["numbers", "steady", "faults"])
def test_products_on_the_gpu_are_right_and_keep_the_rules(program: Program, group: str) -> None:
    if group == "steady":
        assert "0 failures" in toolchain.run([program.path, group]).stdout
    else:
        assert_passes(program.path, group)


def test_checks_leak_nothing_and_execute_every_line(tmp_path: Path) -> None:
    made = build(tmp_path, ["--asan", "--ubsan"], COVERAGE)
    profile, merged = tmp_path / "raw", tmp_path / "merged"
    assert_passes(made.path, env={"LLVM_PROFILE_FILE": str(profile)})
    suffix = made.compiler.removeprefix("clang")
    toolchain.run([needs.program(f"llvm-profdata{suffix}"), "merge", "-o", merged, profile])
    cover = needs.program(f"llvm-cov{suffix}")
    words = [made.path, f"-instr-profile={merged}", METAL]
    summary = json.loads(toolchain.run([cover, "export", "-summary-only", *words]).stdout)
    assert summary["data"][0]["totals"]["lines"]["percent"] >= 95.0
    shown = toolchain.run([cover, "show", *words]).stdout
    missed = re.findall(r"^ *\d+\| +0\|(.*)$", shown, re.MULTILINE)
    unknown = [
        line for line in missed if '"' in line and not any(text in line for text in UNCOVERED)
    ]
    assert unknown == []


def flags_of(program: Program, source: Path) -> list[str]:
    return [*program.flags, *([*program.objc, *NAMES] if source == METAL else [])]


def broken(program: Program, made: list[Path], folder: Path) -> Path:
    objects = dict(zip(program.objects, made, strict=True))
    return finish(dataclasses.replace(program, path=folder / "run", objects=objects)).path


@pytest.mark.parametrize("mutation", mutate.of("metal"), ids=lambda mutation: mutation.name)
def test_checks_of_a_broken_library_fail(
    program: Program, tmp_path: Path, mutation: mutate.Mutation
) -> None:
    made = mutate.rebuilt(
        [mutation], program.objects, program.compiler, partial(flags_of, program), tmp_path
    )
    path = broken(program, made, tmp_path)
    assert toolchain.run([path, *mutation.groups], check=False).returncode != 0


# --------------------------------------------------------------------------- without a Metal GPU


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_switch_elsewhere_says_what_it_needs(device: str) -> None:
    config = ModelConfig(
        dim=16, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=32, seq_len=8
    )
    with pytest.raises(AnepyError) as caught:
        Engine(Model.init(config, seed=0), variant="opt+metal_dw", device=device)
    words = "'opt+metal_dw': switch metal_dw cannot be used: this build has no Metal"
    assert words in str(caught.value) and "macOS" in str(caught.value)
    assert "\n" not in str(caught.value)
