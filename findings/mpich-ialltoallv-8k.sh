#!/usr/bin/env bash
# MPICH 5.0.2 (ch4:ucx), as the wheel of PyPI brings it: between two processes of one computer a
# started Ialltoallv moves 8 KiB at each call of Test, whatever its size. Two messages of the same
# data, Isend and Irecv, take two or three. Expected: about as many for both. A program that calls
# once a millisecond, between computations, gets 2 MiB through in 0.3 s, so hardly anything overlaps.
#
# Seen: Ialltoallv of 2 MiB: 261 calls, Isend and Irecv: 2 calls. Exits with 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check mpich==5.0.2 mpi4py==4.1.2 numpy
cat >"$folder/calls.py" <<'PY'
import time

import numpy as np
from mpi4py import MPI

world, n, rounds = MPI.COMM_WORLD, 1 << 19, 5
sent, received = np.ones(2 * n, np.float32), np.ones(2 * n, np.float32)
other = 1 - world.rank


def collective():
    layout = [n, n], [0, n]
    return [world.Ialltoallv([sent, *layout, MPI.FLOAT], [received, *layout, MPI.FLOAT])]


def messages():
    mine, theirs = sent[other * n :][:n], received[other * n :][:n]
    return [world.Irecv(theirs, other), world.Isend(mine, other)]


found = []
for start in (collective, messages):
    calls = 0
    for _ in range(rounds):
        world.Barrier()
        requests = start()
        while not MPI.Request.Testall(requests):
            calls += 1
            time.sleep(0.001)  # as a program that computes between two calls
    found.append(calls / rounds)
if world.rank == 0:
    print(f"Ialltoallv of 2 MiB: {found[0]:.0f} calls, Isend and Irecv: {found[1]:.0f} calls")
    raise SystemExit(not (found[0] > 200 and found[1] < 100))
PY
"$folder/env/bin/mpirun" -n 2 "$folder/env/bin/python" "$folder/calls.py" || {
    echo "it is not as described" >&2
    exit 1
}
