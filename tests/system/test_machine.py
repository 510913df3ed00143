"""What is told about this machine; the kernel's tables are written by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anepy.system import machine


def test_machine_is_described() -> None:
    assert machine.processor() and machine.system().count(" ") >= 2
    assert machine.memory() > 2**28
    assert 1 <= machine.usable_cpus() <= (os.cpu_count() or 1)
    assert 0 < machine.available_memory() <= machine.memory()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4_096_000),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 4_096_000),
        ({"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "a 1\n"}, 600),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "900\n",
                "memory.stat": "anon 100\ninactive_file 700\n",
            },
            800,
        ),
        ({"memory.max": "1000\n", "memory.current": "1400\n", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "9000\n",
                "memory/memory.usage_in_bytes": "2000\n",
                "memory/memory.stat": "total_inactive_file 5\n",
            },
            7000,
        ),
    ],
)
def test_available_memory_is_what_kernel_and_container_leave(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "memory").mkdir()
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.available_memory(meminfo, tmp_path) == expected


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_available_memory_is_half_where_the_system_does_not_tell(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert machine.available_memory(tmp_path / "meminfo", tmp_path) == machine.memory() // 2
    assert machine.available_memory(tmp_path / "none", tmp_path) == machine.memory() // 2
