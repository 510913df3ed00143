"""The terminal of `anepy bench`: tables that fit, and how far it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..system.screen import make_console

_GAP = 2


class Counter:
    """A line on a terminal that says which of `total` measurements runs; nothing elsewhere.

    It redraws itself in the calling thread only: nothing else may run while something is timed.

    Args:
        total: how many there are.
    """

    def __init__(self, total: int) -> None:
        console = make_console(sys.stderr)
        live = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not live,
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def show(self, done: int, text: str) -> None:
        """Say what runs now, `done` measurements being over."""
        self._progress.start()
        self._progress.update(self._task, completed=done, description=text, refresh=True)

    def clear(self) -> None:
        """Make room for output."""
        self._progress.stop()


def print_columns(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Print a table: with rich on a terminal, as aligned text elsewhere.

    Args:
        title: line above it.
        head: titles of the columns.
        rows: cells.
        left: columns aligned to the left, all others to the right.
        optional: columns that a narrow terminal does without, the last to go first.
    """
    console = make_console(sys.stdout)
    columns = list(range(len(head)))
    widths = [max(len(row[c]) for row in [head, *rows]) for c in columns]
    if not console.is_terminal or console.is_dumb_terminal:
        print(title)
        for row in [head, *rows]:
            cells = (
                row[c].ljust(widths[c]) if head[c] in left else row[c].rjust(widths[c])
                for c in columns
            )
            print("  " + (" " * _GAP).join(cells).rstrip())
        print()
        return
    for name in reversed(optional):
        if sum(widths[c] + _GAP for c in columns) + 2 > console.width:
            columns.remove(head.index(name))
    ascii_only = not console.encoding.lower().startswith("utf")
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.ASCII if ascii_only else box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # the box adds one
        show_edge=False,
    )
    for c in columns:
        table.add_column(head[c], justify="left" if head[c] in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[c] for c in columns))
    console.print(table)
    console.print()
