"""The page of `anepy compare --report`: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import charts
from . import words as text
from .drawing import breakable, document, figure
from .result import Column, Comparison, columns

_HOW = (
    "Every variant has an engine and weights of its own and sees the same sequences. In a round "
    "each makes a turn of steps, ended by an update, and the order changes from round to round. "
    "The change per step is the Hodges-Lehmann median of the ratios of turns in one round; its "
    "95 % interval comes from resampling the rounds. Bars show medians and quartiles over rounds; "
    "phases are means, which add up."
)


def page(named: Sequence[tuple[str, Comparison]]) -> str:
    """Return the page of one comparison, or of several side by side.

    Args:
        named: comparisons and what to call them; with one, the name does not matter.
    """
    shown = columns(named)
    titles = [column.title for column in shown]
    title = f"{', '.join(titles[:-1])} and {titles[-1]}" if len(titles) > 1 else titles[0]
    sections = [
        figure(
            "time",
            "Time per step",
            "Median over rounds, updates included; the thin line spans the quartiles.",
            charts.times(shown),
        ),
        figure(
            "phases",
            "Where the time goes",
            "Mean time per step by phase, forward and backward, and the share of updates.",
            charts.phases(shown) + _details("Phases in numbers", _phases(shown)),
        ),
        figure(
            "loss",
            "Loss",
            "Mean cross-entropy of every step, the warm-up included.",
            charts.curves(shown),
        ),
    ]
    for name, comparison in named:
        table = text.switches(comparison)
        if table is not None:
            of = f" ({name})" if len(named) > 1 else ""
            sections.append(
                figure(
                    "switches",
                    f"What each switch changes{of}",
                    "Change in time per step: a switch added to its reference, or within it "
                    "against the same without it. Left of the line it saves time; a filled dot "
                    "says that the interval excludes no change.",
                    charts.ablation(comparison) + _details("Switches in numbers", _table(table)),
                )
            )
    sections.append(
        figure("numbers", "All numbers", "Medians; times in ms.", _table(text.metrics(shown)))
    )
    return document(
        f"anepy compare: {title}",
        [
            f"<h1>{breakable(title)}</h1>",
            _lead(named),
            _findings(shown, named),
            "</header>\n<main>",
            *sections,
            "</main>",
            *(_facts(name if len(named) > 1 else "", item) for name, item in named),
            f"<footer><p>{_HOW}</p></footer>",
        ],
    )


def _lead(named: Sequence[tuple[str, Comparison]]) -> str:
    one = named[0][1]
    where = f"{one.machine['processor']}, {one.engine['device']}, {one.engine['precision']}"
    if len(named) > 1:
        where = f"{len(named)} measurements side by side"
    return (
        f'<p class="muted">{escape(one.model["name"])}, {one.engine["seq"]} tokens per step; '
        f'{escape(where)}; <span class="whole">{escape(one.created[:10])}</span></p>'
    )


def _findings(shown: Sequence[Column], named: Sequence[tuple[str, Comparison]]) -> str:
    said = []
    for column, sentence in zip(shown[1:], text.sentences(shown), strict=True):
        ratio = column.ratio(shown[0])
        kind = ratio.verdict.split()[0] if ratio is not None else "unknown"
        said.append(f'<li class="{kind}">{charts.minus(escape(sentence))}</li>')
    remarks = text.differences(named) if len(named) > 1 else []
    for name, comparison in named:
        prefix = f"{name}: " if len(named) > 1 else ""
        remarks += [prefix + line for line in text.remarks(comparison, switches=False)]
    lines = "".join(f"<li>{escape(line)}</li>" for line in remarks)
    return f'<ul class="findings">{"".join(said)}</ul>' + (
        f'<ul class="remarks">{lines}</ul>' if lines else ""
    )


def _details(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary>{table}</details>"


def _phases(shown: Sequence[Column]) -> str:
    found = [charts.parts(column) for column in shown]
    rows = [
        [name, *(text.figure(item[name]) if name in item else "-" for item in found)]
        for name in charts.SEGMENTS
        if any(name in item for item in found)
    ]
    rows.append(["ms/step", *(text.figure(sum(item.values())) for item in found)])
    return _table(text.Table(["", *(column.title for column in shown)], rows))


def _table(table: text.Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    body = []
    for label, *cells in table.rows:
        kind = ' class="main"' if label == "ms/step" else ""
        values = "".join(f"<td>{charts.minus(escape(cell))}</td>" for cell in cells)
        body.append(f'<tr{kind}><th scope="row">{escape(label)}</th>{values}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _facts(name: str, comparison: Comparison) -> str:
    rows = [*text.facts(comparison), ("begun", comparison.created)]
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    if comparison.command:
        command = escape(" ".join(comparison.command))
        lines += f"<dt>command</dt><dd><code>{command}</code></dd>"
    title = f"What was measured{f' ({name})' if name else ''}"
    return f"<section><h2>{escape(title)}</h2><dl>{lines}</dl></section>"
