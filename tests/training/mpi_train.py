"""Run by test_mpi.py on every rank: `anepy train`, several times with the word `then` between.

Rank 1 has a fault if one is asked for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from anepy.cli.main import main
from anepy.system import launcher
from anepy.text.data import TokenData
from anepy.training import ranks
from anepy.training.loop import Loop
from anepy.training.parallel import ParallelLoop

ranks.STALL_S = float(os.environ.get("STALL_S", ranks.STALL_S))
found = launcher.launch()
LAST = found is not None and found.rank == 1


def other_data(self: TokenData, *arguments: Any) -> None:
    """Read all but the last tokens."""
    original(self, *arguments)
    self.tokens = self.tokens[:4900]


def fail(self: Loop) -> None:
    """Fail in the first step."""
    raise ValueError("nothing but a test")


if LAST and os.environ.get("OTHER_DATA"):
    original, TokenData.__init__ = TokenData.__init__, other_data  # type: ignore[method-assign]
if LAST and os.environ.get("FAILS"):
    ParallelLoop.step = fail  # type: ignore[assignment, method-assign]

if __name__ == "__main__":
    commands: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "then":
            commands.append([])
        else:
            commands[-1].append(word)
    for words in commands:
        sys.argv = ["anepy", *words]
        try:
            main()
        except SystemExit as end:
            if end.code or words is commands[-1]:
                raise
