"""Fixtures shared by all test modules: where real models and texts are, and nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
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


@pytest.fixture(scope="session")
def ane_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the native library with the Apple devices on stand-in frameworks, for coverage."""
    import apple

    return apple.build(tmp_path_factory.mktemp("ane"), (), apple.COVERAGE)


# What CI may lack: a second user, an instruction set, and packages that are optional even here.
_MAY_BE_MISSING = (
    "root may write",
    "needs a user who",
    "this processor has no",
    "ANEPY_TEST_DATA",
    "ANEPY_MACOS_SDK",
    "torch",
    "coremltools",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail instead of skipping when ANEPY_TEST_STRICT says that every tool is there."""
    report = yield
    if report.skipped and os.environ.get("ANEPY_TEST_STRICT"):
        reason = str(report.longrepr)
        if not any(word in reason for word in _MAY_BE_MISSING):
            report.outcome = "failed"
            report.longrepr = f"skipped although ANEPY_TEST_STRICT is set: {reason}"
    return report
