"""A few hundred broken files for each reader; the long run is in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import needs

from reliability.hostile_files import attack, readers


@needs.LINUX
def test_broken_files_are_refused_in_one_line_or_taken(tmp_path: Path) -> None:
    needs.module("safetensors")
    for label, reader in readers(tmp_path).items():
        figures = attack(reader, label, 7, 0, 60)
        assert figures["refused"] > 0, figures
