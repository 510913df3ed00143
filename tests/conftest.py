"""Fixtures shared by all test modules."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ane_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the native library with the Apple devices on stand-in frameworks, for coverage."""
    import apple

    return apple.build(tmp_path_factory.mktemp("ane"), (), apple.COVERAGE)
