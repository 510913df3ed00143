"""The tree is clean under the tools that guard its style; CI runs nothing beside the tests."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import import_rooms
import needs
import pytest

ROOT = needs.CHECKOUT


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize(
    "arguments",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_python_sources_are_clean(arguments: tuple[str, ...]) -> None:
    needs.module(arguments[0])
    run(sys.executable, "-m", *arguments)


def test_shell_scripts_are_clean() -> None:
    run(needs.program("shellcheck"), "build_lib.sh", ".ci/run")


def sources() -> list[Path]:
    ours = ("anepy", "libsrc", "tests", "build_lib.sh", ".ci")
    return [path for path in needs.git_checkout() if path.relative_to(ROOT).parts[0] in ours]


def test_only_needs_py_skips_tests() -> None:
    """What a test needs is asked for in one place, which knows what CI must have."""
    word = re.compile(r"pytest\.(skip|importorskip|mark\.skip|mark\.xfail)")
    faults = [
        f"{path}:{number}"
        for path in sources()
        if path.suffix == ".py" and path.name not in ("needs.py", "test_style.py")
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if word.search(line)
    ]
    assert not faults, faults


def test_source_files_are_short_and_plain() -> None:
    """Files stay below 600 lines, end with a newline, and hold no tabs or trailing blanks."""
    faults = []
    for path in sources():
        text = path.read_text()
        lines = text.split("\n")
        if len(lines) > 601:
            faults.append(f"{path}: {len(lines) - 1} lines")
        if text and not text.endswith("\n"):
            faults.append(f"{path}: no newline at its end")
        faults += [
            f"{path}:{number}: tab or trailing blank"
            for number, line in enumerate(lines, 1)
            if line != line.rstrip() or "\t" in line
        ]
    assert faults == []


def test_python_prose_does_not_send_its_reader_elsewhere() -> None:
    """A docstring or comment says what it means: no "see x", no "likewise", no question."""
    faults = []
    for path in sources():
        if path.relative_to(ROOT).parts[0] != "anepy" or path.suffix != ".py":
            continue
        text = path.read_text()
        prose = [token.string for token in tokens(text) if token.type == tokenize.COMMENT]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose.append(ast.get_docstring(node) or "")
        faults += [
            f"{path}: {line}"
            for line in "\n".join(prose).splitlines()
            if re.search(r"\bsee `|\blikewise\b|\?$", line, re.IGNORECASE)
        ]
    assert faults == []


def tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def test_apple_conditionals_stay_where_they_belong() -> None:
    """`__APPLE__` is tested only in runtime, the Apple devices and the BLAS provider."""
    allowed = re.compile(r"libsrc/(runtime/|device/ane/|device/metal/|kernels/blas_)")
    offenders = [
        path
        for path in sources()
        if path.suffix in (".c", ".h", ".m")
        and "__APPLE__" in path.read_text()
        and not allowed.match(str(path.relative_to(ROOT)))
    ]
    assert offenders == []


def test_c_includes_point_down() -> None:
    """A layer includes itself and those below it: train, device, programs, model, kernels, runtime.

    bench, train and decode stand side by side, as do model and kernels: none may know the other.
    """
    below = {
        "bench": {"bench", "device", "programs", "model", "kernels", "runtime"},
        "decode": {"decode", "model", "kernels", "runtime"},
        "train": {"train", "device", "programs", "model", "kernels", "runtime"},
        "device": {"device", "programs", "model", "kernels", "runtime"},
        "programs": {"programs", "model", "kernels", "runtime"},
        "model": {"model", "runtime"},
        "kernels": {"kernels", "runtime"},
        "runtime": {"runtime"},
    }
    offenders = []
    for path in sources():
        parts = path.relative_to(ROOT).parts
        if parts[0] != "libsrc" or parts[1] not in below:
            continue
        for include in re.findall(r'#include "(\w+)/', path.read_text()):
            if include not in below[parts[1]]:
                offenders.append(f"{path}: {include}")
    assert offenders == []


def test_python_imports_point_down() -> None:
    """No room of `anepy/` imports one on its own floor or above; new rooms get a floor first."""
    plan = import_rooms.survey(ROOT)
    assert plan.floors == import_rooms.FLOORS, plan.rooms
    assert {arrow: plan.arrows[arrow] for arrow in plan.upward} == {}
    assert plan.circles == [] and len(plan.rooms) <= 16
    # The three ways to write an import are all seen.
    assert {("cli", "training"), ("comparing", "native"), ("__init__", "system")} <= set(
        plan.arrows
    )


def test_python_imports_that_climb_are_found(tmp_path: Path) -> None:
    for path, text in {
        "__init__.py": "from .upper import thing as shown",
        "low.py": "def late():\n    from . import shown",
        "middle/__init__.py": "",
        "middle/a.py": "import anepy.low\nfrom . import b",
        "middle/b.py": "import typing\nif typing.TYPE_CHECKING:\n    from .. import upper",
        "upper.py": "from .middle.a import x\nfrom anepy import low",
    }.items():
        (tmp_path / "anepy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "anepy" / path).write_text(text)
    plan = import_rooms.survey(tmp_path)
    assert plan.floors == (("low",), ("middle",), ("upper",), ("__init__",))
    assert plan.arrows[("low", "__init__")] == ["anepy/low.py:2"]
    assert set(plan.arrows) == {
        ("__init__", "upper"),
        ("low", "__init__"),
        ("middle", "low"),
        ("middle", "upper"),
        ("upper", "middle"),
        ("upper", "low"),
    }
    assert sorted(plan.upward) == [("low", "__init__"), ("middle", "upper")]
    assert plan.circles == [("middle", "upper")]


def test_no_two_headers_of_the_library_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for path in sources():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "libsrc" and path.suffix == ".h":
            names.setdefault(path.name, []).append(str(relative))
    assert len(names) > 30
    assert [paths for paths in names.values() if len(paths) > 1] == []
