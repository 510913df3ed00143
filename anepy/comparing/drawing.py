"""What pages with curves share: names, lines, axes, figures, the frame of a page; no scripts.

Places are parts of the room there is, from 0 at the left or top to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TypeVar

_STYLE = Path(__file__).with_name("report.css")
# Lines of a curve chart: index in the palette, and dashes.
LINES = ((0, ""), (6, "7 3"), (2, "2 3"), (3, "9 3 2 3"), (4, ""), (5, "4 4"), (8, "1 4"))
LOSS_HEIGHT = 220  # pixels
MOST_POINTS = 400
Place = tuple[float, float]
X = TypeVar("X")


def breakable(text: str) -> str:
    """Escape a name and let it break before its signs."""
    return re.sub(r"([+_-])", r"<wbr>\1", escape(text))


def thinned(points: Sequence[X]) -> list[X]:
    """Return evenly chosen points, the last one among them, as many as a screen can show."""
    if not points:
        return []
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return [*points[: len(points) - 1 : stride], points[-1]]


def round_numbers(low: float, high: float) -> list[float]:
    """Return about four round numbers between two."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    start = math.ceil(low / step)
    return [round(index * step, 12) for index in range(start, math.floor(high / step) + 1)]


def line(index: int, points: Sequence[Place], said: str) -> str:
    """Draw a curve, and say what it shows to those who do not see it."""
    path = " ".join(f"{100 * across:.3f},{100 * down:.3f}" for across, down in points)
    color, dashes = LINES[index % len(LINES)]
    return (
        f'<g tabindex="0" role="img" aria-label="{escape(said)}"><title>{escape(said)}</title>'
        f'<polyline class="curve" style="stroke:var(--p{color});'
        f'stroke-dasharray:{dashes or "none"}" points="{path}"/></g>'
    )


def key(index: int) -> str:
    """Draw the sample of a line for the legend."""
    color, dashes = LINES[index % len(LINES)]
    return (
        '<svg aria-hidden="true"><line x1="0" x2="100%" y1="50%" y2="50%" stroke-width="2" '
        f'style="stroke:var(--p{color});stroke-dasharray:{dashes or "none"}"/></svg>'
    )


def plot(
    kind: str,
    height: int,
    label: str,
    lines: str,
    levels: Sequence[tuple[float, str]],
    ticks: Sequence[tuple[float, str]],
) -> str:
    """Frame curves with levels at their left and ticks below.

    Args:
        kind: a class for it.
        height: in pixels.
        label: what it shows.
        lines: what `line` returned.
        levels: how far down, and the words there.
        ticks: how far across, and the words there; the first and last end at the frame.
    """
    marks = "".join(f'<span style="top:{100 * down:.2f}%">{text}</span>' for down, text in levels)
    grid = "".join(
        f'<line class="grid" x1="0" x2="100" y1="{100 * down:.3f}" y2="{100 * down:.3f}" '
        'vector-effect="non-scaling-stroke"/>'
        for down, _ in levels
    )
    below = "".join(
        f'<span style="left:{100 * across:.2f}%">{text}</span>' for across, text in ticks
    )
    return (
        f'<div class="plot {kind}"><div class="levels" style="height:{height}px">{marks}</div>'
        f'<div class="frame" style="height:{height}px"><svg viewBox="0 0 100 100" '
        f'preserveAspectRatio="none" role="group" aria-label="{label}">{grid}{lines}</svg></div>'
        f'<div class="ticks ends">{below}</div></div>'
    )


def figure(name: str, title: str, caption: str, content: str) -> str:
    """Put a chart under its title."""
    return (
        f'<figure id="{name}" aria-labelledby="{name}-title"><figcaption>'
        f'<h2 id="{name}-title">{escape(title)}</h2><p>{escape(caption)}</p></figcaption>\n'
        f"{content}</figure>"
    )


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs nothing beside it."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<header>",
            *parts,
            "</body>\n</html>\n",
        ]
    )
