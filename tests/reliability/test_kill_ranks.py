"""Two kills; the long run is in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import needs

from reliability.kill_ranks import Way, attack


@needs.LINUX
def test_killed_ranks_end_their_job_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    needs.mpirun(2)
    figures = attack(tmp_path, 2, 1, [Way(2, 3, ("--shard",))])
    assert figures["kills"] == 2 and 0 < figures["slowest_s"] < 30
