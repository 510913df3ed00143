"""Go on with a training run in a new process, when this one may compile no more programs.

The Neural Engine compiles about 119 programs per process; then failures are silent or odd. Before
that, or when compiling the programs for new weights fails, `anepy train` saves a checkpoint and
replaces its process by a new one with the very same command line, as the research programs do. The
new process learns from `ANEPY_RESTART` where to go on. A run that twice in a row makes no step
between two restarts is stopped: whatever fails there, a new process does not cure it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .files import parsed
from .interrupts import STOPPING

if TYPE_CHECKING:
    from .interrupts import StopRequest

VARIABLE = "ANEPY_RESTART"
MOST_FUTILE = 2


@dataclass(frozen=True)
class Restart:
    """What the next process of a run is told.

    Attributes:
        pid: of the run. Replacing a process keeps its number, so that another process that
            inherits the variable knows it is not meant.
        checkpoint: where to go on from.
        temporary: the checkpoint lies in a folder of its own that goes when it has been read.
        step: how far the run has come.
        futile: restarts in a row between which no step was made.
    """

    pid: int
    checkpoint: str
    temporary: bool
    step: int
    futile: int

    def discard(self) -> None:
        """Remove a checkpoint that only carried the run over."""
        if self.temporary:
            shutil.rmtree(os.path.dirname(self.checkpoint), ignore_errors=True)


def pending() -> Restart | None:
    """Return what an earlier process of this run left, once; None for a run that begins."""
    text = os.environ.pop(VARIABLE, None)
    with contextlib.suppress(ValueError, TypeError):
        found = Restart(**parsed(text or ""))
        if found.pid == os.getpid():
            return found
    return None


def following(previous: Restart | None, step: int, checkpoint: Path | None) -> Restart:
    """Describe the next process.

    Args:
        previous: how this process began.
        step: how far the run has come.
        checkpoint: where the run saves itself; None if it must leave nothing behind.
    """
    futile = previous.futile + 1 if previous is not None and previous.step == step else 0
    temporary = checkpoint is None
    if checkpoint is None:
        folder = files.new_name(tempfile.gettempdir())
        os.mkdir(folder, 0o700)
        checkpoint = Path(folder) / "run.npz"
    return Restart(os.getpid(), os.path.abspath(checkpoint), temporary, step, futile)


def replace_process(restart: Restart, stop: StopRequest) -> None:
    """Begin again with the same command line; open files are closed.

    A Ctrl-C from now on waits until the new process can stop the run in good order; this function
    returns if there was one before.

    Raises:
        OSError: the system refuses; this process goes on.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError, ValueError):
                if int(name) > 2:
                    os.set_inheritable(int(name), False)
    os.environ[VARIABLE] = json.dumps(asdict(restart))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        if stop.signal is None:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
        del os.environ[VARIABLE]
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def unblock_signals() -> None:
    """Take the signals that waited while the process was replaced."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
