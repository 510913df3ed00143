"""Predicted times: what is counted, what is fitted, and how it is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from cases import make_model, sequence
from commands import Run, assert_one_line_error, runner

from anepy.comparing.predicted import predict_variants, record, sentences, tables
from anepy.engine import Engine
from anepy.errors import ConfigError
from anepy.hardware import predict
from anepy.hardware.chips import CHIPS, PUBLISHED
from anepy.models.model import ModelConfig

SMALL = ModelConfig(64, 96, 2, 4, 2, 160, 64)
VARIANTS = ("baseline", "opt", "ane", "dynamic", "resident", "max+offload_dw", "opt+fused_layer")
COUNTS = predict.Counts(
    72, 621_000_000, 253_000_000, 279_000_000, 16_384_000, 1e11, 3.8e10, 4.3e10, 0
)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the counts of the published steps, which take seconds, by the same for all."""
    monkeypatch.setattr(predict, "_reference", lambda variant, vocab: COUNTS)
    predict.fitted.cache_clear()
    predict.checks.cache_clear()
    yield
    predict.fitted.cache_clear()
    predict.checks.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_a_step_that_runs_its_programs(variant: str) -> None:
    counted = predict.count(SMALL, variant, 64)
    with Engine(make_model(SMALL), variant, "sim:m4", seq_len=64) as engine:
        engine.step(*sequence(SMALL, 64))
        stats = asdict(engine.step(*sequence(SMALL, 64)))
    assert {name: stats[name] for name in asdict(counted)} == asdict(counted)
    assert counted.dispatches > 0 and counted.device_flops > 0 and counted.io_nbytes > 0


def test_work_goes_where_switches_send_it() -> None:
    plain, offloaded = (predict.count(SMALL, v, 64) for v in ("baseline", "ane"))
    assert plain.dispatches == 12 and offloaded.dispatches == 12 + 2 * 2 + 5
    moved = 2 * 2 * SMALL.vocab_size * SMALL.dim * 64  # logits, and the gradient of their input
    assert offloaded.device_flops - plain.device_flops == moved
    assert plain.host_flops - offloaded.host_flops == moved
    assert plain.host_exps == 2 * SMALL.vocab_size * 64 and offloaded.host_exps == 0
    assert plain.dw_flops == offloaded.dw_flops > 0


def test_fit_finds_the_rates_that_made_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"dw": 0.7, "exps": 0.5, "elements": 0.02}
    rng = np.random.default_rng(0)
    counts = {
        p: replace(COUNTS, dw_flops=x * 4e10, host_exps=int(y * 2e7), host_nbytes=int(z * 3e8))
        for p, (x, y, z) in zip(PUBLISHED, rng.random((len(PUBLISHED), 3)), strict=True)
    }
    monkeypatch.setattr(predict, "_counted", counts.get)
    steps = []
    for step in PUBLISHED:
        chip = CHIPS[step.chip]
        known = predict._known(chip, counts[step])
        whole = predict._to_fit(chip, counts[step])
        ms = sum(known.values()) - known["dw"] + float(np.dot(list(rates.values()), whole))
        steps.append(replace(step, ms=ms))
        counts[steps[-1]] = counts[step]
    monkeypatch.setattr(predict, "PUBLISHED", tuple(steps))
    predict.fitted.cache_clear()
    predict.checks.cache_clear()
    assert predict.fitted() == pytest.approx(rates)
    assert predict.held_out_error() == pytest.approx(0, abs=1e-9)
    predict.fitted.cache_clear()
    predict.checks.cache_clear()


def test_fitted_rates_are_fewer_than_the_steps_they_are_fitted_to() -> None:
    fitted = [step for step in PUBLISHED if step.fitted]
    assert 3 < len(fitted) < len(PUBLISHED) / 2
    for step in PUBLISHED:
        assert step.chip in CHIPS and step.source and step.ms > 0


@pytest.mark.usefixtures("published")
def test_prediction_is_the_sum_of_its_parts_and_says_so() -> None:
    found = predict_variants(["baseline", "ane"], ("small", SMALL), 64, ["m4", "m3max"])
    for predictions in found.predictions.values():
        for p in predictions:
            assert p.ms == pytest.approx(sum(p.parts.values())) and p.ms > 0
    counted, times = tables(found)
    assert "predicted" not in str(counted) and " ms" not in str(counted)
    assert times.head[0] == "predicted, not measured"
    assert all("predicted" in row[0] for row in times.rows) and len(times.rows) == 2
    assert "mean error" in sentences()[0]
    made = record(found, ["anepy"])
    for chips in (variant["chips"] for variant in made["variants"].values()):
        assert set(chips) == {"m4", "m3max"}
        for values in chips.values():
            assert all(name.startswith("predicted_") for name in values)


@pytest.mark.usefixtures("published")
def test_compare_predict_prints_and_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run: Run = runner(capsys, monkeypatch, "compare")
    words = ["baseline", "opt", "--preset", "stories260K", "--seq", 64, "--predict", "--chip", "m4"]
    result = run(*words, "--device", "sim:m4", "--json", "p.json")
    assert result.code == 0 and result.err == ""
    assert "dispatches" in result.out and "M4, predicted ms" in result.out
    made = json.loads(Path("p.json").read_text())
    assert made["format"] == "anepy-prediction" and list(made["variants"]) == ["baseline", "opt"]
    assert json.loads(run(*words, "--json", "-").out)["variants"] == made["variants"]
    for wrong in (["--rounds", 2], ["--load"], ["--report", "x.html"]):
        result = run(*words, *wrong)
        assert result.code == 2 and "predict" in result.err
    assert run("baseline", "opt", "--chip", "m4").code == 2
    assert_one_line_error(run(*words, "--device", "cpu"), "device cpu", "sim:m4")
    assert_one_line_error(run(*words, "--chip", "m9"), "'m9'", "m3max")


def test_chip_without_figures_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose of"):
        predict.predict(COUNTS, "m1")
