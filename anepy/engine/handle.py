"""Native handles as Python objects, and arrays and text as the native library takes them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from ..errors import ClosedError, ConfigError, NativeError
from ..models.views import Array
from .ids import Ids, Starts

_O = TypeVar("_O", bound="Owner")


class Owner:
    """A native handle that is closed once, by `close`, `with`, or when it is forgotten."""

    _finalizer: weakref.finalize[[Any], Any] | None = None
    _handle: ctypes.c_void_p | None = None

    def _own(self, handle: ctypes.c_void_p, free: Any) -> None:
        self._handle = handle
        self._guard = threading.RLock()
        self._peeking = threading.Lock()
        self._finalizer = weakref.finalize(self, free, handle)
        self._finalizer.atexit = False  # threads and memory end with the process

    def close(self) -> None:
        """Free the native object; a second call does nothing.

        Waits for a call that is running in another thread.
        """
        self._handle = None
        with self._guard, self._peeking:
            if self._finalizer is not None:
                self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._handle is None

    def __enter__(self: _O) -> _O:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        # A copy would share the handle and outlive it.
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: make a new one")

    @contextlib.contextmanager
    def _call(self) -> Iterator[ctypes.c_void_p]:
        """Lend the handle to one thread at a time; `close` waits for it."""
        if not self._guard.acquire(blocking=False):
            self._open_handle()
            raise NativeError(
                -30, "busy", f"this {type(self).__name__} is running in another thread"
            )
        try:
            yield self._open_handle()
        finally:
            self._guard.release()

    @contextlib.contextmanager
    def _peek(self) -> Iterator[ctypes.c_void_p]:
        """Lend the handle for a short question, also while a call runs in another thread."""
        with self._peeking:
            yield self._open_handle()

    def _open_handle(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise ClosedError(f"this {type(self).__name__} was closed: make a new one")
        return self._handle


def encoded(text: str) -> bytes:
    """Encode a name for C; characters outside ASCII and line breaks are escaped."""
    return text.encode("unicode_escape")


def check_counts(**values: int | None) -> None:
    """Refuse what C would read as another number: it has 32 bits, and 0 means default."""
    for name, value in values.items():
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"{name} is {value}, expected a number >= 1")


def address(array: Array) -> int:
    """Return where the array's memory begins."""
    return int(array.ctypes.data)


def float_pointer(array: Array) -> Any:
    """Return the memory of a float32 array as `float *`."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def id_pointer(array: Ids) -> Any:
    """Return the memory of an int32 array as `int32_t *`."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def start_pointer(array: Starts | None) -> Any:
    """Return the memory of a uint8 array as `uint8_t *`; None is NULL."""
    return None if array is None else array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
