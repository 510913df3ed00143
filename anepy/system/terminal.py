"""What reaches a terminal: no control character that came from a file, a name, a server or a model.

A command prints through `guard`, whatever prints; a display that moves the cursor itself prints
through `anepy.system.screen`.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO, cast

# All of Unicode's control characters (C0 and C1) but tab and line feed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_control(text: str) -> str:
    """Leave out the characters that make a terminal do something."""
    return _CONTROL.sub("", text)


def escaped(text: str) -> str:
    r"""Write them as `\u001b`, which JSON understands too."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Guarded:
    """A text stream that escapes what is written to it.

    Args:
        stream: where it goes.

    Attributes:
        unguarded: the same, for what knows what it writes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self.unguarded.write(escaped(text))

    def writelines(self, lines: Any) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has."""
        return getattr(self.unguarded, name)


def guard() -> None:
    """Escape what this process prints from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Guarded):
            setattr(sys, name, cast(TextIO, Guarded(stream)))


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream itself, for what leaves out control characters before it adds its own."""
    return stream.unguarded if isinstance(stream, Guarded) else stream
