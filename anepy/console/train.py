"""What a person sees of a training run.

Three faces of one interface (`Reporter`): `Live` redraws a display on a terminal, `Plain` prints
lines with the wording of the research programs (their dashboards parse them), and the base class
shows nothing, which is what `--json` wants.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..system.screen import make_console
from ..system.words import duration, engine_text, milliseconds
from ..training.reports import StepReport, Summary
from .text import (
    RECOMPUTE,
    Header,
    History,
    batch_text,
    endless,
    header_rows,
    optimizer_text,
    run_text,
    sparkline,
    summary_rows,
    variant_text,
)

MAX_WIDTH = 110
_HISTORY = 2048
_PLAIN_LINES = 100
_PLAIN_PAUSE_S = 10.0


class Reporter:
    """Show nothing; the base of what shows a run."""

    def header(self, header: Header) -> None:
        """Show what is about to happen."""

    def resume(self, header: Header) -> None:
        """Take over from an earlier process of this run, whose header is on the screen."""

    def restart(self, text: str) -> None:
        """Say in one line that a new process goes on."""

    def start(self) -> None:
        """Begin showing steps."""

    def step(self, report: StepReport) -> None:
        """Show one step."""

    def stopping(self) -> None:
        """Say that an interrupt was seen; called from another thread."""

    def stop(self, erase: bool = False) -> None:
        """End showing steps; may be called twice.

        Args:
            erase: the next process shows them again.
        """

    def abort(self, text: str) -> None:
        """Leave the terminal usable, a moment before the process ends, and say what is saved."""
        warn(f"anepy: stopped at once; {text}")

    def note(self, text: str) -> None:
        """Say something worth knowing."""

    def summary(self, summary: Summary, saved: Sequence[str]) -> None:
        """Show how the run went and what was written."""

    def sample(self, prompt: str, text: str) -> None:
        """Show generated text."""


def reporter(quiet: bool) -> Reporter:
    """Return what shows a run on this process's standard output.

    Args:
        quiet: show nothing there; a terminal on standard error still gets the live display.
    """
    if quiet:
        return Live(make_console(sys.stderr)) if is_live(sys.stderr) else Reporter()
    return Live(make_console(sys.stdout)) if is_live(sys.stdout) else Plain(sys.stdout)


def is_live(file: TextIO) -> bool:
    """Say whether a display can be redrawn there."""
    return file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Plain(Reporter):
    """Print lines: for pipes, files and dashboards.

    Args:
        file: where to.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._every = 1
        self._first = 1
        self._printed_at = 0.0
        self._batch_ms: list[float] = []

    def _line(self, text: str) -> None:
        try:
            print(text, file=self._file, flush=True)
        except OSError as error:
            # The reader has gone, or the disk is full: the run is worth more than its lines.
            warn(f"anepy: note: {error.strerror} on standard output; the run goes on without it")
            self._file = silenced(self._file)

    def resume(self, header: Header) -> None:
        """Go on with the same spacing of lines, as far as it is known here."""
        self._first = 0
        self._every = max(1, header.settings["steps"] // _PLAIN_LINES)

    def restart(self, text: str) -> None:
        """Print the line the research programs print."""
        self._line(f"[exec() {text}]")

    def header(self, header: Header) -> None:
        """Print what is about to happen."""
        shape, settings = header.shape, header.settings
        self._first = header.start + 1
        self._every = max(1, (settings["steps"] - header.start) // _PLAIN_LINES)
        self._line(f"anepy train: {header.model} ({shape['n_layers']} layers)")
        self._line(
            f"dim={shape['dim']} hidden={shape['hidden_dim']} heads={shape['n_heads']} "
            f"seq={settings['seq']} vocab={shape['vocab_size']} layers={shape['n_layers']} "
            f"kv_heads={shape['n_kv_heads']}"
        )
        total, embedding = header.parameters / 1e6, header.embedding / 1e6
        self._line(
            f"Params: {total:.2f}M (transformer {total - embedding:.2f}M + embed {embedding:.2f}M)"
        )
        if header.trained:
            self._line(f"Trains: {header.trained}")
        if settings.get("recompute"):
            self._line(f"Recompute: {RECOMPUTE[1]}")
        self._line(
            f"Accum {settings['accum']} steps{batch_text(settings)}, {optimizer_text(settings)}, "
            f"LR={settings['lr']:g}"
        )
        millions = {name: f"{count / 1e6:.0f}M" for name, count in header.flops.items()}
        self._line(
            "FLOPs/step: fwd={fwd} bwd_dx={bwd_dx} bwd_dW={bwd_dw} sdpa_bwd={sdpa_bwd} "
            "total={total}".format(**millions)
        )
        self._line(f"Run: {run_text(settings)}")
        self._line(f"Data: {header.data}")
        self._line(f"Engine: {engine_text(header.engine)}; {variant_text(header.engine)}")
        for label, path in header.outputs.items():
            self._line(f"{label.capitalize()}: {path}")
        if header.start:
            loss = header.losses[-1] if header.losses else math.nan
            self._line(f"[RESUMED step {header.start}, loss={loss:.4f}]")
        for text in header.notes:
            self.note(text)

    def step(self, report: StepReport) -> None:
        """Print one line for about a hundred of the steps, and after a pause."""
        self._batch_ms.append(report.ms_per_step)
        now = time.monotonic()
        shown = (
            report.step in (self._first, report.total)
            or report.step % self._every == 0
            or now - self._printed_at >= _PLAIN_PAUSE_S
        )
        if shown:
            self._printed_at = now
            self._line(
                f"step {report.step:<6d} loss={report.loss:.4f}  lr={report.lr:.2e}  "
                f"{report.ms_per_step:.1f}ms/step  {report.tokens_per_s:.0f}tok/s"
                + ("  skipped" if report.stats.skipped else "")
            )
        if report.update is not None:
            # A batch of one step would only repeat the line above.
            if shown and len(self._batch_ms) > 1:
                train = sum(self._batch_ms)
                self._line(
                    f"[batch {len(self._batch_ms)}: compile={report.update.compile_ms:.0f}ms "
                    f"train={train:.1f}ms ({train / len(self._batch_ms):.1f}ms/step) "
                    f"compiles={report.compiles}] "
                    f"update={report.update.update_ms:.1f}ms"
                )
            self._batch_ms.clear()
        if report.held_out_loss is not None:
            self._line(f"[held-out at step {report.step}: loss={report.held_out_loss:.4f}]")

    def stopping(self) -> None:
        """Say on standard error that the step will be finished."""
        warn(STOPPING)

    def note(self, text: str) -> None:
        """Print to standard error, away from what is parsed."""
        warn(f"anepy: note: {text}")

    def summary(self, summary: Summary, saved: Sequence[str]) -> None:
        """Print the report, the lines dashboards know first."""
        wall_ms = summary.wall_s * 1e3
        share = 100 * summary.train_ms / wall_ms if wall_ms else 0.0
        mean = summary.train_ms / summary.steps if summary.steps else 0.0
        self._line("")
        self._line(f"Total steps:     {summary.steps}")
        self._line(f"Wall time:       {wall_ms:.0f} ms ({summary.wall_s:.1f} s)")
        compiling = 100 * summary.compile_ms / wall_ms if wall_ms else 0.0
        self._line(f"Compile time:    {summary.compile_ms:.0f} ms ({compiling:.1f}%)")
        self._line(f"Train time:      {summary.train_ms:.0f} ms ({share:.1f}%)")
        self._line(f"Avg train:       {mean:.1f} ms/step")
        self._line(f"Total TFLOPS:    {summary.tflops:.3f}")
        for label, text in summary_rows(summary, arrow="->"):
            self._line(f"{label.capitalize() + ':':<16} {text}")
        for text in saved:
            self._line(text)

    def sample(self, prompt: str, text: str) -> None:
        """Print generated text."""
        self._line("")
        self._line(f'Sample (prompt "{prompt}"):')
        self._line(text)


class Live(Reporter):
    """Redraw a display while training.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ascii = not console.encoding.lower().startswith("utf")
        self._live: RichLive | None = None
        self._lock = threading.Lock()
        self._losses = History(_HISTORY)
        self._report: StepReport | None = None
        self._start_step = 0
        self._total = 0
        self._seconds = math.inf
        self._endless = False
        self._seconds_per_step = 0.0
        self._started_at = self._seen_at = 0.0
        self._held_out: float | None = None
        self._stopping = self._ended = False

    @property
    def _width(self) -> int:
        return min(self._console.width, MAX_WIDTH)

    def _panel(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(label, text)
        border = box.ASCII if self._ascii else box.ROUNDED
        self._console.print(
            Panel(grid, title=title, title_align="left", box=border, width=self._width)
        )

    def resume(self, header: Header) -> None:
        """Take over where the display was."""
        self._start_step, self._total = header.start, header.settings["steps"]
        self._seconds = 60 * (header.settings.get("minutes") or math.inf)
        self._endless = endless(header.settings)
        for loss in header.losses:
            self._losses.add(loss)

    def restart(self, text: str) -> None:
        """Leave one line for each process on the screen."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def header(self, header: Header) -> None:
        """Show the settings in a panel."""
        self.resume(header)
        self._panel("anepy train", header_rows(header))
        for text in header.notes:
            self.note(text)

    def start(self) -> None:
        """Start redrawing, also while a long step runs."""
        self._started_at = self._seen_at = time.monotonic()
        self._live = RichLive(
            get_renderable=lambda: self,
            console=self._console,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)

    def step(self, report: StepReport) -> None:
        """Take over the numbers; the display's own thread draws them."""
        with self._lock:
            now = time.monotonic()
            seconds, self._seen_at = now - self._seen_at, now
            # A moving average that starts as a plain mean.
            weight = max(0.05, 1.0 / (report.step - self._start_step))
            self._seconds_per_step += weight * (seconds - self._seconds_per_step)
            self._losses.add(report.loss)
            self._report = report
            if report.held_out_loss is not None:
                self._held_out = report.held_out_loss

    def stopping(self) -> None:
        """Show that the step will be finished."""
        self._stopping = True
        if self._live is not None:
            self._live.refresh()

    def stop(self, erase: bool = False) -> None:
        """Draw the last state and leave it on the screen, unless the next process draws it."""
        self._ended = True
        if self._live is not None:
            self._live.transient = erase
            self._live.stop()
            self._live = None

    def abort(self, text: str) -> None:
        """Give the cursor back."""
        self._console.show_cursor(True)
        super().abort(text)

    def note(self, text: str) -> None:
        """Print a line above the display."""
        self._console.print(Text(f"note: {text}", style="yellow"))

    def summary(self, summary: Summary, saved: Sequence[str]) -> None:
        """Show the summary in a panel."""
        rows = [("steps", f"{summary.steps:,} in {duration(summary.wall_s)}")]
        rows += summary_rows(summary, arrow="->" if self._ascii else "→")
        self._panel("summary", rows)
        for text in saved:
            # Never broken into lines: a command in it must survive copy and paste.
            self._console.print(text, soft_wrap=True)

    def sample(self, prompt: str, text: str) -> None:
        """Show generated text in a panel, the prompt in bold."""
        body = Text(text)
        if text.startswith(prompt):
            body.stylize("bold", 0, len(prompt))
        border = box.ASCII if self._ascii else box.ROUNDED
        self._console.print(
            Panel(body, title="sample", title_align="left", box=border, width=self._width)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw three lines: progress, loss, speed."""
        with self._lock:
            report, losses = self._report, self._losses.values()
        width = min(options.max_width, MAX_WIDTH)
        done = report.step if report else self._start_step
        passed = self._seen_at - self._started_at
        left = min((self._total - done) * self._seconds_per_step, max(0.0, self._seconds - passed))
        eta = f"ETA {duration(left)}" if report else "ETA -"
        # Where time ends the run, the bar is that of the time.
        part = passed / self._seconds if self._endless else done / max(1, self._total)
        if part >= 1 or (self._ended and not self._stopping):
            eta = f"in {duration(passed)}"
        elif self._stopping:
            eta = "stopping after this step"
        total = f"{self._total:,}"
        counter = f" step  {done:>{len(total)},}/{total}  "
        if self._endless:
            counter = f" step  {done:,}  "
        share = f"  {100 * min(1.0, part):3.0f}%  {eta} "
        bar = ProgressBar(
            total=1.0, completed=min(1.0, part), width=max(5, width - len(counter + share))
        )
        yield Text(counter, end="")
        yield from (part for part in console.render(bar, options) if part != Segment.line())
        yield Text(share, style="yellow" if self._stopping else "")
        loss = f" loss  {report.loss:.4f}  " if report else " loss  -  "
        held = f"  held-out {self._held_out:.4f}" if self._held_out is not None else ""
        room = max(5, width - len(loss) - len(held) - 1)
        yield Text.assemble(
            loss,
            (sparkline(losses, room, ascii_only=self._ascii), "cyan"),
            held,
        )
        if report:
            parts = [
                f"{milliseconds(report.ms_per_step)}/step",
                f"{report.tokens_per_s:,.0f} tokens/s",
                f"{report.gflops:,.1f} GFLOP/s",
                f"lr {report.lr:.2e}",
                f"update {report.updates}",
            ]
            yield Text(" speed " + "  ".join(parts), style="dim", no_wrap=True, overflow="crop")
        else:
            yield Text(" speed starting", style="dim")


STOPPING = "anepy: finishing this step, then saving; press Ctrl-C again to stop at once"


def warn(text: str) -> None:
    """Print a line on standard error; a closed one is no error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def silenced(file: TextIO) -> TextIO:
    """Return a file that takes everything, in place of one that takes nothing more."""
    with contextlib.suppress(OSError, ValueError):
        # What is left in its buffer must not fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        return file
    return open(os.devnull, "w")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield what shows a line on standard error while something runs, if that is a terminal."""
    if not is_live(sys.stderr):
        yield lambda text: None
        return
    with make_console(sys.stderr).status("") as status:
        yield status.update


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print labelled lines: a panel on a terminal, `label: text` elsewhere."""
    if is_live(sys.stdout):
        Live(make_console(sys.stdout))._panel(title, rows)
        return
    width = max((len(label) for label, _ in rows), default=0) + 2
    for label, text in rows:
        print(f"{label + ':':<{width}}{text}")


def print_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a head: in columns on a terminal, one line a row elsewhere.

    Args:
        heads: of the columns; one that begins with ">" is set to the right.
        rows: cells; the last column wraps where a terminal is narrow.
    """
    names = [head.lstrip(">") for head in heads]
    if is_live(sys.stdout):
        console = make_console(sys.stdout)
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for head, name in zip(heads, names, strict=True):
            last = name == names[-1]
            justify: Literal["right", "left"] = "right" if head.startswith(">") else "left"
            grid.add_column(name, justify=justify, no_wrap=not last, overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))
        console.print(grid)
        return
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        ]
        print("  ".join(cells).rstrip())
