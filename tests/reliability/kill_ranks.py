"""SIGKILL for a rank at random moments of a job: it ends, and its checkpoint goes on as if nothing.

usage: python tests/reliability/kill_ranks.py KILLS [SEED]

Jobs of 2 to 4 ranks, each in one of all ways to communicate, write a checkpoint after every step.
A rank of each is killed, or at times the launcher: within 30 seconds nothing of the job is left.
What it saved is, to the bit, what a job that nobody disturbed had at this step. It is resumed to
the end, on as many ranks, and so are the weights: those of the undisturbed job, or, in the middle
of an accumulation, of one that was resumed from its own checkpoint of the same step. Prints a line
a kill, then one of JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import mpi  # noqa: E402
import numpy as np  # noqa: E402
from commands import SMALL  # noqa: E402

from anepy import Model  # noqa: E402
from anepy.training import checkpoint  # noqa: E402

STEPS = 60
LIMIT_S = 30.0
WORDS = (
    "-m", "anepy", "train", "m.bin", "--data", "d.bin", "--device", "cpu", "--seq", 16,
    "--precision", "fp32", "--threads", 1, "--steps", STEPS, "--checkpoint-every", 1,
)  # fmt: skip


class Way(NamedTuple):
    """How a job trains: on so many ranks, with so many steps an update and these options."""

    ranks: int
    accum: int
    options: tuple[str, ...]

    def start(self, folder: Path, name: str, *more: object) -> mpi.Running:
        """Start a job that saves `NAME.npz`, and `NAME.bin` at its end."""
        words = (*WORDS, "--accum", self.accum, *self.options, *more)
        files = ("--ckpt", f"{name}.npz", "--save", f"{name}.bin")
        return mpi.Running(self.ranks, *words, *files, cwd=folder, ANEPY_TEST_JOB=name)

    def run(self, folder: Path, name: str, *more: object) -> bytes:
        """Run a job that nobody disturbs; return its weights."""
        ended = self.start(folder, name, *more).end()
        assert ended.code == 0, ended
        return (folder / f"{name}.bin").read_bytes()


WAYS = [
    Way(ranks, accum, (*shard, "--wire", wire))
    for ranks, accum, shard, wire in itertools.product(
        (2, 3, 4), (1, 3), ((), ("--shard",)), ("fp32", "bf16")
    )
]


class Reference(NamedTuple):
    """What an undisturbed job came to."""

    name: str
    weights: bytes
    resumed: dict[int, bytes]


def attack(folder: Path, kills: int, seed: int, ways: Sequence[Way] = WAYS) -> dict[str, float]:
    """Kill a rank of so many jobs, each in one of these ways; return what was seen.

    Raises:
        AssertionError: a job hung or left a process, a checkpoint or weights have other bits.
    """
    draw = random.Random(seed)
    Model.init(SMALL, seed=1).save(folder / "m.bin")
    np.random.default_rng(0).integers(0, 259, 5000).astype("<u2").tofile(folder / "d.bin")
    known: dict[Way, Reference] = {}
    found = {"kills": 0, "launchers": 0, "before_any": 0, "within": 0, "slowest_s": 0.0}
    while found["kills"] < kills:
        way = draw.choice(ways)
        if way not in known:
            known[way] = _reference(folder, way, f"r{len(known)}")
        launcher = draw.random() < 0.1
        seconds = _kill(folder, way, launcher, draw)
        if seconds is None:
            continue  # it had come to its end
        found["launchers" if launcher else "kills"] += 1
        found["slowest_s"] = max(found["slowest_s"], round(seconds, 2))
        step = _resume(folder, way, known[way])
        found["before_any"] += step == 0
        found["within"] += step % way.accum != 0
        print(f"{'launcher' if launcher else 'rank'} of {way} killed, ended after {seconds:.2f} s, "
              f"resumed at step {step}", file=sys.stderr, flush=True)  # fmt: skip
    return found


def _reference(folder: Path, way: Way, name: str) -> Reference:
    return Reference(name, way.run(folder, name, "--keep", STEPS), {})


def _kill(folder: Path, way: Way, launcher: bool, draw: random.Random) -> float | None:
    """Kill a process of a job; return how long its end took, None if it was over before."""
    for path in folder.glob("k*.npz"):
        path.unlink()
    job = way.start(folder, "k")
    with contextlib.suppress(AssertionError):  # raised by `until` if the job ends
        if draw.random() < 0.85:
            job.until((folder / "k.npz").exists, "a checkpoint")
            time.sleep(draw.uniform(0, 0.6))
        else:
            job.until(job.ranks, "ranks")
            time.sleep(draw.uniform(0, 1.5))
    ranks = job.ranks()
    if job.process.poll() is not None or not ranks:
        _left(job, LIMIT_S)
        return None
    mpi.kill(job.process.pid if launcher else draw.choice(ranks))
    seconds = _left(job, LIMIT_S)
    return None if job.process.returncode == 0 else seconds


def _left(job: mpi.Running, limit: float) -> float:
    """Wait until nothing is left of job `k`; return how long that took.

    Time in which this process was stopped itself does not count.
    """
    seconds, last = 0.0, time.monotonic()
    while job.process.poll() is None or _processes():
        time.sleep(0.02)
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 0.5), now
        assert seconds < limit, ("it hangs", _processes(), *job.printed())
    return seconds


def _processes() -> list[int]:
    """Return all processes of job `k`, whoever their parents are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if b"\0ANEPY_TEST_JOB=k\0" in b"\0" + path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
    return found


def _resume(folder: Path, way: Way, reference: Reference) -> int:
    """Go on with what a killed job has saved; return the step that was of, 0 if it saved none."""
    saved = folder / "k.npz"
    if not saved.exists():
        assert way.run(folder, "k") == reference.weights
        return 0
    step = checkpoint.read_meta(saved).step
    same = folder / f"{reference.name}-{step:08d}.npz"
    if step:
        with np.load(saved) as ours, np.load(same) as theirs:
            assert set(ours.files) == set(theirs.files)
            for name in set(ours.files) - {"meta"}:
                assert ours[name].tobytes() == theirs[name].tobytes(), (way, step, name)
    wanted = reference.weights
    if step % way.accum:  # sums that wait are added to those of a rank when they are saved
        if step not in reference.resumed:
            (folder / "u.npz").write_bytes(same.read_bytes())
            reference.resumed[step] = way.run(folder, "u", "--resume", "u.npz")
        wanted = reference.resumed[step]
    assert way.run(folder, "k", "--resume", "k.npz") == wanted, (way, step)
    return step


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        wanted_seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(json.dumps(attack(Path(place), int(sys.argv[1]), wanted_seed)))
