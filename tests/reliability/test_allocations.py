"""Every third allocation of the library fails; all do in the run of docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import needs

from reliability.allocations import attack


@needs.LINUX
def test_no_allocation_that_fails_does_more_than_fail(tmp_path: Path) -> None:
    figures = attack(tmp_path, 3)
    assert figures["cases"] > 150 and figures["refused"] > 0.9 * figures["cases"], figures
    assert figures["went_on"] > 5, figures
