"""What tests of finding and building the library start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from installations import isolate, make_sources

from anepy.native import find


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a checkout whose path has a space in it."""
    root = make_sources(tmp_path / "check out")
    (root / "anepy").mkdir()
    return root


@pytest.fixture
def isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's libraries, settings and cache."""
    isolate(monkeypatch, tmp_path)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what would be said on stderr."""
    collected: list[str] = []
    monkeypatch.setattr(find, "notify", collected.append)
    return collected
