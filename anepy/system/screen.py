"""The rich console of every display: it moves the cursor, and what it shows never does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .terminal import unguarded, without_control


class _Screen(Console):
    """Leaves control characters out, which take no room in rich's columns either."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else without_control(segment.text)
            yield segment if shown == segment.text else Segment(shown, segment.style)


def make_console(file: TextIO) -> Console:
    """Return a console that guesses nothing about numbers and markup."""
    return _Screen(
        file=unguarded(file), highlight=False, markup=False, emoji=False, soft_wrap=False
    )
