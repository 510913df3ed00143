"""Runs of training in one picture: a page of HTML, or one SVG drawing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..errors import ConfigError
from ..system.files import replacing, write_failure
from ..system.words import duration, perplexity
from ..training.runs import Run
from .drawing import (
    LINES,
    LOSS_HEIGHT,
    MOST_POINTS,
    Place,
    breakable,
    document,
    figure,
    key,
    line,
    plot,
    round_numbers,
    thinned,
)

_SMALL_HEIGHT = 110
_PAPER = "#fcfcfb"
# Of a drawing that stands alone, in pixels; colours as on the page.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP = 900, 480, 70, 20, 46
_COLORS = ("#627ab0", "#b37f41", "#009caa", "#711e43", "#928707", "#474579", "#572715", "#85857f",
           "#006500")  # fmt: skip


def write(runs: Sequence[Run], path: Path) -> None:
    """Draw runs into a file, as its ending says.

    Raises:
        ConfigError: the ending is another one, the file cannot be written, or a package is missing.
    """
    kinds: Mapping[str, Callable[[Sequence[Run]], bytes]] = {
        ".html": lambda found: page(found).encode(errors="replace"),
        ".svg": lambda found: svg(found).encode(errors="replace"),
        ".png": png,
    }
    draw = kinds.get(path.suffix.lower())
    if draw is None:
        raise ConfigError(f"cannot draw {path}: name a file that ends in {' or '.join(kinds)}")
    content = draw(runs)
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(write_failure(path, "picture", error)) from error


def page(runs: Sequence[Run]) -> str:
    """Return one page with the losses, rates and speeds of runs, and what they were."""
    title = ", ".join(run.name for run in runs)
    return document(
        f"anepy plot: {title}",
        [
            f"<h1>{breakable(title)}</h1>",
            "</header>\n<main>",
            figure(
                "loss",
                "Loss",
                "Training loss, mean of neighbouring steps; dots mark evaluations on held-out "
                "data.",
                _losses(runs),
            ),
            figure(
                "rate",
                "Learning rate",
                "Of the update a step belongs to.",
                _series(runs, [run.rates for run in runs], "learning rate by step"),
            ),
            figure(
                "speed",
                "Speed",
                "Tokens per second of steps, mean of neighbours.",
                _series(runs, [run.speeds for run in runs], "tokens per second by step"),
            ),
            figure("table", "In numbers", "What the runs were, and how they went.", _table(runs)),
            "</main>",
        ],
    )


def rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of a table of runs, in words; heads with ">" go to the right."""
    heads = ["RUN", ">STEP", ">LOSS", ">BEST", ">AT", ">PERPLEXITY", ">LR", ">TIME", ">TOKENS/S"]
    cells = []
    for run in runs:
        best = run.best
        of = f"/{run.total}" if run.total and run.steps < run.total else ""
        speed = sum(run.tokens.values()) / run.seconds if run.seconds else None
        cells.append(
            [
                run.name,
                f"{run.steps}{of}",
                "-" if run.loss is None else f"{run.loss:.4f}",
                "-" if best is None else f"{best[1]:.4f}",
                "-" if best is None else str(best[0]),
                "-" if best is None else f"{perplexity(best[1]):.4g}",
                f"{run.facts['settings'].get('lr', 0.0):g}",
                duration(run.summary.get("wall_s") or run.seconds),
                "-" if speed is None else f"{speed:,.0f}",
            ]
        )
    return heads, cells


def _table(runs: Sequence[Run]) -> str:
    heads, cells = rows(runs)
    names = "".join(f"<th>{escape(head.lstrip('>').lower())}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells
    )
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def smoothed(series: Mapping[int, float]) -> list[tuple[int, float]]:
    """Return means over neighbouring steps at their last step, as many as a screen can show."""
    steps = sorted(series)
    width = max(1, math.ceil(len(steps) / MOST_POINTS))
    groups = [steps[at : at + width] for at in range(0, len(steps), width)]
    return [(group[-1], math.fsum(series[s] for s in group) / len(group)) for group in groups]


class _Axes:
    """Where steps and values are, in parts of the room there is."""

    def __init__(self, steps: int, values: Sequence[float], from_zero: bool = False) -> None:
        self.steps = max(steps, 1)
        low = 0.0 if from_zero else min(values)
        high = max(values)
        room = max(high - low, 1e-6 * abs(high), 1e-12) * 0.05
        self.low, self.high = low - (0.0 if from_zero else room), high + room

    def place(self, step: int, value: float) -> Place:
        across = (step - 1) / max(1, self.steps - 1)
        return across, (self.high - value) / (self.high - self.low)

    def places(self, points: Sequence[tuple[int, float]]) -> list[Place]:
        return [self.place(step, value) for step, value in points]

    def levels(self) -> list[tuple[float, str]]:
        numbers = round_numbers(self.low, self.high)
        return [(self.place(1, n)[1], f"{n:,g}" if abs(n) >= 1 else f"{n:g}") for n in numbers]

    def ticks(self) -> list[tuple[float, str]]:
        ticks = sorted({1, (self.steps + 1) // 2, self.steps})
        return [(self.place(t, 0)[0], f"{'step ' if t == 1 else ''}{t}") for t in ticks]


def _loss_axes(runs: Sequence[Run]) -> _Axes | None:
    values = [v for run in runs for _, v in smoothed(run.losses)]
    values += [v for run in runs for v in run.held_out.values()]
    return _Axes(max(run.steps for run in runs), values) if values else None


def _losses(runs: Sequence[Run]) -> str:
    axes = _loss_axes(runs)
    if axes is None:
        return "<p>No loss was logged.</p>"
    lines, keys = [], []
    for index, run in enumerate(runs):
        points = smoothed(run.losses)
        if not points:
            continue
        told = f"{run.name}: loss {points[0][1]:.4f} at step {points[0][0]}, "
        told += f"{points[-1][1]:.4f} at step {points[-1][0]}"
        best = run.best
        if best is not None:
            told += f"; best held-out {best[1]:.4f} at step {best[0]}"
        lines.append(line(index, axes.places(points), told))
        evaluations = sorted(run.held_out.items())
        lines += [_dot(index, place) for place in axes.places(thinned(evaluations))]
        keys.append(f"<li>{key(index)}<span>{breakable(told)}</span></li>")
    drawn = plot("loss", LOSS_HEIGHT, "loss by step", "".join(lines), axes.levels(), axes.ticks())
    return f'{drawn}<ul class="legend">{"".join(keys)}</ul>'


def _dot(index: int, place: Place) -> str:
    """Draw a mark that stays round however the drawing is stretched: a line without length."""
    color = LINES[index % len(LINES)][0]
    x, y = 100 * place[0], 100 * place[1]
    return (
        f'<path class="dot" d="M{x:.3f} {y:.3f}h.001" style="stroke:var(--p{color})" '
        'stroke-width="7" stroke-linecap="round" vector-effect="non-scaling-stroke"/>'
    )


def _series(runs: Sequence[Run], series: Sequence[Mapping[int, float]], label: str) -> str:
    shown = [
        (i, run, smoothed(s)) for i, (run, s) in enumerate(zip(runs, series, strict=True)) if s
    ]
    if not shown:
        return "<p>Not in the logs.</p>"
    values = [value for _, _, points in shown for _, value in points]
    axes = _Axes(max(run.steps for run in runs), values, from_zero=True)
    lines = [
        line(i, axes.places(points), f"{run.name}: {label}, last {points[-1][1]:.4g}")
        for i, run, points in shown
    ]
    return plot("small", _SMALL_HEIGHT, label, "".join(lines), axes.levels(), axes.ticks())


def png(runs: Sequence[Run]) -> bytes:
    """Return the losses as a PNG of 1800 by 960 pixels, drawn by the package matplotlib.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "a .png needs the package matplotlib; pip install 'anepy[plot]', or write .svg"
        ) from None
    drawn = Figure(figsize=(9, 4.8), dpi=200, facecolor=_PAPER, layout="constrained")
    axes = drawn.add_subplot(facecolor=_PAPER)
    for index, run in enumerate(runs):
        number, _ = LINES[index % len(LINES)]
        style = ("-", "--", ":", "-.")[index % 4]
        points = smoothed(run.losses)
        label = run.name.lstrip("_") or "run"  # a leading _ would hide it
        axes.plot(*zip(*points, strict=True), style, color=_COLORS[number], label=label)
        if run.held_out:
            dots = zip(*sorted(run.held_out.items()), strict=True)
            axes.plot(*dots, "o", color=_COLORS[number], markersize=4)
    axes.set_title("Loss by step; dots mark evaluations on held-out data", loc="left")
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#dcdcd6")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if runs:
        axes.legend(frameon=False)
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()


def svg(runs: Sequence[Run]) -> str:
    """Return the losses as a drawing that stands alone."""
    axes = _loss_axes(runs)
    height = _HEIGHT + 22 * len(runs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f"<title>loss by step: {escape(', '.join(run.name for run in runs))}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>',
        f'<text x="{_LEFT}" y="26" font-size="17" fill="#1b1b19">Loss by step</text>',
    ]
    if axes is None:
        return "\n".join([*parts, '<text x="70" y="80">No loss was logged.</text>', "</svg>\n"])
    bottom = _HEIGHT - 40

    def pixels(place: Place) -> tuple[float, float]:
        across, down = place
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + down * (bottom - _TOP)

    for down, words in axes.levels():
        y = pixels((0, down))[1]
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#dcdcd6"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5b5b56">{words}</text>'
        )
    ticks = axes.ticks()
    for number, (across, words) in enumerate(ticks):
        anchor = "start" if number == 0 else "end" if number == len(ticks) - 1 else "middle"
        parts.append(
            f'<text x="{pixels((across, 0))[0]:.1f}" y="{bottom + 20}" text-anchor="{anchor}" '
            f'fill="#5b5b56">{words}</text>'
        )
    for index, run in enumerate(runs):
        number, dashes = LINES[index % len(LINES)]
        color = _COLORS[number]
        places = [pixels(p) for p in axes.places(smoothed(run.losses))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        stroke = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dashes or "none"}"'
        parts.append(f'<polyline fill="none" {stroke} points="{path}"/>')
        for x, y in map(pixels, axes.places(sorted(run.held_out.items()))):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
        y = _HEIGHT + 22 * index
        best = run.best
        told = f"{run.name}: {run.loss:.4f} at the end" if run.loss is not None else run.name
        told += f", best held-out {best[1]:.4f} at step {best[0]}" if best is not None else ""
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + 30}" y1="{y}" y2="{y}" {stroke}/>'
            f'<text x="{_LEFT + 40}" y="{y + 4}" fill="#1b1b19">{escape(told)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
