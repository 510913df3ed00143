"""Ctrl-C while a command is still being imported: it ends the process, as it does any program."""

from __future__ import annotations

import signal

_held = False


def hold() -> None:
    """Let Ctrl-C end the process without a word, where it would raise KeyboardInterrupt."""
    global _held
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _held = True


def release() -> None:
    """Let it raise again, where somebody catches it."""
    global _held
    if _held:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _held = False
