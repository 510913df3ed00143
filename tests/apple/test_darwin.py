"""How threads are counted and started on macOS: runtime/ as it compiles there, run on Linux."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest
from ckernels import toolchain

pytestmark = needs.LINUX  # a Mac has the real one

FOLDER = Path(__file__).with_name("standin") / "darwin"
PERFORMANCE, ALL = "hw.perflevel0.physicalcpu", "hw.physicalcpu"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("darwin")
    compiler = needs.program(*needs.CLANGS, "gcc", "cc")
    flags = [*toolchain.script_flags(folder, "--werror"), "-D__APPLE__", f"-I{FOLDER}"]
    sources = [*sorted((toolchain.ROOT / "libsrc" / "runtime").glob("*.c")), FOLDER / "check.c"]
    objects = toolchain.compile_files(compiler, flags, sources, folder)
    return toolchain.link(compiler, [], objects, folder / "run")


@pytest.mark.parametrize(
    ("known", "cores", "bf16"),
    [
        ([f"{PERFORMANCE}=4", f"{ALL}=8", "hw.optional.arm.FEAT_BF16=0"], 4, 0),  # M1
        ([f"{PERFORMANCE}=12", f"{ALL}=16", "hw.optional.arm.FEAT_BF16=1"], 12, 1),  # M4 Max
        ([f"{ALL}=6"], 6, 0),  # no levels: Intel
        ([f"{PERFORMANCE}=0", f"{ALL}=2"], 2, 0),
        ([], 1, 0),
    ],
)
def test_threads_are_the_performance_cores_at_user_initiated_qos(
    program: Path, known: list[str], cores: int, bf16: int
) -> None:
    shown = toolchain.run([program, *known], env={"ANEPY_NUM_THREADS": ""}).stdout.split()
    assert [int(word) for word in shown] == [cores, cores, bf16, cores - 1, cores - 1, 0]


def test_environment_wins_over_the_performance_cores(program: Path) -> None:
    words = [f"{PERFORMANCE}=4", f"{ALL}=8"]
    shown = toolchain.run([program, *words], env={"ANEPY_NUM_THREADS": "3"}).stdout.split()
    assert shown == ["4", "3", "0", "2", "2", "0"]
