"""Charts of a comparison as HTML with small SVG drawings, without scripts.

Words are HTML, so that they wrap and keep their size on every screen; only marks are drawn, with
horizontal places in percent of the room there is. A mark can be focused and says in its label what
it shows; `data-value` holds the number behind its length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from .drawing import LOSS_HEIGHT, breakable, key, line, plot, round_numbers, thinned
from .estimates import Ratio, relative_differences
from .result import Column, Comparison
from .words import (
    change,
    figure,
    interval,
    losses_text,
    percent,
    switch_ratio,
    verdict,
)

# Every part of the time per step, in the order of the palette in report.css.
SEGMENTS = (
    "device", "io", "classifier", "softmax + loss", "norms", "elementwise", "dW, waited for",
    "other", "update", "compile",
)  # fmt: skip
# The narrowest drawing, a screen of 360 pixels, and the width of a small letter: labels must fit.
_NARROW, _LETTER = 300, 6.6
_APART_HEIGHT = 130
_FORMS = {"add": "added to", "leave out": "within"}
_EFFECTS = {"helps": "helps", "costs": "costs", "none": "no effect shown", "?": "one round"}
_TICKS = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2)


def _svg(height: int, label: str, content: str) -> str:
    told = escape(label)
    return (
        f'<svg height="{height}" tabindex="0" role="img" aria-label="{told}">'
        f"<title>{told}</title>{content}</svg>"
    )


def _row(name: str, drawing: str, value: str) -> str:
    return (
        f'<div class="row"><div class="name">{name}</div>{drawing}'
        f'<div class="value">{value}</div></div>'
    )


def _nothing(name: str, reason: str) -> str:
    return (
        f'<div class="row"><div class="name">{name}</div><div class="none">{escape(reason)}</div>'
        "</div>"
    )


def minus(text: str) -> str:
    """Write the hyphen before a number as the minus sign it stands for, as wide as a plus."""
    return re.sub(r"(?<![\w.-])-(?=[\d.])", "\N{MINUS SIGN}", text)


def times(columns: Sequence[Column]) -> str:
    """Draw the time per step of every variant with its quartiles, from zero."""
    first = columns[0]
    spreads = [column.measured.per_step for column in columns]
    most = max((item.q3 for item in spreads if item is not None), default=1.0) * 1.01
    rows = []
    for column, found in zip(columns, spreads, strict=True):
        name = breakable(column.title)
        if found is None:
            rows.append(_nothing(name, "not measured"))
            continue
        ratio = column.ratio(first) if column is not first else None
        span = f"{figure(found.q1)} to {figure(found.q3)}"
        said = f"{column.title}: {figure(found.median)} ms per step, quartiles {span}"
        if ratio is not None:
            said += f", {change(ratio)} against {first.title}"
        kind = "bar reference" if column is first else "bar"
        low, middle, high = (100 * ms / most for ms in (found.q1, found.median, found.q3))
        drawing = (
            f'<rect class="{kind}" x="0" y="4" width="{middle:.3f}%" height="18" '
            f'data-value="{found.median:.6g}"/>'
            f'<line class="halo" x1="{low:.3f}%" x2="{high:.3f}%" y1="13" y2="13"/>'
            f'<line class="range" x1="{low:.3f}%" x2="{high:.3f}%" y1="13" y2="13"/>'
            f'<line class="range" x1="{low:.3f}%" x2="{low:.3f}%" y1="9" y2="17"/>'
            f'<line class="range" x1="{high:.3f}%" x2="{high:.3f}%" y1="9" y2="17"/>'
        )
        note = change(ratio) if ratio is not None else "reference" if column is first else ""
        value = f"<b>{figure(found.median)} ms</b><span>{minus(note)}</span>"
        rows.append(_row(name, _svg(26, said, drawing), value))
    return f'<div class="chart">{"".join(rows)}</div>'


def parts(column: Column) -> dict[str, float]:
    """Return where the mean time per step of a variant goes, in ms; parts add up to the whole."""
    found = dict(column.measured.means)
    found["update"] = column.measured.update_share
    found["compile"] = column.measured.compile_share
    return {name: found[name] for name in SEGMENTS if found.get(name, 0.0) > 0.0}


def phases(columns: Sequence[Column]) -> str:
    """Draw the mean time per step of every variant, one segment per phase."""
    found = [(column, parts(column)) for column in columns if column.measured.step is not None]
    most = max((math.fsum(shares.values()) for _, shares in found), default=1.0)
    rows = []
    for column, shares in found:
        at, drawing = 0.0, []
        total = math.fsum(shares.values())
        for name, ms in shares.items():
            index, width = SEGMENTS.index(name), 100 * ms / most
            drawing.append(
                f'<rect class="segment" style="fill:var(--p{index})" x="{at:.3f}%" y="3" '
                f'width="{width:.3f}%" height="24" data-value="{ms:.6g}" data-name="{name}">'
                f"<title>{name}: {figure(ms)} ms, {ms / total:.0%}</title></rect>"
            )
            if len(name) * _LETTER + 8 <= width / 100 * _NARROW:
                drawing.append(
                    f'<text class="label" style="fill:var(--on{index})" x="{at + width / 2:.3f}%" '
                    f'y="19" text-anchor="middle">{name}</text>'
                )
            at += width
        told = ", ".join(f"{name} {figure(ms)}" for name, ms in shares.items())
        said = f"{column.title}: {figure(total)} ms per step: {told}"
        value = f"<b>{figure(total)} ms</b>"
        rows.append(_row(breakable(column.title), _svg(30, said, "".join(drawing)), value))
    # What is too short to be drawn needs no key.
    used = [name for name in SEGMENTS if any(s.get(name, 0.0) > 5e-4 * most for _, s in found)]
    keys = "".join(
        '<li><svg aria-hidden="true"><rect width="100%" height="100%" '
        f'style="fill:var(--p{SEGMENTS.index(name)})"/></svg>{name}</li>'
        for name in used
    )
    return f'<div class="chart">{"".join(rows)}</div><ul class="legend">{keys}</ul>'


def curves(columns: Sequence[Column]) -> str:
    """Draw the losses of every variant, and below how far they are from the first's."""
    first = columns[0]
    shown = [column for column in columns if len(column.measured.losses) > 0]
    finite = [loss for column in shown for loss in column.measured.losses if math.isfinite(loss)]
    if not finite:
        return "<p>No loss was measured.</p>"
    steps = max(len(column.measured.losses) for column in shown)
    low, high = min(finite), max(finite)
    room = max(high - low, 1e-6 * abs(high), 1e-9) * 0.05
    low, high = low - room, high + room
    keys, lines = [], []
    for index, column in enumerate(shown):
        text = losses_text(column, first)
        losses = column.measured.losses
        ends = f"{losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}"
        points = [(step, (high - loss) / (high - low)) for step, loss in _points(losses)]
        said = f"{column.title}: loss {ends}; {text}"
        lines.append(line(index, _across(points, steps), said))
        keys.append(f"<li>{key(index)}<span>{breakable(column.title)}: {escape(text)}</span></li>")
    levels = [((high - loss) / (high - low), f"{loss:g}") for loss in round_numbers(low, high)]
    loss = plot("loss", LOSS_HEIGHT, "loss by step", "".join(lines), levels, _steps(steps))
    return f'{loss}<ul class="legend">{"".join(keys)}</ul>{_differences(shown, first, steps)}'


def _differences(shown: Sequence[Column], first: Column, steps: int) -> str:
    """Draw relative differences on a logarithmic scale up to a little above the tolerance."""
    found = []
    for index, column in enumerate(shown):
        same = column.agreement(first) if column is not first else None
        if same is not None and same.agrees is not None and not same.identical:
            found.append((index, column, same))
    if not found:
        return ""
    tolerance = max(same.tolerance for _, _, same in found)
    top = max(tolerance, *(same.worst for _, _, same in found if math.isfinite(same.worst)))
    top_power, bottom_power = math.ceil(math.log10(top) + 0.3), -10

    def place(value: float) -> float:
        power = min(max(math.log10(max(value, 1e-300)), bottom_power), top_power)
        return (top_power - power) / (top_power - bottom_power)

    lines = []
    for index, column, same in found:
        count = same.steps
        apart = relative_differences(first.measured.losses[:count], column.measured.losses[:count])
        points = [(step, place(float(value))) for step, value in _points(list(apart))]
        said = f"{column.title}: at most {same.worst:.1e} from {first.title}, at step {same.step}"
        lines.append(line(index, _across(points, steps), said))
    bound = place(tolerance)
    lines.append(
        f'<line class="bound" x1="0" x2="100" y1="{100 * bound:.3f}" y2="{100 * bound:.3f}"/>'
    )
    powers = range(bottom_power, top_power + 1, max(1, (top_power - bottom_power) // 4))
    levels = [(place(10.0**power), f"1e{power:+03d}") for power in powers]
    return (
        f"<p>Difference from {escape(first.title)}, relative to its loss, of means over ten steps; "
        f"the dashed line is the tolerance, {tolerance:g}.</p>"
        + plot(
            "apart",
            _APART_HEIGHT,
            "relative difference of the loss by step",
            "".join(lines),
            levels,
            _steps(steps),
        )
    )


def _points(values: Sequence[float]) -> list[tuple[int, float]]:
    """Return (step, value) pairs that are finite, evenly thinned to what a screen can show."""
    pairs = [(step, value) for step, value in enumerate(values, 1) if math.isfinite(value)]
    return thinned(pairs)


def _across(points: Sequence[tuple[int, float]], steps: int) -> list[tuple[float, float]]:
    return [((step - 1) / max(1, steps - 1), down) for step, down in points]


def _steps(steps: int) -> list[tuple[float, str]]:
    ticks = sorted({1, (steps + 1) // 2, steps})
    return [
        ((tick - 1) / max(1, steps - 1), f"{'step ' if tick == 1 else ''}{tick}") for tick in ticks
    ]


def ablation(comparison: Comparison) -> str:
    """Draw what each switch changes, with its interval; left of the line is time saved."""
    found = {
        id(row): switch_ratio(comparison, row.form, row.label, row.reference)
        for row in comparison.ablation
    }
    scale = _Scale.around([ratio for ratio in found.values() if ratio is not None])
    rows, missing = [], []
    for name in dict.fromkeys(row.switch for row in comparison.ablation):
        mine = [row for row in comparison.ablation if row.switch == name]
        if all(found[id(row)] is None for row in mine):
            reason = f"not on this device: {mine[0].reason}" if mine[0].reason else "not measured"
            missing.append(_nothing(f"<b>{escape(name)}</b>", reason))
            continue
        rows.append(f'<div class="group">{escape(name)}</div>')
        for row in mine:
            form = f"{_FORMS[row.form]} {row.reference}"
            title = f'<span class="form">{breakable(form)}</span>'
            ratio = found[id(row)]
            if ratio is None:
                rows.append(_nothing(title, row.reason or "not measured"))
                continue
            drawing = _estimate(f"{name}, {form}", ratio, scale)
            value = f"<b>{percent(ratio.value)}</b> {_EFFECTS[verdict(ratio)]}"
            rows.append(_row(title, drawing, minus(f"{value}<span>{interval(ratio)} %</span>")))
    marks = "".join(
        f'<span style="left:{scale.place(ratio):.3f}%">{minus(percent(ratio)).replace(".0", "")}'
        "</span>"
        for ratio in scale.ticks()
    )
    if rows and missing:
        missing.insert(0, '<div class="group"></div>')
    axis = f'<div></div><div class="ticks">{marks}</div><div></div>' if rows else ""
    return f'<div class="chart switches">{axis}{"".join(rows)}{"".join(missing)}</div>'


class _Scale:
    """Ratios on a logarithmic axis, in percent of its width."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    @classmethod
    def around(cls, ratios: Sequence[Ratio]) -> _Scale:
        """Make room for every interval, for 1, and for no more than a factor of three."""
        ends = [end for ratio in ratios for end in (ratio.value, ratio.low, ratio.high) if end]
        low, high = min([1 / 1.01, *ends]), max([1.01, *ends])
        low, high = math.log(max(low, 1 / 3)), math.log(min(high, 3))
        room = 0.06 * (high - low)
        return cls(low - room, high + room)

    def place(self, ratio: float) -> float:
        """Return where a ratio is; ends are clipped to the axis."""
        at = (math.log(ratio) - self.low) / (self.high - self.low)
        return 100 * min(max(at, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Return 1 and round changes beside it, the wide ones first, none too close."""
        found = [1.0]
        for step in _TICKS:
            for ratio in (1 + step / 100, 1 - step / 100):
                inside = ratio > 0 and self.low < math.log(ratio) < self.high
                apart = inside and min(abs(self.place(ratio) - self.place(r)) for r in found)
                if apart and apart >= 17 and 4 <= self.place(ratio) <= 96:
                    found.append(ratio)
        return sorted(found)


def _estimate(what: str, ratio: Ratio, scale: _Scale) -> str:
    """Draw a ratio and its interval."""
    kind = verdict(ratio)
    marks = [scale.place(tick) for tick in scale.ticks()]
    drawing = [f'<line class="grid" x1="{x:.3f}%" x2="{x:.3f}%" y1="0" y2="44"/>' for x in marks]
    at, zero = scale.place(ratio.value), scale.place(1.0)
    drawing.append(f'<line class="zero" x1="{zero:.3f}%" x2="{zero:.3f}%" y1="0" y2="44"/>')
    drawing.append(f'<g class="estimate {kind}">')
    if ratio.low is not None and ratio.high is not None:
        low, high = scale.place(ratio.low), scale.place(ratio.high)
        drawing.append(f'<line x1="{low:.3f}%" x2="{high:.3f}%" y1="22" y2="22"/>')
    drawing.append(
        f'<circle class="dot" cx="{at:.3f}%" cy="22" r="5" data-value="{ratio.value:.6g}"/></g>'
    )
    said = f"{what}: {change(ratio)} time per step, {_EFFECTS[kind]}"
    return _svg(44, said, "".join(drawing))
