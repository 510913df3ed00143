"""The words and figures of a comparison, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.stats import PHASES
from ..engine.variants import gradients_lag
from ..system.words import engine_text, quantity
from .estimates import Ratio, Spread, spread
from .result import Column, Comparison, Measured, same_load

_GAP = "  "
_VERDICTS = {"faster": "helps", "slower": "costs", "no difference shown": "none", "unknown": "?"}


@dataclass(frozen=True)
class Table:
    """Lines of cells; the first cell of a line is its label.

    Attributes:
        head: titles of the columns.
        rows: a label and cells, as many as titles.
        reference: whether the second column is what the others are compared with.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    reference: bool = False


def figure(value: float) -> str:
    """Write a time, or another number above 0, with three or four figures."""
    if value >= 10_000:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def megabytes(nbytes: float) -> str:
    """Write a size in MB, small ones with a decimal."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def percent(ratio: float) -> str:
    """Write a ratio as a change: 0.9 is -10.0 %."""
    change = 100 * (ratio - 1)
    text = f"{change:+.1f}" if abs(change) < 100 else f"{change:+,.0f}"
    return ("0.0" if text in ("-0.0", "+0.0") else text) + " %"


def interval(ratio: Ratio) -> str:
    """Write an interval as changes: (-12.0, -8.1); nothing for a single round."""
    if ratio.low is None or ratio.high is None:
        return ""
    low, high = (percent(value).removesuffix(" %") for value in (ratio.low, ratio.high))
    return f"({low}, {high})"


def change(ratio: Ratio | None) -> str:
    """Write a ratio as a change with its interval."""
    return f"{percent(ratio.value)} {interval(ratio)}".strip() if ratio is not None else ""


def verdict(ratio: Ratio | None) -> str:
    """Say in a word what a switch does: helps, costs, or none where the interval includes 0."""
    return _VERDICTS[ratio.verdict] if ratio is not None else "?"


def _median(found: Spread | None) -> str:
    return figure(found.median) if found is not None else "-"


def _quartiles(found: Spread | None) -> str:
    return f"{figure(found.q1)} to {figure(found.q3)}" if found is not None else "-"


def losses_text(column: Column, reference: Column) -> str:
    """Say how the loss curve of a column compares."""
    if column is reference:
        return "reference"
    same = column.agreement(reference)
    if same is None:
        return "other work"
    if same.agrees is None:
        return "-"
    if same.identical:
        return "bit-identical"
    if same.agrees:
        return f"agree to {same.worst:.0e}"
    late = any(gradients_lag(run.switches) for run in column.comparison.runs(column.label))
    return f"apart by {same.worst:.1%}" + (", one update late" if late else "")


def metrics(columns: Sequence[Column]) -> Table:
    """Lay out what was measured, a column per variant; two variants get the difference too."""
    first = columns[0]
    two = len(columns) == 2
    rows: list[list[str]] = []

    def add(label: str, cells: Sequence[str], delta: str = "") -> None:
        if any(cell not in ("", "-") for cell in cells):
            rows.append([label, *cells, delta] if two else [label, *cells])

    def spreads(
        label: str, get: Callable[[Measured], Spread | None], what: str | None = None
    ) -> None:
        found = [get(column.measured) for column in columns]
        delta = ""
        if two and what is not None:
            delta = change(columns[1].ratio(first, what))
        elif two and found[0] is not None and found[1] is not None and found[0].median > 0:
            delta = percent(found[1].median / found[0].median)
        add(label, [_median(item) for item in found], delta)

    spreads("ms/step", lambda m: m.per_step, "per_step")
    add("  quartiles", [_quartiles(column.measured.per_step) for column in columns])
    if not two:
        ratios = [column.ratio(first) if column is not first else None for column in columns]
        add("  change", [percent(ratio.value) if ratio else "" for ratio in ratios])
        add("  95 % interval", [interval(ratio) if ratio else "" for ratio in ratios])
    spreads("forward + backward", lambda m: m.step, "step")
    for phase in PHASES:
        spreads(f"  {phase.title}", lambda m, t=phase.title: m.phases.get(t))  # type: ignore[misc]
    spreads("update", lambda m: m.update, "update")
    spreads("compile", lambda m: m.compile)

    def plain(
        label: str,
        get: Callable[[Measured], float | None],
        show: Callable[[float], str],
        delta: Callable[[float, float], str],
    ) -> None:
        found = [get(column.measured) for column in columns]
        text = [show(value) if value is not None else "-" for value in found]
        both = two and found[0] is not None and found[1] is not None
        add(label, text, delta(*(value or 0.0 for value in found)) if both else "")

    def share(a: float, b: float) -> str:
        return percent(b / a) if a else ""

    def difference(a: float, b: float) -> str:
        return f"{b - a:+,.0f}" if b != a else "0"

    plain("tokens/s", lambda m: m.tokens_per_s, lambda v: f"{v:,.0f}", share)
    plain("TFLOPS", lambda m: m.tflops, lambda v: f"{v:.3f}", share)
    plain("utilization", lambda m: m.utilization, lambda v: f"{v:.1%}", share)
    plain("allocations/step", lambda m: m.allocations, lambda v: f"{v:,.0f}", difference)
    plain("memory", lambda m: m.memory or None, megabytes, share)
    plain("final loss", lambda m: m.final_loss, lambda v: f"{v:.4f}", share)
    add("loss curves", [losses_text(column, first) for column in columns])
    if any(column.measured.skipped for column in columns):
        add("skipped steps", [f"{column.measured.skipped:,}" for column in columns])
    head = ["", *(column.title for column in columns), *(["delta"] if two else [])]
    return Table(head, rows, reference=True)


def switches(comparison: Comparison) -> Table | None:
    """Lay out the ablation, a row per switch; negative is time that the switch saves."""
    if not comparison.ablation:
        return None
    bases = {row.form: row.reference for row in comparison.ablation}
    head = ["switch", f"added to {bases['add']}"]
    if "leave out" in bases:
        head.append(f"within {bases['leave out']}")
    rows = []
    for name in dict.fromkeys(row.switch for row in comparison.ablation):
        cells, said = {}, []
        for row in comparison.ablation:
            if row.switch != name:
                continue
            ratio = switch_ratio(comparison, row.form, row.label, row.reference)
            nothing = "not on this device" if row.reason else "not measured"
            cells[row.form] = change(ratio) or nothing
            said.append("" if row.reason else verdict(ratio))
        texts = [cells.get(form, "-") for form in bases]
        rows.append([name, *texts, ", ".join(filter(None, said))])
    return Table([*head, "effect shown"], rows)


def switch_ratio(comparison: Comparison, form: str, label: str, reference: str) -> Ratio | None:
    """Return the time per step with a switch relative to that without it."""
    ratio = comparison.ratio(label, reference) if label else None
    return ratio.inverse() if ratio is not None and form == "leave out" else ratio


def sentences(columns: Sequence[Column]) -> list[str]:
    """Say of every variant but the first, in plain words, what was found."""
    first = columns[0]
    said = []
    for column in columns[1:]:
        ratio = column.ratio(first)
        if ratio is None:
            other = not same_load(first.comparison, column.comparison)
            said.append(f"{column.title}: {'another load' if other else 'not measured'}")
            continue
        text = f"{column.title}: {percent(ratio.value)} time per step against {first.title}"
        if ratio.low is not None and ratio.high is not None:
            low, high = percent(ratio.low).removesuffix(" %"), percent(ratio.high)
            text += f" (95 % interval {low} to {high}, {ratio.rounds} rounds): {ratio.verdict}"
        else:
            text += " (one round, no interval)"
        said.append(text)
    return said


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Put what was compared, and where, into labelled lines."""
    settings, engine, machine = comparison.settings, comparison.engine, comparison.machine
    size = f" of {machine['memory'] / 1e9:.1f} GB" if machine["memory"] else ""
    rows = [
        (
            "model",
            f"{comparison.model['name']}, {quantity(comparison.model['parameters'])} parameters",
        ),
        ("data", f"{comparison.data['name']}, {quantity(comparison.data['tokens'])} tokens"),
        ("engine", engine_text(engine)),
        (
            "turns",
            f"{settings['rounds']} rounds of {settings['steps']} steps{_batch(comparison)} of "
            f"{engine['seq']} tokens, an update every {settings['accum']} and at the end of a turn",
        ),
        ("machine", f"{machine['processor']}, {machine['cpus']} CPUs{size}, {machine['system']}"),
        ("library", f"{comparison.library['build_id']}, anepy {comparison.anepy}"),
    ]
    if comparison.peak is not None:
        peak = comparison.peak
        rows.append(("peak", f"{peak['gflops']:,.0f} GFLOP/s, {peak['name']}"))
    return rows


def remarks(comparison: Comparison, switches: bool = True) -> list[str]:
    """List what is worth knowing beside the numbers; `switches`: and why some were not measured."""
    said = list(comparison.notes)
    said += [f"{variant} was left out: {why}" for variant, why in comparison.refused.items()]
    said += [
        f"{row.switch}: not on this device: {row.reason}"
        for row in comparison.ablation
        if switches and row.reason
    ]
    said += _other_groups(comparison)
    tests = sum(bool(row.label) for row in comparison.ablation)
    if tests:
        said.append(
            f"of {tests} intervals that hold in 95 % of cases, {0.05 * tests:.1f} exclude 0 by "
            "chance alone"
        )
    for run in comparison.failures():
        said.append(f"{run.label} ended after {run.rounds} rounds: {run.error}")
    if comparison.interrupted:
        said.append("interrupted: these are the rounds that were complete")
    return said


def _other_groups(comparison: Comparison) -> list[str]:
    """Say which variants did not run beside the first group's reference: times may have drifted."""
    said = []
    reference = comparison.columns[0]
    for number, group in enumerate(comparison.groups[1:], 2):
        labels = [run.label for run in group.runs if run.label in comparison.columns[1:]]
        labels = [label for label in labels if comparison.runs(label)[0] in group.runs]
        beside = spread(group.runs[0].by_round("per_step"))
        if labels and beside is not None and group.runs[0].label == reference:
            said.append(
                f"{', '.join(labels)}: of group {number}, in which {reference} took "
                f"{figure(beside.median)} ms per step: go by the change, not by the times"
            )
    return said


def differences(named: Sequence[tuple[str, Comparison]]) -> list[str]:
    """Say what differs between comparisons that are laid side by side."""
    (name, first), *others = named
    said = []
    for other_name, other in others:
        pairs = {
            "machines": (_place(first), _place(other)),
            "engines": (engine_text(first.engine), engine_text(other.engine)),
            "libraries": (first.library["build_id"], other.library["build_id"]),
            "models": (first.model["name"], other.model["name"]),
            "data": (first.data["name"], other.data["name"]),
            "sequences": (_load(first), _load(other)),
        }
        for what, (a, b) in pairs.items():
            if a != b:
                said.append(f"different {what}: {name} is of {a}, {other_name} of {b}")
        said.append(
            f"{name} and {other_name} were measured apart: their intervals are of rounds that did "
            "not alternate"
        )
    return said


def _load(comparison: Comparison) -> str:
    settings = comparison.settings
    return (
        f"{comparison.engine['seq']} tokens, turns of {settings['steps']} steps"
        f"{_batch(comparison)}, updates every "
        f"{settings['accum']}"
    )


def _batch(comparison: Comparison) -> str:
    count = comparison.setting("batch")
    return "" if count == 1 else f" of {count} sequences"


def _place(comparison: Comparison) -> str:
    machine = comparison.machine
    return f"{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}"


def render(table: Table, width: int) -> list[str]:
    """Lay a table out in lines of at most `width` characters, if the words allow it.

    What does not fit beside each other follows in further blocks, the first column repeated.
    """
    columns = list(range(1, len(table.head)))
    kept = [1] if table.reference else []
    blocks: list[list[int]] = [[]]
    sizes = [
        max(len(text) for text in (line[index] for line in (table.head, *table.rows)))
        for index in range(len(table.head))
    ]
    for index in columns:
        used = sizes[0] + sum(len(_GAP) + sizes[i] for i in blocks[-1])
        if blocks[-1] and used + len(_GAP) + sizes[index] > width:
            blocks.append(list(kept))
        blocks[-1].append(index)
    lines: list[str] = []
    for block in blocks:
        if lines:
            lines.append("")
        shown = [0, *block]
        rule = "-" * (sum(sizes[i] for i in shown) + len(_GAP) * len(block))
        lines.append(_line(table.head, shown, sizes))
        lines.append(rule)
        lines += [_line(row, shown, sizes) for row in table.rows]
    return lines


def _line(cells: Sequence[str], shown: Sequence[int], sizes: Sequence[int]) -> str:
    texts = [cells[shown[0]].ljust(sizes[shown[0]])]
    texts += [cells[index].rjust(sizes[index]) for index in shown[1:]]
    return _GAP.join(texts).rstrip()
