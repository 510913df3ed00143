"""What importing does and does not do, and what a wheel of this checkout carries."""

from __future__ import annotations

import ast
import email
import email.message
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import children
import needs
import pytest

import anepy
from anepy.native import build, find

HOME = str(Path(anepy.__file__).resolve().parents[1])

WATCHED_IMPORT = """
import sys
seen = []
WRITING = 0o1103  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC on Linux

def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "tempfile.")):
        seen.append(event)
    elif event == "ctypes.dlopen" and "anepy" in str(arguments[0] or ""):
        seen.append(f"{event} {arguments[0]}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        seen.append(f"{event} {arguments[0]}")

sys.addaudithook(watch)
before = set(sys.modules)
"""


def run(code: str, **environment: str) -> str:
    """Run Python code in a fresh process and return what it printed."""
    settings = os.environ | {"PYTHONPATH": HOME, "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", code]
    # Not in the checkout: "-c" would put that before PYTHONPATH.
    return subprocess.run(
        command, env=settings, cwd="/", check=True, capture_output=True, text=True
    ).stdout


def test_import_touches_no_disk_no_network_no_library(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    places = {
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"),
        "ANEPY_CACHE": str(tmp_path / "cache"),
        "ANEPY_LIB": "/nonexistent/libanepy.so",
    }
    for module in ("anepy", "anepy.errors", "anepy.system.download", "anepy.native.find"):
        code = f"{WATCHED_IMPORT}import numpy\nseen.clear()\nimport {module}\nprint(seen)"
        assert run(code, **places) == "[]\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


def test_import_watch_sees_what_it_watches_for(tmp_path: Path) -> None:
    """Without this the test above could pass because the hook is blind."""
    deeds = (
        "import os, socket, ctypes\n"
        "socket.socket()\n"
        f"os.mkdir({str(tmp_path / 'folder')!r})\n"
        f"open({str(tmp_path / 'file')!r}, 'w')\n"
        "try: ctypes.CDLL('/nonexistent/libanepy.so')\n"
        "except OSError: pass\n"
    )
    seen = run(f"{WATCHED_IMPORT}import socket, ctypes\nseen.clear()\n{deeds}print(seen)")
    for event in ("socket.__new__", "os.mkdir", "open ", "ctypes.dlopen"):
        assert event in seen


@pytest.mark.parametrize("module", ["anepy", "anepy.system.download", "anepy.native.find"])
def test_import_loads_only_light_modules(module: str) -> None:
    heavy = ("requests", "urllib3", "rich", "typer", "click", "platformdirs", "torch", "asyncio")
    loaded = json.loads(run(f"import json, sys, {module}\nprint(json.dumps(list(sys.modules)))"))
    assert module in loaded
    assert set(heavy) & set(loaded) == set()


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing `anepy.compare` as a module would bind it over the function of that name."""
    code = (
        "import importlib, pkgutil, types, anepy\n"
        "for module in pkgutil.walk_packages(anepy.__path__, 'anepy.'):\n"
        "    if not module.name.startswith('anepy._'): importlib.import_module(module.name)\n"
        "values = {name: getattr(anepy, name) for name in anepy.__all__}\n"
        "print(len(values), [n for n, v in values.items() if isinstance(v, types.ModuleType)])"
    )
    assert run(code) == f"{len(anepy.__all__)} []\n"


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    """The package says twice where its names live: for imports, and for tools that read types."""
    tree = ast.parse(Path(anepy.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == anepy._HOMES


def test_every_error_is_exported() -> None:
    errors = [name for name, value in vars(anepy.errors).items() if isinstance(value, type)]
    assert len(errors) > 15 and set(errors) <= set(anepy.__all__)


def test_checkout_has_no_release_record() -> None:
    """`.ci/release.py` writes it into wheels; here it would pin files of other sources."""
    assert not (needs.CHECKOUT / "anepy" / "native" / "release.json").exists()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of this checkout in which a compiled library lies around."""
    needs.module("hatchling")
    root = tmp_path_factory.mktemp("checkout")
    for name in ("anepy", "libsrc", "tests"):
        shutil.copytree(needs.CHECKOUT / name, root / name)
    for name in ("build_lib.sh", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(needs.CHECKOUT / name, root / name)
    for name in ("anepy/_lib/linux-x86_64-glibc/libanepy.so", "anepy/__pycache__/x.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("litter")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(root / "dist")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return root / "dist" / result.stdout.split()[-1]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel as an installer that drops executable bits would."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def metadata(installed: Path, name: str) -> email.message.Message:
    (path,) = installed.glob(f"anepy-*.dist-info/{name}")
    return email.message_from_string(path.read_text("utf-8"))


def test_wheel_is_pure_python(wheel: Path, installed: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert metadata(installed, "WHEEL")["Root-Is-Purelib"] == "true"


def test_wheel_has_the_version_of_the_package(installed: Path) -> None:
    assert metadata(installed, "METADATA")["Version"] == anepy.__version__


def test_wheel_needs_exactly_the_five_packages(installed: Path) -> None:
    needed = metadata(installed, "METADATA").get_all("Requires-Dist") or []
    core = {re.split(r"[^\w-]", line)[0] for line in needed if "extra ==" not in line}
    assert core == {"numpy", "requests", "platformdirs", "rich", "typer"}


def test_wheel_carries_package_and_sources_and_nothing_else(installed: Path) -> None:
    files = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path.parts[0].partition("-")[0] for path in files} == {"anepy"}
    names = {path.as_posix() for path in files}
    assert {"anepy/py.typed", "anepy/_src/libsrc/anepy.h"} <= names
    kinds = {path.suffix for path in files if path.parts[0] == "anepy"}
    assert "anepy/comparing/report.css" in names
    assert kinds == {".py", ".css", ".typed", ".c", ".h", ".sh"} | (kinds & {".json", ".m"})


def test_wheel_script_is_executable_in_the_archive(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        mode = archive.getinfo("anepy/_src/build_lib.sh").external_attr >> 16
    assert mode & stat.S_IXUSR


def test_wheel_sources_have_the_hash_of_the_checkout(wheel: Path, installed: Path) -> None:
    """Otherwise no release file built from the checkout would count for the installed package."""
    copied = wheel.parents[1]
    code = (
        "from anepy.native import build\nfrom pathlib import Path\nimport anepy\n"
        "root = build.find_sources(Path(anepy.__file__).parent)\n"
        "print(root, build.source_hash(), sep='\\n')"
    )
    root, found = run(code, PYTHONPATH=str(installed)).splitlines()
    assert Path(root) == installed / "anepy" / "_src"
    assert found == build.source_hash(copied)
    script = ["bash", str(installed / "anepy" / "_src" / "build_lib.sh"), "--print-hash"]
    assert subprocess.run(script, check=True, capture_output=True, text=True).stdout == f"{found}\n"


def test_wheel_script_without_out_asks_for_a_folder(installed: Path) -> None:
    script = ["bash", str(installed / "anepy" / "_src" / "build_lib.sh")]
    result = subprocess.run(script, check=False, capture_output=True, text=True)
    assert result.returncode == 2 and "give --out DIR" in result.stderr


# ------------------------------------------------------------------- as a user has it: installed


@pytest.fixture(scope="session")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel with pip into a fresh environment and return its `anepy`.

    The five packages that the wheel needs come from the environment of these tests, which comes
    later on the path and from which no other .pth file is read: an editable anepy stays unseen.
    """
    needs.module("ensurepip")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared))
    return folder / "bin" / "anepy"


def use(command: Path, folder: Path, *words: object) -> str:
    """Run the installed command in a folder outside the checkout and return what it printed."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"ANEPY_LIB": find.library()._name, "ANEPY_CACHE": str(folder / "cache")}
    result = subprocess.run(
        [command, *map(str, words)],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=children.PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_command_is_that_of_the_wheel(command: Path, tmp_path: Path) -> None:
    assert use(command, tmp_path, "--version") == f"anepy {anepy.__version__}\n"
    code = "import anepy.native.find as find; print(find.__file__, find.Layout.detect().sources)"
    python = command.with_name("python")
    home = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    packages = next(command.parents[1].glob("lib/python*/site-packages"))
    assert home.stdout.split() == [
        str(packages / "anepy" / "native" / "find.py"),
        str(packages / "anepy" / "_src"),
    ], home.stderr


def test_installed_train_then_generate(command: Path, tmp_path: Path) -> None:
    quick = ["--eval-windows", 2, "--no-checkpoint", "--save", "m.bin", "--json"]
    run = json.loads(use(command, tmp_path, "train", "--steps", 3, *quick))
    assert run["summary"]["step"] == 3 and run["saved"] == "m.bin" and run["sample"]
    words = ["generate", "m.bin", "-p", "Once", "--max-tokens", 4]
    assert use(command, tmp_path, *words).startswith("Once")


def test_installed_compare_measures_groups_in_processes_of_their_own(
    command: Path, tmp_path: Path
) -> None:
    """Two compilations an engine: a process that may make four measures two variants."""
    short = ["--rounds", 1, "--steps", 1, "--warmup", 0, "--seq", 16, "--preset", "stories260K"]
    device = ["--device", "sim:m4,budget=4"]
    variants = ["baseline", "opt", "dynamic"]
    files = ["--json", "r.json", "--report", "r.html"]
    use(command, tmp_path, "compare", *variants, *short, *device, *files)
    groups = json.loads((tmp_path / "r.json").read_text())["groups"]
    assert [[run["label"] for run in group["runs"]] for group in groups] == [
        ["baseline", "opt"],
        ["baseline", "dynamic"],
    ]
    assert all(run["rounds"] == 1 and not run["error"] for g in groups for run in g["runs"])
    assert "<style>" in (tmp_path / "r.html").read_text()


def test_installed_probe_asks_in_processes_of_its_own(command: Path, tmp_path: Path) -> None:
    words = ["probe", "dialect", "surface", "--device", "sim:m4", "--json"]
    record = json.loads(use(command, tmp_path, *words))
    assert [(probe["name"], probe["verdict"]) for probe in record["probes"]] == [
        ("dialect", "ok"),
        ("surface", "ok"),
    ]
