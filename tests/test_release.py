"""What `.ci/release.py` makes, as a user without a compiler has it; and that its gate closes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import binary
import children
import needs
import pytest
from http_server import Answer, FileServer

import anepy
from anepy.native import build, find

pytestmark = needs.LINUX

SCRIPT = needs.CHECKOUT / ".ci" / "release.py"
TAG = find.platform_tag()
# What installing and running take; no compiler among it.
TOOLS = ("bash", "env", "uname", "getconf", "sh")


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a release of this platform."""
    for name in ("ziglang", "hatchling"):
        needs.module(name)
    for tool in ("readelf", "objdump"):
        needs.program(tool, package="binutils")
    out = tmp_path_factory.mktemp("release") / "dist"
    command = [sys.executable, SCRIPT, out, "--target", TAG, "--base-url", "https://example.org/v0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=children.PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TAG}: " in done.stdout and "all checks passed" in done.stdout
    return out


@dataclass(frozen=True)
class Machine:
    """An environment with a wheel in it, on a PATH without compilers, with an empty cache."""

    folder: Path

    def run(self, *words: object, code: int = 0, **settings: str) -> tuple[str, str]:
        """Run the installed `anepy`; return what it printed on both streams."""
        usual = {"HOME": str(self.folder), "PATH": str(self.folder / "tools"), "LANG": "C.UTF-8"}
        done = subprocess.run(
            [self.folder / "bin" / "anepy", *map(str, words)],
            cwd=self.folder,
            env={**usual, "ANEPY_CACHE": str(self.folder / "cache"), **settings},
            capture_output=True,
            text=True,
            timeout=children.PATIENCE,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    @property
    def package(self) -> Path:
        """Return where the package is installed."""
        (found,) = self.folder.glob("lib/python*/site-packages/anepy")
        return found


@pytest.fixture
def machine(request: pytest.FixtureRequest, released: Path, tmp_path: Path) -> Machine:
    """Install the wheel whose name ends so; its five packages are those of these tests."""
    needs.module("ensurepip")
    (wheel,) = released.glob(f"*{request.param}.whl")
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Links to the five packages and what they need, not the folder: it may hold ziglang.
    (packages / "shared").mkdir()
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for entry in path.iterdir():
                link = packages / "shared" / entry.name
                if not entry.name.startswith(("ziglang", "anepy", "_")) and not link.exists():
                    link.symlink_to(entry)
    (packages / "shared.pth").write_text(str(packages / "shared"))
    (folder / "tools").mkdir()
    for name in TOOLS:
        (folder / "tools" / name).symlink_to(needs.program_path(name))
    return Machine(folder)


PLATFORM = f"{'manylinux_2_17' if TAG.endswith('glibc') else 'musllinux_1_2'}_{TAG.split('-')[1]}"
platform_wheel = pytest.mark.parametrize("machine", [PLATFORM], indirect=True)
pure_wheel = pytest.mark.parametrize("machine", ["none-any"], indirect=True)


def test_release_is_archive_wheels_library_and_sums(released: Path) -> None:
    names = {path.name for path in released.iterdir()}
    version = anepy.__version__
    loose = f"libanepy-{version}-{TAG}.so"
    assert {f"anepy-{version}.tar.gz", f"anepy-{version}-py3-none-any.whl", loose} < names
    assert len(names) == 5
    for line in (released / "SHA256SUMS").read_text().splitlines():
        sha256, name = line.split("  ")
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == sha256


def test_wheels_pin_the_library_and_the_archive_does_not(released: Path) -> None:
    loose = (released / f"libanepy-{anepy.__version__}-{TAG}.so").read_bytes()
    for wheel in released.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            record = json.loads(archive.read("anepy/native/release.json"))
            names = archive.namelist()
        assert record["version"] == anepy.__version__
        assert record["sources"] == build.source_hash(needs.CHECKOUT)
        assert record["files"][TAG]["sha256"] == hashlib.sha256(loose).hexdigest()
        inside = f"anepy/_lib/{TAG}/libanepy.so" in names
        assert inside == ("none-any" not in wheel.name)
    (source,) = released.glob("*.tar.gz")
    listed = subprocess.run(["tar", "-tzf", source], check=True, capture_output=True, text=True)
    assert "anepy/native/find.py" in listed.stdout and "release.json" not in listed.stdout


@platform_wheel
def test_platform_wheel_trains_without_compiler_and_network(machine: Machine) -> None:
    words = ["train", "--steps", 2, "--eval-windows", 1, "--no-checkpoint", "--json"]
    out, err = machine.run(*words, ANEPY_OFFLINE="1")
    assert json.loads(out)["summary"]["step"] == 2
    assert "compiling" not in err and "download" not in err
    report = json.loads(machine.run("lib", "verify", "--json")[0])
    assert report["ok"] is True and report["reason"] == "has the pinned SHA-256"
    assert not (machine.folder / "cache").exists()
    # Damaged, it is named in one line and not opened.
    library = Path(report["path"])
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    _, err = machine.run("train", "--steps", 1, code=1, ANEPY_OFFLINE="1")
    first, last = err.splitlines()
    assert first == f"anepy: {library} is damaged: it does not have the pinned SHA-256"
    assert "no native library" in last
    record = machine.package / "native" / "release.json"
    record.write_text(record.read_text().replace(anepy.__version__, "9.9.9", 1))
    _, err = machine.run("train", "--steps", 1, code=1)
    assert err.count("\n") == 1 and "is of anepy 9.9.9" in err


@pure_wheel
def test_pure_wheel_fetches_verifies_and_trains(machine: Machine, released: Path) -> None:
    name = f"libanepy-{anepy.__version__}-{TAG}.so"
    with FileServer() as server:
        server.answers = {f"/{name}": [Answer((released / name).read_bytes())]}
        mirror = {"ANEPY_MIRROR": server.url("")}
        out, err = machine.run("lib", "fetch", **mirror)
        assert out.endswith("/release/libanepy.so\n") and "(ANEPY_MIRROR)" in err
        assert server.requests == [f"/{name}"]
    report = json.loads(machine.run("lib", "verify", "--json")[0])
    assert report["ok"] is True and report["pinned_sha256"] == report["sha256"]
    words = ["train", "--steps", 2, "--eval-windows", 1, "--no-checkpoint", "--json"]
    out, err = machine.run(*words, ANEPY_OFFLINE="1")
    assert json.loads(out)["summary"]["step"] == 2 and "compiling" not in err


BITS = """
import hashlib
import numpy as np
import anepy
from anepy.native.info import library_info

config = anepy.ModelConfig(64, 172, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=256, seq_len=64)
for precision in ("fp32", "bf16"):
    if precision == "bf16" and not library_info()["isa"].endswith("bf16"):
        continue
    model, text = anepy.Model.init(config, seed=0), np.random.default_rng(0)
    digest = hashlib.sha256()
    with anepy.Engine(model, precision=precision, threads=2) as engine:
        for _ in range(5):
            ids = text.integers(0, 256, 65).astype(np.uint16)
            digest.update(repr(engine.step(ids[:64], ids[1:]).loss).encode())
            for name in sorted(model.weights):
                digest.update(np.ascontiguousarray(engine.gradients[name]).tobytes())
            engine.update(lr=1e-3)
    for name in sorted(model.weights):
        digest.update(np.ascontiguousarray(model.weights[name]).tobytes())
    print(library_info()["isa"], precision, digest.hexdigest())
"""


@needs.X86
def test_released_library_computes_the_bits_of_gcc(released: Path, tmp_path: Path) -> None:
    """Losses, gradients, updated weights: plain x86-64 has no fused products to choose freely.

    AArch64 has: what `-ffp-contract=fast` joins is each compiler's own choice there.
    """
    found = {}
    subprocess.run(
        [needs.CHECKOUT / "build_lib.sh", "--quiet", "--out", tmp_path],
        env={**os.environ, "CC": needs.program("gcc")},
        check=True,
    )
    loose = released / f"libanepy-{anepy.__version__}-{TAG}.so"
    for library in (tmp_path / "libanepy.so", loose):
        done = [
            children.run("-c", BITS, ANEPY_LIB=str(library), ANEPY_CPU_MASK=mask)
            for mask in needs.KERNEL_SETS
        ]
        assert all(each.returncode == 0 for each in done), done
        found[library] = [each.stdout for each in done]
    one, other = found.values()
    assert one == other and len(one) == len(needs.KERNEL_SETS) and "scalar fp32" in one[-1]


def test_gate_names_every_fault_of_a_bad_library(tmp_path: Path) -> None:
    needs.program("readelf", "objdump", package="binutils")
    source = tmp_path / "bad.c"
    source.write_text(
        "#include <stdio.h>\n"
        'const char *where = "/tmp/builder/libsrc/x.c";\n'
        "int anepy_extra(void) { return printf(where); }\n"
        "void sum(float *x) { for (int i = 0; i < 64; i++) x[i] += 1; }\n"
    )
    path = tmp_path / "libanepy.so"
    flags = ["-O3", "-g", "-shared", "-fPIC", "-Wl,-z,execstack,-z,lazy,-z,norelro"]
    flags += ["-mavx2"] if needs.X86_64 else []
    subprocess.run([needs.program("gcc"), *flags, source, "-o", path], check=True)
    faults = "\n".join(binary.Library(path).faults("ANEPY_API int anepy_step(void);"))
    for words in (
        "anepy_extra is exported and not declared",
        "anepy_step is not exported",
        "calls printf",
        "has no kernels for",
        "its stack is",
        "has no RELRO",
        "binds late",
        "holds /tmp/builder",
        "holds .debug_",
    ):
        assert words in faults, faults
    if needs.X86_64:
        assert re.search(r"^sum: v", faults, re.MULTILINE), faults
    assert "needs GLIBC" in "\n".join(binary.Library(path).newer_calls((2, 0)))


def test_workflow_pins_actions_and_publishes_last() -> None:
    text = (needs.CHECKOUT / ".github" / "workflows" / "release.yml").read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) for name in used)
    order = [text.index(words) for words in (".ci/run", "release.py dist", "diff -r", "gh release")]
    assert order == sorted(order)
