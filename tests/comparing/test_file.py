"""Results as files and as tables: what is written is read back, what is broken is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cases import message
from comparisons import make_comparison, make_run

from anepy.comparing import words as text
from anepy.comparing.file import as_record, load, save
from anepy.comparing.result import Group, columns

# Files


@pytest.mark.parametrize("ablate", [False, True])
def test_result_is_read_back_as_it_was(tmp_path: Path, ablate: bool) -> None:
    first = make_comparison(ablate=ablate, refused={"dynamic": "why not"}, notes=["a note"])
    first.groups[0].runs[1].error = "it failed"
    save(first, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == first


def test_result_with_a_missing_number_is_read_back(tmp_path: Path) -> None:
    first = make_comparison()
    first.groups[0].runs[0].updates["grad_norm"][0] = math.nan
    save(first, tmp_path / "r.json")
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert math.isnan(load(tmp_path / "r.json").groups[0].runs[0].updates["grad_norm"][0])


def test_record_tells_version_and_what_follows() -> None:
    record = as_record(make_comparison(ablate=True))
    assert (record["format"], record["version"]) == ("anepy-compare", 1)
    assert record["groups"][0]["runs"][0]["steps"]["step_ms"]
    opt = next(item for item in record["summary"] if item.get("variant") == "opt")
    assert opt["ratio"]["value"] == pytest.approx(452.5 / 512.5, rel=0.01)
    assert opt["ratio"]["verdict"] == "faster" and opt["agreement"]["identical"] is True
    switch = next(item for item in record["summary"] if item.get("switch") == "metal_dw")
    assert switch["ratio"] is None and switch["reason"]
    json.dumps(record)


def test_save_that_fails_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    said = message(lambda: save(make_comparison(), tmp_path / "no" / "r.json"))
    assert "cannot write results" in said and "no/r.json" in said
    (tmp_path / "folder").mkdir()
    assert "folder" in message(lambda: save(make_comparison(), tmp_path / "folder"))


def test_load_of_no_file_is_one_line(tmp_path: Path) -> None:
    assert "no.json" in message(lambda: load(tmp_path / "no.json"))
    assert "cannot read" in message(lambda: load(tmp_path))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\0", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no result of anepy compare"),
        (b"{}", "no result of anepy compare"),
        (b'{"format": "anepy-compare", "version": 2}', "version 2"),
        (b'{"format": "anepy-compare"}', "version None"),
        (b'{"format": "anepy-compare", "version": 1}', "is damaged"),
    ],
)
def test_load_of_something_else_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "r.json").write_bytes(content)
    said = message(lambda: load(tmp_path / "r.json"))
    assert part in said and "r.json" in said


def replace(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


RUN = ("groups", 0, "runs", 0)


@pytest.mark.parametrize(
    "damage",
    [
        drop("created"),
        drop("machine", "processor"),
        drop("settings", "seed"),
        drop(*RUN, "label"),
        drop(*RUN, "steps", "wall_ms"),
        drop(*RUN, "steps", "round"),
        drop(*RUN, "steps", "loss"),
        drop(*RUN, "updates", "compile_ms"),
        drop("groups", 0, "orders"),
        replace("machine", value=None),
        replace("machine", "cpus", value="two"),
        replace("engine", "precision", value="fp7"),
        replace("engine", "threads", value=True),
        replace("peak", value={"name": "x"}),
        replace("peak", "gflops", value=0),
        replace("columns", value=[]),
        replace("columns", value=["unknown"]),
        replace("columns", value="baseline"),
        replace("refused", value={"a": 1}),
        replace("notes", value=[1]),
        replace("settings", "rounds", value=0),
        replace("settings", "seed", value=-1),
        replace("settings", "lr", value="fast"),
        replace("groups", value=None),
        replace("groups", value=[1]),
        replace(*RUN, "unknown", value=1),
        replace(*RUN, "rounds", value=99),
        replace(*RUN, "rounds", value=1.5),
        replace(*RUN, "steps", value=[]),
        replace(*RUN, "steps", "wall_ms", 0, value=None),
        replace(*RUN, "steps", "wall_ms", 0, value=0),
        replace(*RUN, "steps", "step_ms", 0, value=-1),
        replace(*RUN, "steps", "wall_ms", 0, value="x"),
        replace(*RUN, "steps", "loss", value=[1.0]),
        replace(*RUN, "steps", "round", 0, value=None),
        replace("ablation", value=[{"switch": "x"}]),
        replace("ablation", 0, "label", value="unknown"),
    ],
)
def test_load_of_a_damaged_result_is_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    save(make_comparison(ablate=True), tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    damage(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    said = message(lambda: load(tmp_path / "r.json"))
    assert "r.json is damaged" in said


def test_load_ignores_the_summary(tmp_path: Path) -> None:
    save(make_comparison(), tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    record["summary"] = "lies"
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert load(tmp_path / "r.json") == make_comparison()


# Tables


def cells(table: text.Table, label: str) -> list[str]:
    return list(next(row for row in table.rows if row[0].strip() == label)[1:])


def test_two_variants_have_a_delta_with_its_interval() -> None:
    table = text.metrics(columns([("", make_comparison())]))
    assert list(table.head) == ["", "baseline", "opt", "delta"]
    # 50 ms of update in every turn of four steps, and a scatter of 2 %.
    assert [float(cell) for cell in cells(table, "ms/step")[:2]] == [
        pytest.approx(512.5, rel=0.005), pytest.approx(452.5, rel=0.005),
    ]  # fmt: skip
    delta = cells(table, "ms/step")[2]
    assert delta.startswith("-11.7 % (-11.7, -11.7)")
    assert cells(table, "device")[2] == "-12.0 %"
    assert cells(table, "update") == ["50.0", "50.0", "0.0 % (0.0, 0.0)"]
    assert cells(table, "allocations/step") == ["132", "132", "0"]
    assert cells(table, "memory") == ["2,100 MB", "2,100 MB", "0.0 %"]
    assert cells(table, "loss curves")[:2] == ["reference", "bit-identical"]
    assert float(cells(table, "utilization")[0].strip("%")) == pytest.approx(
        100 * 1.7e11 / 0.5 / 480e9, rel=0.01
    )


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_width_and_lose_nothing(width: int) -> None:
    times = {name: 500.0 - at for at, name in enumerate(
        ["baseline", "opt", "ane", "dynamic", "double-buffer", "max", "max-offload_classifier"]
    )}  # fmt: skip
    table = text.metrics(columns([("", make_comparison(times))]))
    lines = text.render(table, width)
    assert max(map(len, lines)) <= width
    for name in times:
        assert any(name in line for line in lines)
    for block in "\n".join(lines).split("\n\n"):
        assert "baseline" in block.splitlines()[0], "the reference stands in every block"
        assert block.count("ms/step") == 1


def test_many_variants_have_change_and_interval_rows() -> None:
    shown = columns([("", make_comparison({"baseline": 500.0, "opt": 440.0, "max": 560.0}))])
    table = text.metrics(shown)
    assert cells(table, "change")[0] == "" and cells(table, "change")[2].startswith("+11.7")
    assert cells(table, "95 % interval")[1].startswith("(-11.")
    said = text.sentences(shown)
    assert said[0].endswith("faster") and said[1].endswith("slower") and "6 rounds" in said[0]


def test_switches_table_shows_help_none_and_not_on_this_device() -> None:
    comparison = make_comparison(ablate=True)
    noisy = make_run("baseline+prealloc", 500.0, scatter=0.2)
    noisy.steps["wall_ms"] = [ms * (1 + 0.3 * math.cos(at)) for at, ms in
                              enumerate(noisy.steps["wall_ms"])]  # fmt: skip
    comparison.groups[0].runs[3] = noisy
    table = text.switches(comparison)
    assert table is not None and list(table.head) == [
        "switch", "added to baseline", "effect shown",
    ]  # fmt: skip
    rows = {row[0]: row for row in table.rows}
    assert rows["simd_adam"][1].startswith("-1.5 % (") and rows["simd_adam"][2] == "helps"
    assert rows["prealloc"][2] == "none"
    assert rows["metal_dw"][1] == "not on this device" and rows["metal_dw"][2] == ""
    assert any("metal_dw: not on this device: switch metal_dw" in line
               for line in text.remarks(comparison))  # fmt: skip
    assert max(map(len, text.render(table, 80))) <= 80


def test_switch_left_out_is_told_the_same_way_round() -> None:
    """Without it the step takes longer: the switch saves time, which is a negative change."""
    comparison = make_comparison({"max": 400.0, "max-prealloc": 440.0})
    row = text.switch_ratio(comparison, "leave out", "max-prealloc", "max")
    assert (
        row is not None
        and row.verdict == "faster"
        and row.value == pytest.approx(412.5 / 452.5, rel=1e-3)
    )


def test_interrupted_and_failed_runs_are_shown() -> None:
    comparison = make_comparison({"baseline": 500.0, "opt": 440.0, "max": 400.0}, interrupted=True)
    comparison.groups[0].runs[2] = make_run("max", 1.0, rounds=0, error="the device failed")
    shown = columns([("", comparison)])
    table = text.metrics(shown)
    assert cells(table, "ms/step")[2] == "-" and cells(table, "loss curves")[2] == "-"
    assert "max: not measured" in text.sentences(shown)
    said = " ".join(text.remarks(comparison))
    assert "max ended after 0 rounds: the device failed" in said and "interrupted" in said
    nothing = make_comparison(groups=[Group([make_run("baseline", 1.0, rounds=0)])])
    assert text.metrics(columns([("", nothing)])).rows == [
        ["memory", "2,100 MB", "-", ""],
        ["loss curves", "reference", "-", ""],
    ]


def test_losses_that_part_are_told() -> None:
    run = make_run("opt", 440.0)
    losses = list(run.steps["loss"])
    base = make_run("baseline", 500.0)
    for factor, switches, said in (
        (1.02, ["prealloc"], "apart by 2.0%"),
        (1.02, ["background_compile"], "apart by 2.0%, one update late"),
        (1.02, ["background_compile", "dynamic_weights"], "apart by 2.0%"),
        (1.0001, ["background_compile"], "agree to 1e-04"),
    ):
        run.switches = switches
        run.steps["loss"] = [loss * factor for loss in losses]
        shown = columns([("", make_comparison(groups=[Group([base, run])]))])
        assert text.losses_text(shown[1], shown[0]) == said


def test_files_of_other_machines_say_so() -> None:
    here = make_comparison()
    there = make_comparison({"opt": 220.0})
    there.machine = there.machine | {"processor": "Apple M4", "system": "Darwin 25 arm64"}
    there.library = there.library | {"build_id": "other"}
    named = [("epyc", here), ("m4", there)]
    shown = columns(named)
    assert [column.title for column in shown] == ["epyc: baseline", "epyc: opt", "m4: opt"]
    ratio = shown[2].ratio(shown[0])
    assert ratio is not None and ratio.value == pytest.approx(232.5 / 512.5, rel=0.01)
    said = " ".join(text.differences(named))
    assert "different machines: epyc is of AMD EPYC" in said and "Apple M4" in said
    assert "libraries" in said and "models" not in said and "measured apart" in said
    assert text.losses_text(shown[2], shown[0]) == "bit-identical", "the same work"
    there.settings = there.settings | {"lr": 1.0}
    assert text.losses_text(shown[2], shown[0]) == "other work"


def test_figures_are_short() -> None:
    assert [text.figure(v) for v in (0.01234, 1.234, 12.34, 1234.5, 12345.6)] == [
        "0.012", "1.23", "12.3", "1234.5", "12,346",
    ]  # fmt: skip
    assert [text.percent(v) for v in (0.9, 1.0, 0.9999, 3.5)] == [
        "-10.0 %", "0.0 %", "0.0 %", "+250 %",
    ]  # fmt: skip
    assert [text.megabytes(v) for v in (4.16e6, 2.1e9)] == ["4.2 MB", "2,100 MB"]


def test_comparison_is_plain_data() -> None:
    assert asdict(make_comparison())["columns"] == ["baseline", "opt"]


def test_variant_of_another_group_says_so() -> None:
    """Its reference may have been slower there: the times mislead, the change does not."""
    comparison = make_comparison({"baseline": 500.0, "opt": 440.0})
    slow = [make_run("baseline", 1000.0), make_run("max", 800.0)]
    comparison.groups.append(Group(slow, comparison.groups[0].orders))
    comparison.columns.append("max")
    (said,) = text.remarks(comparison)
    assert re.match(r"max: of group 2, in which baseline took 101\d.* by the change", said)
    ratio = comparison.ratio("max", "baseline")
    assert ratio is not None and ratio.value == pytest.approx(812.5 / 1012.5, rel=1e-3)
