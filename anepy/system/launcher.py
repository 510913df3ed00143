"""Whether an MPI launcher started this process, as its environment tells; nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

# What Open MPI, MPICH and its descendants, and Slurm's PMI tell each process: how many, which one.
_TOLD = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("PMIX_SIZE", "PMIX_RANK"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)


class Launch(NamedTuple):
    """How many processes a launcher started, which of them this is, and what says so."""

    size: int
    rank: int
    variable: str


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what an MPI launcher says of this process; None if none started it.

    Args:
        environment: the variables of the process.
    """
    for size, rank in _TOLD:
        if environment.get(size, "").isdecimal():
            which = environment.get(rank, "")
            return Launch(int(environment[size]), int(which) if which.isdecimal() else 0, size)
    return None
