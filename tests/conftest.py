"""Fixtures shared by all test modules: where real models and texts are, and nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a finder of real data files that skips the test when a file is not there.

    The folder is `$ANEPY_TEST_DATA` if set, else `shared/data` beside the checkout.
    """
    folder = Path(os.environ.get("ANEPY_TEST_DATA") or CHECKOUT.parent / "shared" / "data")

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"needs {name}; set ANEPY_TEST_DATA to the folder that has it")
        return path

    return find
