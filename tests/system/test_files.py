"""Outputs that cannot be written are refused before anything expensive starts."""

from __future__ import annotations

import os
from pathlib import Path

import children
import needs
import pytest
from cases import BAD_TARGETS

from anepy.errors import ConfigError
from anepy.system import files
from anepy.system.files import check_writable


@pytest.mark.parametrize("bad, reason", BAD_TARGETS)
def test_bad_target_is_refused_in_one_line(tmp_path: Path, bad: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write model .*{reason}") as caught:
        check_writable(tmp_path / bad, "model")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_readonly_folder_names_the_remedy(tmp_path: Path) -> None:
    needs.held_by_permissions()
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="choose a folder you may write to"):
        check_writable(tmp_path / "c.npz", "checkpoint")


def test_check_leaves_nothing_and_compares_free_space(tmp_path: Path) -> None:
    check_writable(tmp_path / "c.npz", "checkpoint", nbytes=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="the disk has"):
        check_writable(tmp_path / "c.npz", "checkpoint", nbytes=1 << 62)


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    """Of this process, a running one and another computer nothing goes."""
    lost = "import sys; from anepy.system import files; print(files.new_name(sys.argv[1]))"
    dead = [children.run("-c", lost, tmp_path).stdout.strip() for _ in range(2)]
    mine = files.new_name(str(tmp_path))
    Path(dead[0]).write_bytes(b"x")
    Path(dead[1]).mkdir()
    (Path(dead[1]) / "inside").write_bytes(b"x")
    tag = Path(mine).name.split("-")[1]
    kept = [mine, mine.replace(tag, "00000000"), mine.replace(f"-{os.getpid()}-", "-1-")]
    for name in kept:
        Path(name).write_bytes(b"x")
    files._cleared.clear()
    with files.replacing(tmp_path / "new") as file:
        file.write(b"x")
    assert {str(path) for path in tmp_path.iterdir()} == {*kept, str(tmp_path / "new")}


def test_deep_json_is_no_json() -> None:
    with pytest.raises(ValueError, match="too deeply"):
        files.parsed("[" * 100_000)
