"""Outputs that cannot be written are refused before anything expensive starts."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest
from cases import BAD_TARGETS

from anepy.errors import ConfigError
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
