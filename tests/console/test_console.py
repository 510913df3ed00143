"""What a run looks like: lines for programs, a display for people."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anepy.bench.peaks import device_peak
from anepy.console import train as console
from anepy.console.text import (
    Header,
    History,
    header_rows,
    run_text,
    sparkline,
    summary_rows,
)
from anepy.console.train import Live, Plain
from anepy.engine.stats import PHASES, StepStats, UpdateStats
from anepy.system import words
from anepy.system.files import dumps
from anepy.system.words import duration, milliseconds, quantity
from anepy.training.config import TrainConfig
from anepy.training.reports import StepReport, Summary
from anepy.training.run_log import RunLog

PHASE_MS = {phase.key: 0.5 for phase in PHASES}


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "model": "stories110M.bin",
        "shape": {
            "dim": 768,
            "hidden_dim": 2048,
            "n_layers": 12,
            "n_heads": 12,
            "n_kv_heads": 12,
            "vocab_size": 32000,
            "seq_len": 1024,
        },
        "parameters": 109_529_856,
        "embedding": 24_576_000,
        "data": "stories.bin, 20.7 M tokens",
        "settings": vars(TrainConfig(steps=20, lr=1e-4, weight_decay=0.1)) | {"seq": 256},
        "engine": {
            "device": "cpu",
            "precision": "fp32",
            "variant": "max",
            "switches": ["simd_adam", "fp16_cache", "prealloc", "concurrent_dw", "vector_embed"],
            "isa": "avx512",
            "threads": 2,
        },
        "flops": {
            "fwd": 43_486_543_872,
            "bwd_dx": 43_486_543_872,
            "bwd_dw": 43_486_543_872,
            "sdpa_bwd": 6_039_797_760,
            "classifier": 37_748_736_000,
            "total": 174_248_165_376,
        },
        "outputs": {"checkpoint": "stories110M.ckpt.npz"},
    }
    return Header(**(values | changes))


def report(step: int = 1, **changes: Any) -> StepReport:
    stats = StepStats(
        loss=10.0 / step,
        tokens=256,
        step_ms=900.0,
        tflops=0.19,
        flops=1.7e11,
        allocations=0,
        loss_scale=1.0,
        skipped=False,
        **{phase.field: 0.5 for phase in PHASES},
    )
    stats = replace(stats, **{n: changes.pop(n) for n in ("loss", "skipped") if n in changes})
    values: dict[str, Any] = {
        "step": step,
        "total": 20,
        "stats": stats,
        "lr": 3e-4,
        "ms_per_step": 912.3,
        "tokens_per_s": 280.6,
        "gflops": 191.0,
        "update": UpdateStats(math.nan, 70.0, 0.0, False) if step % 10 == 0 else None,
        "updates": step // 10,
        "accumulated": step % 10,
        "compiles": 0,
        "held_out_loss": 2.5 if step == 20 else None,
    }
    return StepReport(**(values | changes))


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "step": 20,
        "total": 20,
        "steps": 20,
        "updates": 2,
        "skipped": 0,
        "tokens": 5120,
        "wall_s": 20.0,
        "train_ms": 18246.0,
        "update_ms": 70.0,
        "compile_ms": 0.0,
        "ms_per_step": 912.3,
        "ms_q1": 900.0,
        "ms_q3": 930.0,
        "tokens_per_s": 270.0,
        "tflops": 0.191,
        "phases": PHASE_MS,
        "allocations": 0,
        "compiles": 11,
        "restarts": 0,
        "peak_memory": 2_000_000_000,
        "first_loss": 5.0,
        "last_loss": 2.0,
        "held_out_before": 5.5,
        "held_out_after": 2.5,
    }
    return Summary(**(values | changes))


# Words and figures


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "1,000 steps of 256 tokens, an update every 10: 100 updates"),
        ({"steps": 95, "batch": 4}, "95 steps of 4 sequences of 256 tokens, an update every 10: 10 "
         "updates"),
        ({"steps": 1, "accum": 1}, "1 step of 256 tokens, an update after each: 1 update"),
    ],
)  # fmt: skip
def test_header_says_how_many_updates_the_steps_are(changes: dict[str, int], text: str) -> None:
    settings = vars(TrainConfig(steps=1000)) | {"seq": 256} | changes
    assert run_text(settings) == text
    assert f"\nRun: {text}\n" in plain_run(settings=settings)


def test_header_says_why_a_precision_was_chosen() -> None:
    engine = dict(header().engine)
    assert "2 threads, fp32; max" in plain_run(engine=engine | {"precision_note": ""})
    late = "one update earlier"
    assert late not in plain_run() and late in plain_run(engine=engine | {"gradients_lag": True})
    note = {"precision_note": "avx2 has no bf16 dot products"}
    expected = "2 threads, fp32 (chosen automatically: avx2 has no bf16 dot products); max"
    assert expected in plain_run(engine=engine | note)


def test_summary_tells_compilations_of_a_run_over_several_processes() -> None:
    assert not [row for row in summary_rows(summary(), "->") if row[0] == "compiles"]
    rows = dict(summary_rows(summary(restarts=2), "->"))
    assert rows["compiles"] == "11 in 3 processes"


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 80) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0], 80) == "▁▁"
    assert sparkline([], 80) == sparkline([1.0], 0) == ""


def test_sparkline_long_series_is_averaged_into_the_width() -> None:
    assert sparkline([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"
    assert len(sparkline([float(i) for i in range(1000)], 77)) == 77
    assert sparkline([0, 7], 9, ascii_only=True).isascii()


def test_history_stays_bounded_and_keeps_the_mean() -> None:
    history = History(64)
    for value in range(10_000):
        history.add(float(value))
    history.add(math.nan)
    values = history.values()
    assert 32 <= len(values) <= 65 and values == sorted(values)
    assert values[0] < 300 and values[-1] > 9700


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (3723, "1:02:03")]
)
def test_duration_reads_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures_are_short() -> None:
    assert [milliseconds(v) for v in (0.123, 12.34, 1234.5)] == ["0.12 ms", "12.3 ms", "1,234 ms"]
    assert [quantity(v) for v in (12, 259_500, 109_529_856)] == ["12", "259.5 K", "109.5 M"]
    assert words.perplexity(1e9) == math.inf


# Lines


def plain_run(**changes: Any) -> str:
    out = io.StringIO()
    plain = Plain(out)
    plain.header(header(**changes))
    plain.start()
    for step in range(1, 21):
        plain.step(report(step))
    plain.stop()
    plain.summary(summary(), ["checkpoint saved: x.npz"])
    plain.sample("Once", "Once upon")
    return out.getvalue()


@pytest.mark.parametrize(
    "pattern",
    [
        r"dim=(\d+) hidden=(\d+) heads=(\d+) seq=(\d+) vocab=(\d+) layers=(\d+)",
        r"Params: ([\d.]+)M \(transformer ([\d.]+)M \+ embed ([\d.]+)M\)",
        r"Accum (\d+).*LR=([\d.e+-]+)",
        r"step\s+(\d+)\s+loss=([\d.]+)",
        r"step 1 +loss=10\.0000  lr=3\.00e-04  912\.3ms/step",
        r"\[batch (\d+): compile=([\d.]+)ms train=([\d.]+)ms \(([\d.]+)ms/step\) compiles=(\d+)\]",
        r"FLOPs/step: fwd=([\d.]+)M bwd_dx=([\d.]+)M bwd_dW=([\d.]+)M sdpa_bwd=([\d.]+)M "
        r"total=174248M",
        r"Total steps: +20\n",
        r"Wall time: +20000 ms",
        r"Compile time: +0 ms \(0\.0%\)",
        r"Train time: +18246 ms \(91\.2%\)",
        r"Avg train: +912\.3 ms/step",
        r"Total TFLOPS: +0\.191",
    ],
)
def test_plain_lines_match_what_dashboards_look_for(pattern: str) -> None:
    assert re.search(pattern, plain_run()), pattern


def test_header_says_what_is_trained_if_not_everything() -> None:
    trained = "12 of 57 tensors, 3.1 of 15.2 M parameters trained"
    assert f"\nTrains: {trained}\n" in plain_run(trained=trained)
    assert ("trains", trained) in header_rows(header(trained=trained))
    assert "Trains" not in plain_run() and "trains" not in dict(header_rows(header()))


def test_plain_summary_names_the_peak_of_its_utilization() -> None:
    out = io.StringIO()
    peak = {"gflops": 480.0, "name": "measured FMA peak"}
    Plain(out).summary(summary(peak=peak, utilization=0.398), [])
    assert "Utilization:     39.8% of 480 GFLOP/s, measured FMA peak\n" in out.getvalue()
    assert "Utilization" not in plain_run(), "no peak, no share of it"


def test_summary_shares_a_peak_only_where_there_is_one() -> None:
    ane = summary().with_peak(device_peak("ane", "fp16", 8))
    assert ane.utilization == pytest.approx(0.191 / 15.8) and ane.peak is not None
    assert summary().with_peak(device_peak("sim", "fp16", 2)) == summary(), (
        "a simulator has no speed"
    )
    assert summary(steps=0).with_peak(ane.peak).peak is None


def test_plain_resumed_run_says_where() -> None:
    assert re.search(r"\[RESUMED step 5, loss=2\.0000\]", plain_run(start=5, losses=[3.0, 2.0]))
    assert "RESUMED" not in plain_run()


def test_plain_output_has_no_control_characters() -> None:
    text = plain_run()
    assert "\x1b" not in text and "\r" not in text


def test_plain_long_run_prints_about_a_hundred_steps() -> None:
    out = io.StringIO()
    plain = Plain(out)
    plain.header(header(settings=dict(header().settings) | {"steps": 5000}))
    for step in range(1, 5001):
        plain.step(report(step, total=5000, update=None, held_out_loss=None))
    lines = re.findall(r"^step (\d+)", out.getvalue(), re.MULTILINE)
    assert 90 <= len(lines) <= 110 and lines[0] == "1" and lines[-1] == "5000"


def test_plain_batch_counts_the_steps_of_its_update() -> None:
    assert "[batch 10: compile=0ms train=9123.0ms (912.3ms/step)" in plain_run()


# The display


def live_run(width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    terminal = Console(file=file, width=width, height=40, force_terminal=True, color_system=None)
    live = Live(terminal)
    live.header(header())
    live.start()
    for step in range(1, 21):
        live.step(report(step))
    live.stop()
    live.summary(summary(), ["checkpoint saved: x.npz"])
    live.sample("Once", "Once upon")
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_live_fits_the_terminal_and_shows_everything(width: int) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live_run(width))
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= width
    for part in ("stories110M.bin", "109.5 M", "avx512", "20/20", "held-out", "summary", "x.npz"):
        assert part in text, part
    if width >= 80:
        for part in ("912 ms/step", "281 tokens/s", "191.0 GFLOP/s", "3.00e-04"):
            assert part in text, part


def test_live_without_unicode_stays_in_ascii() -> None:
    text = live_run(80, encoding="ascii")
    assert "loss" in text and "@" in text


def test_live_shows_that_a_stop_was_seen() -> None:
    out = io.StringIO()
    live = Live(Console(file=out, width=80, force_terminal=True))
    live.header(header())
    live.start()
    live.step(report(1))
    live.stopping()
    live.stop()
    assert "stopping after this step" in out.getvalue()


def test_reporter_is_plain_off_a_terminal_and_silent_for_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(console.reporter(quiet=False), Plain)
    assert type(console.reporter(quiet=True)) is console.Reporter


def test_live_honours_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    live = Live(Console(file=out, width=80, force_terminal=True))
    live.header(header(notes=["a note"]))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", out.getvalue())


# The log


def test_log_has_the_keys_of_the_research_programs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.run({"model": "m"}, "cpu")
        for step in range(1, 21):
            log.step(report(step))
        log.summary(summary())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [record["type"] for record in records]
    assert [kinds.count(k) for k in ("run", "step", "batch", "perf", "eval", "summary")] == [
        1, 20, 2, 2, 1, 1,
    ]  # fmt: skip
    step = next(record for record in records if record["type"] == "step")
    assert {
        "step", "loss", "t_ane", "t_io", "t_cls", "t_elem", "t_rms", "t_cblas_wait", "compiles",
    } <= set(step)  # fmt: skip
    assert step["t_elem"] == 1.0, "softmax and loss belong to it"
    batch = next(record for record in records if record["type"] == "batch")
    assert (batch["batch"], batch["compile_ms"]) == (10, 0.0)
    assert batch["train_ms"] == pytest.approx(9123.0)
    assert batch["ms_per_step"] == pytest.approx(912.3)
    perf = next(record for record in records if record["type"] == "perf")
    assert (perf["ane_tflops"], perf["ane_util_pct"]) == (0.0, 0.0), "the CPU is no ANE"
    assert perf["tflops"] == pytest.approx(0.191)


def test_report_survives_json() -> None:
    for step in (3, 10):
        for stats in (report(step), report(step, held_out_loss=1.5)):
            record = json.loads(json.dumps(asdict(stats)))
            assert repr(StepReport.from_record(record)) == repr(stats), "NaN equals no NaN"


def test_log_append_continues_and_default_replaces(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for after, lines in ((None, 1), (0, 2), (None, 1)):
        with RunLog(path, after) as log:
            log.run({}, "cpu")
        assert len(path.read_text().splitlines()) == lines


def test_log_on_full_disk_ends_quietly_and_says_so() -> None:
    with RunLog("/dev/full") as log:
        log.run({}, "cpu")
        log.step(report(1))
    assert log.failure is not None and "space" in str(log.failure)


def test_json_is_strict_about_numbers() -> None:
    assert json.loads(dumps({"a": math.nan, "b": [math.inf, 1.5]})) == {"a": None, "b": [None, 1.5]}
