"""Signals during training: nothing is left half done.

In `anepy train` the first Ctrl-C finishes the step, and the second ends the process at once. In a
script, where Ctrl-C raises, it does so between two operations that belong together, not in them.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Wrappers like `uv run` pass on a Ctrl-C that the terminal has delivered already.
_ECHO_S = 0.3


class Uninterrupted:
    """Hold back Python's signal handlers until the block is done, and run them then.

    A handler that raises, as that of Ctrl-C does, takes effect as soon as a call of the native
    library returns: what the call did would be known to the library alone. Other threads are not
    interrupted by signals, and blocks may be nested.
    """

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _RAISING:
                handler = signal.getsignal(number)
                held = isinstance(getattr(handler, "__self__", None), Uninterrupted)
                if callable(handler) and not held:
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # of a handler that was not held back yet
            self._restore()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        for number in dict.fromkeys(self._came):
            handler = signal.getsignal(number)
            if callable(handler):  # raised again, it would count as a second one
                handler(number, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._came.append(number)

    def _restore(self) -> None:
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                signal.signal(number, handler)
                del self._handlers[number]
        except BaseException:  # of a handler that is back already
            self._restore()
            raise


class StopRequest:
    """Watch for SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2 and SIGXCPU in the block.

    One that this process was told to ignore, as nohup and `&` in a script do with SIGINT, stays
    ignored: the run goes on.

    Python runs signal handlers only between two steps. A thread that reads the wake-up socket
    learns of a signal while the native library is still working, so it can say so, and a second
    one can end the process in the middle of a long step.

    Args:
        on_first: told of the first signal, on another thread.
        on_second: called before the process ends, on another thread.

    Attributes:
        signal: number of the signal that asked to stop, or None.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        self.signal: int | None = None
        self._on_first = on_first
        self._on_second = on_second

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {
            number: signal.signal(number, self._note)
            for number in STOPPING
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._thread = threading.Thread(target=self._watch, name="anepy-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @property
    def exit_code(self) -> int:
        """Return the exit code by the convention of shells: 128 and the signal's number."""
        return 128 + (self.signal or 0)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number

    def _watch(self) -> None:
        # The main thread decides when signals wait (restart.py); here they could be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        first_at: float | None = None
        while received := self._reader.recv(64):
            for number in received:
                if number not in self._old:
                    continue
                now = time.monotonic()
                if first_at is None:
                    first_at = now
                    self._on_first()
                elif now - first_at > _ECHO_S:
                    self._on_second()
                    os._exit(128 + number)


STOPPING = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGXCPU,
)  # fmt: skip
# Those for which scripts have handlers.
_RAISING = (*STOPPING, signal.SIGALRM)
