"""What a bug report is told; the kernel's tables are written by the tests."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import pytest

from anepy.system import about


def test_features_are_those_that_decide_about_kernels(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu smep avx2 fma avx512_bf16 amx_tile\n")
    assert about.features(tmp_path) == ["avx2", "fma", "avx512_bf16", "amx_tile"]
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd evtstrm asimddp i8mm bf16\n")
    assert about.features(tmp_path) == ["asimd", "asimddp", "i8mm", "bf16"]
    (tmp_path / "cpuinfo").write_text("nothing\n")
    assert about.features(tmp_path) == []


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, {}),
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "max 100000", "a/memory.max": "9"},
            {"cpu.max": ["50000 100000", "max 100000"], "memory.max": ["9"]},
        ),
        (
            "4:cpu,cpuacct:/x\n3:memory:/\n",
            {"cpu/x/cpu.cfs_quota_us": "1", "memory/memory.limit_in_bytes": "7"},
            {"cpu.cfs_quota_us": ["1"], "memory.limit_in_bytes": ["7"]},
        ),
    ],
    ids=["none", "version 2", "version 1"],
)
def test_limits_are_of_the_group_and_its_parents(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: dict[str, list[str]]
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert about.limits(tmp_path / "proc", tmp_path / "fs") == expected


def test_environment_is_what_matters_and_tells_no_proxy() -> None:
    given = {
        "ANEPY_LIB": "/x.so", "OMP_NUM_THREADS": "3", "LANG": "C", "LD_PRELOAD": "",
        "HTTPS_PROXY": "http://me:secret@host", "no_proxy": "inside.example",
        "AWS_SECRET_ACCESS_KEY": "no", "USER": "me", "SSH_CONNECTION": "1.2.3.4", "PATH": "/bin",
    }  # fmt: skip
    assert about.environment(given) == {
        "ANEPY_LIB": "/x.so", "OMP_NUM_THREADS": "3", "LANG": "C", "LD_PRELOAD": "",
        "HTTPS_PROXY": "(set)", "no_proxy": "(set)",
    }  # fmt: skip


def test_anonymous_names_no_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "real"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    record = {
        "a": [f"{home}/x.so", f"{tmp_path}/link", f"{home}:{home}/b"],
        "b": {"c": f"{home}ly/x", "d": 3, "e": None},
        "f": ("/scratch/ada/run", "/adam/x", "https://ada:word@mirror.example/lib"),
    }
    assert about.anonymous(record) == {
        "a": ["~/x.so", "~", "~:~/b"],
        "b": {"c": f"{home}ly/x", "d": 3, "e": None},
        "f": ["/scratch/USER/run", "/adam/x", "https://mirror.example/lib"],
    }
    for place in ("", "/"):
        monkeypatch.setenv("HOME", place)
        assert about.anonymous("/usr/lib") == "/usr/lib"


def test_packages_are_those_that_anepy_names() -> None:
    found = about.packages()
    assert {"numpy", "requests", "platformdirs", "rich", "typer"} <= set(found)
    assert found["numpy"] and all(value is None or value[0].isdigit() for value in found.values())


def test_terminal_and_interpreter_are_described() -> None:
    found = about.terminal()
    assert found["filesystem_encoding"] and len(found["size"]) == 2
    assert about.interpreter()["bits"] in (32, 64)
    assert about.computer()["online"] == (os.cpu_count() or 0)
