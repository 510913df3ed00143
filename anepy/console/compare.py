"""A comparison on the terminal: how far it is, and its tables."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from ..comparing.words import Table, render
from ..system.screen import make_console
from .train import is_live, warn

if TYPE_CHECKING:
    from ..comparing.session import Progress

# Width of tables where output goes to a file: they need not be cut.
_UNKNOWN_WIDTH = 200
_STOPPING = (
    "anepy: finishing this step, then showing what was measured; Ctrl-C again to stop at once"
)


class Turns:
    """Show the turns of a comparison on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._console = make_console(sys.stderr)
        self._bar: RichProgress | None = None
        if is_live(sys.stderr):
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("turns"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("preparing", total=None)

    def __enter__(self) -> Turns:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def turn(self, progress: Progress) -> None:
        """Show whose turn it is."""
        if self._bar is None:
            return
        part = f"round {progress.round}" if progress.round else "warm-up"
        group = "" if progress.groups == 1 else f"group {progress.group}/{progress.groups}, "
        self._bar.update(
            self._task,
            description=f"{group}{part}: {progress.label}",
            completed=progress.done,
            total=progress.total,
        )

    def stopping(self) -> None:
        """Say that an interrupt was seen; called from another thread."""
        if self._bar is not None:
            self._bar.update(self._task, description="stopping after this step")
        else:
            warn(_STOPPING)

    def abort(self) -> None:
        """Leave the terminal usable, a moment before the process ends."""
        if self._bar is not None:
            self._console.show_cursor(True)


def print_wide(table: Table, title: str = "") -> None:
    """Print a table as wide as the terminal allows, its title and head in bold there."""
    live = is_live(sys.stdout)
    console = make_console(sys.stdout)
    width = console.width if live else shutil.get_terminal_size((_UNKNOWN_WIDTH, 24)).columns
    lines = render(table, width)
    heads = {index + 1 for index, line in enumerate(["", *lines[:-1]]) if not line}
    print()
    if title:
        lines = [title, *lines]
        heads = {0, *(index + 1 for index in heads)}
    for index, line in enumerate(lines):
        if live:
            style = "bold" if index in heads or index == 0 else ""
            console.print(Text(line, style=style), soft_wrap=True)
        else:
            print(line)
    print()
