"""Python in processes of its own, with this anepy and the tests on its path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anepy

HELPERS = Path(__file__).resolve().parent
PYTHONPATH = os.pathsep.join(
    map(str, (Path(anepy.__file__).resolve().parents[1], HELPERS.parent, HELPERS))
)
# Seconds until a child counts as hanging; none takes a tenth of that.
PATIENCE = 300
# Words before a command, as a script that starts it with `&` or under nohup treats it.
UNINTERRUPTED = ("sh", "-c", 'trap "" INT PIPE; exec "$@"', "sh")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let children take signals of a terminal as usual, even if these tests ignore them."""
    usual = dict.fromkeys((signal.SIGQUIT, signal.SIGHUP), signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    ignored = [n for n in usual if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def start(
    *words: object,
    cwd: Path | str | None = None,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    before: tuple[str, ...] = (),
    **environment: str | None,
) -> subprocess.Popen[str]:
    """Start Python with these words.

    Args:
        words: what stands behind `python`.
        cwd: the folder it starts in; this one if None.
        stdout: where it prints to.
        stderr: where it complains to.
        before: words of another program that starts it.
        environment: changed variables; None removes one.
    """
    changed = {"PYTHONPATH": PYTHONPATH, **environment}
    settings = {name: value for name, value in os.environ.items() if name not in changed}
    settings |= {name: value for name, value in changed.items() if value is not None}
    with _interruptible():
        return subprocess.Popen(
            [*before, sys.executable, *map(str, words)],
            cwd=cwd,
            env=settings,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


def run(
    *words: object, cwd: Path | str | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words to its end."""
    with start(*words, cwd=cwd, **environment) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
