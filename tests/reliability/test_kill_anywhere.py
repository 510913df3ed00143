"""A few kills; the long run is in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import needs

from reliability.kill_anywhere import attack


@needs.LINUX
def test_killed_runs_resume_to_the_same_bits_and_leave_nothing(tmp_path: Path) -> None:
    figures = attack(tmp_path, 5, 1)
    assert figures["kills"] >= 5 and figures["ends"] >= 1
