"""`anepy compare --submit`: the form of the public tables, with nothing made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cases import message
from comparisons import make_comparison, make_run

from anepy.comparing.result import Comparison, Group
from anepy.comparing.submission import submission
from anepy.models.model import PRESETS
from anepy.system.files import dumps


def on_a_mac(**changes: Any) -> Comparison:
    """Return written numbers under the names a Mac would have."""
    base, ane = make_run("baseline", 100.0, 600.0), make_run("ane", 80.0, 500.0)
    ane.switches = ["offload_classifier"]
    for run in (base, ane):
        run.updates["compile_ms"] = [400.0] * run.rounds
    result = make_comparison({"baseline": 0.0, "ane": 0.0}, groups=[Group([base, ane])], **changes)
    result.engine = result.engine | {"device": "ane", "precision": "fp16"}
    result.machine = {
        "system": "Darwin 25.2.0 arm64",
        "processor": "Apple M4 Max",
        "cpus": 16,
        "memory": 128 * 2**30,
        "macos": "26.2",
        "macos_build": "25C56",
        "model": "Mac16,5",
    }
    result.model = result.model | {"shape": vars(PRESETS["stories110M"])}
    return result


def test_submission_is_schema_1() -> None:
    record = json.loads(dumps(submission(on_a_mac())))
    assert record["schema_version"] == 1 and record["timestamp"] == "2026-01-31T12:00:00Z"
    assert record["system"] == {
        "chip": "Apple M4 Max", "machine": "Mac16,5", "macos_version": "26.2",
        "macos_build": "25C56", "cpu_cores": 16, "memory_gb": 128, "neural_engine_cores": None,
    }  # fmt: skip
    assert record["benchmarks"]["sram_probe"] == record["benchmarks"]["inmem_peak"] == []
    on_cpu = record["benchmarks"]["training_cpu_classifier"]
    on_ane = record["benchmarks"]["training_ane_classifier"]
    assert on_cpu["ms_per_step"] == pytest.approx(100, rel=0.01)
    assert on_ane["ms_per_step"] == pytest.approx(80, rel=0.01)
    # 93,013 MFLOP on the engine in 100 ms, of 15.8 TFLOPS (docs/neural-engine.md#flops)
    assert on_cpu["ane_tflops_sustained"] == pytest.approx(0.930, rel=0.01)
    assert on_cpu["ane_util_pct"] == pytest.approx(5.89, rel=0.01)
    assert on_ane["ane_tflops_sustained"] == pytest.approx((93.013 + 12.583) / 80, rel=0.01)
    # a turn of four steps: 400 ms, 400 of compiling, 200 of update
    assert on_cpu["compile_pct"] == pytest.approx(40, abs=0.5)
    summary = record["summary"]
    assert summary["training_ms_per_step_cpu"] == on_cpu["ms_per_step"]
    assert summary["training_ms_per_step_ane"] == on_ane["ms_per_step"]
    assert summary["training_ane_tflops"] == on_ane["ane_tflops_sustained"]
    assert summary["peak_tflops"] is None, "not measured here"


def test_submission_is_the_list_of_machines_too() -> None:
    record = submission(on_a_mac())
    assert record["report_date"] == "2026-01-31" and "anepy" in record["source"]
    assert record["config"] == {
        "dim": 768, "hidden": 2048, "heads": 12, "seq": 256, "vocab": 32000, "layers": 12,
    }  # fmt: skip
    first, second = record["training_results"]
    assert (first["chip"], first["macos"], first["ram_gb"]) == ("M4 Max", "26.2", 128)
    low, high = first["ms_per_step"]
    assert 98 < low < 100 < high < 102
    assert first["ane_tflops"][0] < first["ane_tflops"][1]
    assert first["compile_ms"] == [400, 400] and first["ane_ms"] is None
    assert "baseline" in first["notes"] and "offload_classifier" in second["notes"]


def test_submission_without_a_variant_leaves_its_place_empty() -> None:
    result = on_a_mac()
    result.columns = ["baseline"]
    record = submission(result)
    assert record["benchmarks"]["training_ane_classifier"] is None
    assert record["summary"]["training_ms_per_step_ane"] is None


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_submission_of_another_device_is_refused(device: str) -> None:
    result = on_a_mac()
    result.engine["device"] = device
    said = message(lambda: submission(result))
    assert f"device {device}" in said and "--json" in said


def test_submission_from_no_mac_is_refused() -> None:
    """Stand-in frameworks let the device run on Linux; their times are nobody's."""
    result = on_a_mac()
    del result.machine["macos"]
    assert "leave out --submit" in message(lambda: submission(result))


def test_submission_of_another_model_is_refused() -> None:
    result = on_a_mac()
    result.engine["seq"] = 512
    assert "--seq 256" in message(lambda: submission(result))
    result = on_a_mac()
    result.model["shape"] = vars(PRESETS["stories15M"])
    assert "stories110M" in message(lambda: submission(result))


def test_submission_of_nothing_is_refused() -> None:
    result = on_a_mac()
    result.groups[0].runs = [make_run("baseline", 1.0, rounds=0, error="failed")]
    assert "nothing to submit" in message(lambda: submission(result))
