"""Products by Accelerate: kernels/blas_accelerate.c as it is, against a stand-in for its sgemm.

The stand-in (standin/accelerate.c) ends the program over a wrong argument, a call that may start
threads of its own, or a thread that does not get its mode back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import needs
import pytest
from ckernels import mutate, toolchain

from anepy.native.info import library_info

pytestmark = needs.LINUX  # a Mac has the real one

PROVIDER = toolchain.ROOT / "libsrc" / "kernels" / "blas_accelerate.c"
STANDIN = Path(__file__).with_name("standin") / "accelerate.c"
NAMES = [f"-D{name}=accelerate_{name}" for name in ("dlopen", "dlsym", "dlerror")]
APPLE = ["-D__APPLE__", *NAMES]
GROUPS = ("gemm", "engine", "handles")


@dataclass(frozen=True)
class Build:
    """The native checks over the stand-in, and the same as a library for Python."""

    compiler: str
    flags: list[str]
    objects: dict[Path, Path]
    program: Path
    library: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("blas")
    compiler = needs.program(*needs.CLANGS, "gcc", "cc")
    flags = toolchain.script_flags(folder, "--werror")
    sources = [path for path in toolchain.library_sources() if path != PROVIDER]
    made = toolchain.compile_files(compiler, flags, sources, folder / "library")
    made += toolchain.compile_files(compiler, [*flags, *APPLE], [PROVIDER], folder / "library")
    made += toolchain.compile_files(compiler, flags, [STANDIN], folder / "library")
    objects = dict(zip([*sources, PROVIDER, STANDIN], made, strict=True))
    checks = toolchain.compile_checks(compiler, flags, folder / "checks")
    program = toolchain.link(compiler, [], [*made, *checks], folder / "run")
    library = toolchain.link(compiler, ["-shared"], made, folder / "libanepy.so")
    objects.update(zip(toolchain.CHECKS, checks, strict=True))
    return Build(compiler, flags, objects, program, library)


def python(built: Build, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=toolchain.ROOT,
        env={**os.environ, "ANEPY_LIB": str(built.library), "PYTHONPATH": ".", **env},
        capture_output=True,
        text=True,
        timeout=toolchain.PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("missing", ["", "threading"])
def test_checks_pass_with_every_product_by_the_provider(built: Build, missing: str) -> None:
    """Any shape and stride, any number of threads, whole steps; on macOS 15 and before."""
    env = {"STANDIN_ACCELERATE": missing, "ANEPY_BLAS": "accelerate"}
    result = toolchain.run([built.program, *GROUPS], env=env, check=False)
    assert result.returncode == 0 and ", 0 failures" in result.stdout, result.stdout[-4000:]


def test_gradients_match_the_reference_with_every_product_by_the_provider(built: Build) -> None:
    """The float64 reference and the bars are those of the own kernels."""
    names = "every_tensor or longer_than_a_block or several_steps"
    result = python(built, "-m", "pytest", "-q", "tests/engine/test_gradients.py", "-k", names)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("wanted", "missing", "expected"),
    [
        ("", "", "Accelerate sgemm"),
        ("accelerate", "", "Accelerate sgemm"),
        ("own", "", "__"),
        ("", "framework", "__"),
        ("", "sgemm", "__"),
    ],
)
def test_choice_is_told(built: Build, wanted: str, missing: str, expected: str) -> None:
    code = "from anepy.native.info import library_info; print(library_info()['gemm'])"
    result = python(built, "-c", code, ANEPY_BLAS=wanted, STANDIN_ACCELERATE=missing)
    assert result.returncode == 0 and expected in result.stdout, result.stderr


def test_auto_precision_is_fp32_beside_the_provider(built: Build) -> None:
    code = (
        "import anepy; c = anepy.ModelConfig(16, 32, 1, 2, 2, 32, 8);"
        "print(anepy.Engine(anepy.Model.init(c, seed=0)).precision)"
    )
    assert python(built, "-c", code).stdout == "fp32\n"
    own = "bf16" if library_info()["isa"].endswith("bf16") else "fp32"
    assert python(built, "-c", code, ANEPY_BLAS="own").stdout == f"{own}\n"


@pytest.mark.parametrize(
    ("missing", "words"),
    [("framework", "image not found"), ("sgemm", "Accelerate has no cblas_sgemm")],
)
def test_provider_that_was_asked_for_must_be_there(built: Build, missing: str, words: str) -> None:
    code = "from anepy.native.info import library_info; library_info()"
    result = python(built, "-c", code, ANEPY_BLAS="accelerate", STANDIN_ACCELERATE=missing)
    assert result.returncode == 1 and f"ANEPY_BLAS=accelerate: {words}" in result.stderr


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("accelerate", "ANEPY_BLAS=accelerate: this build has no Accelerate (it needs macOS)"),
        ("mkl", "ANEPY_BLAS=mkl is unknown: use own or accelerate"),
    ],
)
def test_choice_elsewhere_is_refused(wanted: str, words: str) -> None:
    code = "from anepy.native.info import library_info; library_info()"
    env = {**os.environ, "ANEPY_BLAS": wanted}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=toolchain.ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and words in result.stderr
    assert "__" in library_info()["gemm"]


@pytest.mark.parametrize("mutation", mutate.of("blas"), ids=lambda mutation: mutation.name)
def test_checks_of_a_broken_provider_fail(
    built: Build, tmp_path: Path, mutation: mutate.Mutation
) -> None:
    def flags(source: Path) -> list[str]:
        return [*built.flags, *(APPLE if source == PROVIDER else [])]

    made = mutate.rebuilt([mutation], built.objects, built.compiler, flags, tmp_path)
    program = toolchain.link(built.compiler, [], made, tmp_path / "run")
    assert toolchain.run([program, *mutation.groups], check=False).returncode != 0
