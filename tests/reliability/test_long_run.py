"""A short run with log and checkpoints; the long one is in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import needs

from reliability.long_run import attack


@needs.LINUX
def test_a_run_takes_no_more_as_it_goes_on(tmp_path: Path) -> None:
    needs.proc()
    assert attack(tmp_path, 1500, most_time=3)["steps"] == 1500
