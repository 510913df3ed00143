"""Jobs of several ranks that cannot hang: what they print, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import children
import needs

# Seconds until a job counts as hanging: the machine may be busy, and stop it for a while.
PATIENCE = 240


class Ended(NamedTuple):
    """How a job ended: exit code of the launcher, both outputs, seconds."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A job in a process group of its own."""

    def __init__(self, ranks: int, *words: object, cwd: Path, **environment: str) -> None:
        command = [*needs.mpirun(ranks), sys.executable, *map(str, words)]
        settings = os.environ | {"PYTHONPATH": children.PYTHONPATH} | environment
        self.files = cwd / f"{time.monotonic_ns()}.out", cwd / f"{time.monotonic_ns()}.err"
        self.began = time.monotonic()
        with open(self.files[0], "w") as out, open(self.files[1], "w") as err:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=settings, stdout=out, stderr=err, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Return the processes of the ranks, those below the launcher that run Python."""
        parents: dict[int, int] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    text = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                parents[int(folder.name)] = int(text[1])
        found = []
        for pid in parents:
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above]
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if above == self.process.pid and command[0] == sys.executable.encode():
                found.append(pid)
        return sorted(found)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something is so; fail with what the job printed if it ends before."""
        while not condition():
            assert self.process.poll() is None, (what, *self.printed())
            assert time.monotonic() - self.began < PATIENCE, (what, *self.printed())
            time.sleep(0.02)

    def printed(self) -> tuple[str, str]:
        """Return what it has printed so far."""
        return self.files[0].read_text(), self.files[1].read_text()

    def end(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end; kill everything and fail if it takes longer.

        Time in which this process was stopped itself does not count as waiting.
        """
        since = last = time.monotonic()
        left, waited = self.ranks(), 0.0
        while (code := self.process.poll()) is None:
            time.sleep(0.02)
            now = time.monotonic()
            waited, last = waited + min(now - last, 0.5), now
            if waited > seconds:
                os.killpg(self.process.pid, signal.SIGKILL)
                for pid in left:
                    kill(pid)
                raise AssertionError(("it hangs", *self.printed()))
        for pid in left:
            while alive(pid):
                assert time.monotonic() - since < seconds, f"process {pid} is left"
                time.sleep(0.02)
        return Ended(code, *self.printed(), time.monotonic() - since)


def run(ranks: int, *words: object, cwd: Path, **environment: str) -> Ended:
    """Run Python with these words on so many ranks."""
    return Running(ranks, *words, cwd=cwd, **environment).end()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
