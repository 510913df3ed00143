"""Measuring in turns: who runs when, on which data, what is kept when something fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import needs
import numpy as np
import pytest
from cases import GQA, SEPARATE, make_model, message

import anepy
from anepy.comparing.config import CompareConfig
from anepy.comparing.file import load
from anepy.comparing.result import Comparison
from anepy.comparing.session import Progress, compare, synthetic
from anepy.comparing.turns import rotated
from anepy.engine import Engine
from anepy.errors import ConfigError, DataError, ModelError, NativeError
from anepy.models.model import Model, ModelConfig
from anepy.system import machine
from anepy.text.data import Sampler, TokenData
from anepy.training.config import TrainConfig
from anepy.training.trainer import Trainer

SMALL = CompareConfig(rounds=3, steps=2, warmup=1, accum=2, seq=16, device="cpu", precision="fp32")
DATA = TokenData.from_array(np.random.default_rng(5).integers(0, GQA.vocab_size, 500))


def small(variants: list[str], **changes: Any) -> Comparison:
    settings = {**vars(SMALL), **{k: v for k, v in changes.items() if k in vars(SMALL)}}
    others = {k: v for k, v in changes.items() if k not in vars(SMALL)}
    return compare(variants, make_model(), DATA, CompareConfig(**settings), **others)


def test_compare_is_public() -> None:
    assert anepy.compare is compare and anepy.CompareConfig is CompareConfig


def test_turns_alternate_and_the_first_one_changes() -> None:
    assert [rotated(3, round_) for round_ in range(4)] == [
        [0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2],
    ]  # fmt: skip
    seen: list[tuple[int, str]] = []
    result = small(
        ["baseline", "opt", "opt-prealloc"],
        progress=lambda p: seen.append((p.round, p.label)),
    )
    names = ["baseline", "opt", "opt-prealloc"]
    assert seen[:3] == [(0, name) for name in names], "everyone warms up first"
    for round_ in range(3):
        expected = [(round_ + 1, names[(round_ + at) % 3]) for at in range(3)]
        assert seen[3 + 3 * round_ : 6 + 3 * round_] == expected
    assert result.groups[0].orders == [rotated(3, round_) for round_ in range(3)]


def test_progress_counts_to_its_total() -> None:
    seen: list[Progress] = []
    small(["baseline", "opt"], progress=seen.append)
    assert [p.done for p in seen] == list(range(8)) and {p.total for p in seen} == {8}


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_samples_are_those_of_an_engine_on_its_own(warmup: int) -> None:
    """Turns in between, warm-up and rounds change nothing of what is computed."""
    model = make_model()
    before = model.arena.copy()
    result = compare(
        ["baseline", "opt"], model, DATA, CompareConfig(**{**vars(SMALL), "warmup": warmup})
    )
    assert np.array_equal(model.arena, before), "the model of the caller is left alone"
    for label in ("baseline", "opt"):
        (run,) = result.runs(label)
        expected, sampler = [], Sampler(DATA, 16, 0)
        with Engine(make_model(), label, "cpu", "fp32", 16) as engine:
            for steps in [*([warmup] if warmup else []), 2, 2, 2]:
                for step in range(1, steps + 1):
                    expected.append(engine.step(*sampler.next()).loss)
                    if engine.accumulated == 2 or step == steps:
                        engine.update(lr=SMALL.lr)
        assert run.steps["loss"] == expected
        assert run.steps["round"] == [-1.0] * warmup + [0, 0, 1, 1, 2, 2]
        assert run.rounds == 3 and len(run.timed("step_ms")) == 6
        assert len(run.timed_updates("wall_ms")) == 3


def test_compare_measures_what_train_does() -> None:
    """The same losses as a training with the same settings: batch, schedule, AdamW and all."""
    settings: dict[str, Any] = {
        "batch": 3, "accum": 2, "seq": 16, "lr": 1e-2, "schedule": "cosine", "min_lr_ratio": 0.2,
        "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "grad_clip": 0.5, "seed": 4,
        "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    config = CompareConfig(rounds=3, steps=4, warmup=4, lr_warmup=3, **settings)
    result = compare(["baseline", "opt"], make_model(), DATA, config)
    for label in ("baseline", "opt"):
        (run,) = result.runs(label)
        train = TrainConfig(steps=16, warmup=3, variant=label, **settings)
        with Trainer(make_model(), DATA, train) as trainer:
            reports = list(trainer)
            memory = trainer.engine.memory
        assert run.steps["loss"] == [report.loss for report in reports]
        norms = [report.update.grad_norm for report in reports if report.update]
        assert run.updates["grad_norm"] == norms and len(norms) == config.updates == 8
        assert run.memory == 4 * make_model().arena.nbytes + memory, "of a batch, not a sequence"
    measured = result.summary("opt")
    assert measured.per_step is not None
    assert measured.tokens_per_s == pytest.approx(48e3 / measured.per_step.median)


def test_turn_ends_with_an_update_of_what_is_left() -> None:
    result = small(["baseline", "opt"], steps=5, accum=2, rounds=1, warmup=0)
    assert result.runs("opt")[0].updates["round"] == [0.0, 0.0, 0.0]


def test_times_per_round_add_up() -> None:
    result = small(["baseline", "opt"])
    run = result.runs("opt")[0]
    for round_ in range(3):
        here = [i for i, number in enumerate(run.steps["round"]) if number == round_]
        there = [i for i, number in enumerate(run.updates["round"]) if number == round_]
        wall = sum(run.steps["wall_ms"][i] for i in here)
        update = sum(run.updates["wall_ms"][i] for i in there)
        assert run.by_round("per_step")[round_] == pytest.approx((wall + update) / 2)
        assert run.by_round("step")[round_] == pytest.approx(
            np.median([run.steps["step_ms"][i] for i in here])
        )
    measured = result.summary("opt")
    assert sum(measured.means.values()) == pytest.approx(np.mean(run.timed("step_ms")))
    assert set(measured.means) == {
        "device", "io", "classifier", "softmax + loss", "norms", "elementwise", "dW, waited for",
        "other",
    }  # fmt: skip


def test_comparison_says_what_it_is_of() -> None:
    result = small(["baseline", "opt"], command=["anepy", "compare"])
    assert result.engine["device"] == "cpu" and result.engine["precision"] == "fp32"
    assert result.engine["seq"] == 16 and result.settings["seq"] == 16
    assert len(result.library["sha256"]) == 64 and result.library["isa"]
    assert result.machine["processor"] and result.command == ["anepy", "compare"]
    assert result.peak is not None and result.peak["name"] == "measured FMA peak"
    run = result.runs("opt")[0]
    assert run.memory >= 4 * make_model().arena.nbytes and "prealloc" in run.switches
    assert result.summary("opt").allocations == 0
    assert (result.summary("baseline").allocations or 0) > 0


def test_same_variant_twice_is_two_columns() -> None:
    result = small(["opt", "opt", "opt"])
    assert result.columns == ["opt", "opt (2)", "opt (3)"]
    losses = [result.summary(label).losses for label in result.columns]
    assert losses[0] == losses[1] == losses[2]


def test_losses_of_all_variants_agree() -> None:
    result = small(["baseline", "opt", "opt-simd_adam", "baseline+prealloc"], rounds=5)
    first, *others = anepy.comparing.result.columns([("", result)])
    for column in others:
        found = column.agreement(first)
        assert found is not None and found.agrees and found.steps == 11
    exact = [column.agreement(first).identical for column in others]  # type: ignore[union-attr]
    assert exact[1:] == [True, True], "those that only move memory"


# What is refused


@pytest.mark.parametrize(
    ("variants", "parts"),
    [
        (["baseline", "nonsense"], ["nonsense", "baseline, opt"]),
        (["baseline", "opt+nonsense"], ["nonsense"]),
        (["baseline"], ["name two"]),
        ([], ["nothing to compare"]),
        (["opt", "opt+metal_dw"], ["metal_dw", "1 of 2 variants"]),
    ],
)
def test_variants_that_cannot_be_compared_are_one_line(
    variants: list[str], parts: list[str]
) -> None:
    said = message(lambda: small(variants))
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"accum": -1}, "accum is -1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seq": 0}, "seq is 0"),
        ({"seq": 10_000}, "context is"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"schedule": "cubic"}, "schedule is cubic"),
        ({"lr_warmup": -1}, "lr_warmup is -1"),
        ({"grad_clip": 0.0}, "grad_clip is 0"),
        ({"device": "toaster"}, "toaster"),
        ({"precision": "fp7"}, "fp7"),
        ({"threads": 2**40}, "threads"),
    ],
)
def test_settings_out_of_range_are_one_line(changes: dict[str, Any], part: str) -> None:
    assert part in message(lambda: small(["baseline", "opt"], **changes))


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    message(lambda: compare(["opt", "max"], tmp_path / "no.bin", DATA, SMALL), ModelError)
    message(lambda: compare(["opt", "max"], make_model(), tmp_path / "no.bin", SMALL), DataError)
    beyond = TokenData.from_array(np.full(500, GQA.vocab_size))
    message(lambda: compare(["opt", "max"], make_model(), beyond, SMALL), DataError)
    message(lambda: compare(["opt", "max"], config=SMALL, preset="stories1B"))


def test_variant_of_another_device_is_left_out_with_its_reason() -> None:
    result = small(["baseline", "opt+metal_dw", "opt"])
    assert result.columns == ["baseline", "opt"]
    assert "switch metal_dw" in result.refused["opt+metal_dw"]


def test_variant_that_does_not_take_the_model_is_left_out_with_its_reason() -> None:
    model = make_model(ModelConfig(32, 48, 1, 2, 2, 65537, 64))
    config = replace(SMALL, device="sim", precision="fp16", steps=1, rounds=1, ablate=True)
    result = compare(["baseline", "ane", "max"], model, config=config)
    assert result.columns == ["baseline", "max"]
    assert "offload_softmax takes a vocabulary of up to 65536" in result.refused["ane"]
    assert "offload_softmax" not in result.runs("max")[0].switches
    (row,) = (row for row in result.ablation if row.switch == "offload_softmax")
    assert row.reason.endswith("on device sim, the model has 65537")


# Memory


def with_memory(monkeypatch: pytest.MonkeyPatch, engines: float) -> None:
    """Leave memory for this many engines of the small model."""
    need = small(["baseline", "opt"], rounds=1).runs("baseline")[0].memory
    monkeypatch.setattr(machine, "available_memory", lambda: int(engines * need / 0.9) + 1000)


def test_short_memory_makes_groups_that_share_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_memory(monkeypatch, 3.2)
    alive, most = 0, 0
    real_init, real_close = Engine.__init__, Engine.close

    def init(self: Engine, *args: Any, **more: Any) -> None:
        nonlocal alive, most
        real_init(self, *args, **more)
        alive += 1
        most = max(most, alive)

    def close(self: Engine) -> None:
        nonlocal alive
        alive -= self._handle is not None
        real_close(self)

    monkeypatch.setattr(Engine, "__init__", init)
    monkeypatch.setattr(Engine, "close", close)
    names = ["baseline", "opt", "max", "opt-prealloc", "baseline+prealloc"]
    result = small(names)
    assert (alive, most) == (0, 3)
    assert [[run.label for run in group.runs] for group in result.groups] == [
        ["baseline", "opt", "max"],
        ["baseline", "opt-prealloc", "baseline+prealloc"],
    ]
    assert result.columns == names and "3 engines at a time" in result.notes[-1]
    assert all(result.ratio(name, "baseline") is not None for name in names)
    again = [run.steps["loss"] for run in result.runs("baseline")]
    assert len(again) == 2 and again[0] == again[1]


def test_too_little_memory_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1.9)
    said = message(lambda: small(["baseline", "opt"]))
    assert "two engines" in said and "GB" in said and "smaller" in said
    monkeypatch.setattr(machine, "available_memory", lambda: 2_000_000_000)
    said = message(lambda: compare(["baseline", "opt"], config=SMALL))
    assert "3.50 GB" in said and "1.80 GB" in said, "before random weights are drawn"
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    assert small(["baseline", "opt"]).runs("opt")[0].rounds == 3, "nobody tells"


# Faults on the way


def failing(monkeypatch: pytest.MonkeyPatch, variant: str, at: int, error: Exception) -> None:
    """Let the engine of a variant fail at a step."""
    real = Engine.step

    def step(self: Engine, *args: Any) -> Any:
        if self.variant == variant:
            self.steps_seen = getattr(self, "steps_seen", 0) + 1  # type: ignore[attr-defined]
            if self.steps_seen == at:  # type: ignore[attr-defined]
                raise error
        return real(self, *args)

    monkeypatch.setattr(Engine, "step", step)


@pytest.mark.parametrize(
    ("error", "said"),
    [(NativeError(-40, "device", "the device failed"), "the device failed"),
     (MemoryError(), "not enough memory")],
)  # fmt: skip
def test_variant_that_fails_midway_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    failing(monkeypatch, "opt", 5, error)  # warm-up 1, round one 2, 3, round two 4, 5
    result = small(["baseline", "opt", "opt-prealloc"])
    (run,) = result.runs("opt")
    assert said in run.error and run.rounds == 1 and len(run.timed("loss")) == 2
    assert [item.label for item in result.failures()] == ["opt"]
    assert result.runs("baseline")[0].rounds == result.runs("opt-prealloc")[0].rounds == 3
    ratio = result.ratio("opt", "baseline")
    assert ratio is not None and ratio.rounds == 1
    other = result.ratio("opt-prealloc", "baseline")
    assert other is not None and other.rounds == 3


def test_reference_that_fails_midway_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "baseline", 1, NativeError(-40, "device", "the device failed"))
    result = small(["baseline", "opt"])
    assert result.runs("baseline")[0].rounds == 0 and result.runs("opt")[0].rounds == 3
    assert result.ratio("opt", "baseline") is None


def test_engine_that_cannot_be_made_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.__init__

    def init(self: Engine, model: Model, variant: str = "max", *args: Any, **more: Any) -> None:
        if variant == "opt":
            raise NativeError(-20, "memory", "no memory for the engine")
        real(self, model, variant, *args, **more)

    monkeypatch.setattr(Engine, "__init__", init)
    result = small(["baseline", "opt", "max"])
    assert result.runs("opt")[0].error == "no memory for the engine"
    assert result.runs("max")[0].rounds == 3


def test_loss_that_is_not_finite_ends_a_variant() -> None:
    model = make_model()
    model.weights["norm.weight"][0] = np.inf
    result = compare(["baseline", "opt"], model, DATA, SMALL)
    assert [run.error for run in result.failures()] == [
        "step 1: the loss is not finite (first in the weight norm.weight); the weights are as "
        "after update 0: lower the learning rate or set grad_clip"
    ] * 2


@pytest.mark.parametrize("after", [0, 1, 4, 7, 100])
def test_stop_keeps_complete_rounds(after: int) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    result = small(["baseline", "opt"], stop=stop)
    assert result.interrupted is (after < 100)
    for run in (result.runs("baseline")[0], result.runs("opt")[0]):
        assert len(run.timed("loss")) == 2 * run.rounds
        assert len(run.by_round("per_step")) == run.rounds
    if after == 100:
        assert result.runs("opt")[0].rounds == 3


# Processes of their own, where one may compile only so many programs. Compilations are counted by
# process, so the parent is not this one either.


def on_sim(budget: int, **changes: Any) -> Comparison:
    device = f"sim:m4,budget={budget}" if budget else "sim:m4"
    return small(
        ["baseline", "opt", "dynamic", "opt-prealloc"], device=device, precision="auto", **changes
    )


def elsewhere(folder: Path, code: str) -> Comparison:
    """Run code that binds `result` in a process of its own and return that."""
    before = "import sys\nfrom anepy.comparing.file import save\n"
    before += "from comparing.test_session import *\n"
    done = children.run("-c", f"{before}{code}\nsave(result, 'r.json')", cwd=folder)
    assert done.returncode == 0, done.stderr
    return load(folder / "r.json")


def test_compile_budget_makes_groups_in_fresh_processes(tmp_path: Path) -> None:
    """Four updates and a start are five compilations: two engines in each process of ten."""
    apart, together = elsewhere(tmp_path, "result = on_sim(10)"), on_sim(0)
    assert [[run.label for run in group.runs] for group in apart.groups] == [
        ["baseline", "opt"], ["baseline", "dynamic"], ["baseline", "opt-prealloc"],
    ]  # fmt: skip
    assert "a process may compile for 2 engines at a time" in apart.notes[-1]
    assert list(apart.failures()) == [] and len(together.groups) == 1
    for label in apart.columns:
        for run in apart.runs(label):
            assert run.rounds == 3 and run.memory > 0
            assert run.steps["loss"] == together.runs(label)[0].steps["loss"]
    assert apart.groups[1].orders == [[0, 1], [1, 0], [0, 1]]


def test_compile_budget_that_is_too_small_says_what_to_lower(tmp_path: Path) -> None:
    code = (
        "result = small(['baseline', 'opt'])\n"
        "try: on_sim(9)\n"
        "except ConfigError as error: result.notes = [str(error)]"
    )
    (said,) = elsewhere(tmp_path, code).notes
    assert "may compile 9 programs" in said and "up to 10" in said and "--rounds" in said


def test_process_that_dies_leaves_its_reason(tmp_path: Path) -> None:
    result = elsewhere(tmp_path, "sys.executable = '/bin/false'\nresult = on_sim(10)")
    reasons = {run.error for run in result.failures()}
    assert reasons == {"the process that measured this group ended with code 1"}
    assert not result.interrupted and len(result.groups) == 3


def test_stop_reaches_the_process(tmp_path: Path) -> None:
    result = elsewhere(
        tmp_path,
        "seen = []\nresult = on_sim(10, progress=seen.append, stop=lambda: len(seen) >= 5)",
    )
    assert result.interrupted and len(result.groups) == 1
    for run in result.groups[0].runs:
        assert len(run.by_round("step")) == run.rounds


# Switches by themselves


def ablate(variants: list[str], **changes: Any) -> Comparison:
    return small(variants, ablate=True, rounds=1, steps=1, warmup=0, **changes)


def test_ablation_has_a_row_for_every_switch() -> None:
    result = ablate(["baseline", "opt"])
    rows = {(row.switch, row.form): row for row in result.ablation}
    names = anepy.engine.variants.switch_names()
    assert {switch for switch, _ in rows} == set(names) and len(names) == 14
    assert [form for switch, form in rows if switch == "prealloc"] == ["add", "leave out"]
    row = rows["prealloc", "add"]
    assert (row.reference, row.label, row.reason) == ("baseline", "baseline+prealloc", "")
    row = rows["prealloc", "leave out"]
    assert (row.reference, row.label) == ("opt", "opt-prealloc")
    assert result.ratio(row.label, row.reference) is not None
    row = rows["metal_dw", "add"]
    assert row.label == "" and row.reason.startswith("switch metal_dw")
    assert result.columns == ["baseline", "opt"]


def test_ablation_measures_nothing_twice() -> None:
    result = ablate(["baseline", "baseline+prealloc", "opt"])
    labels = [run.label for group in result.groups for run in group.runs]
    assert labels.count("baseline+prealloc") == 1
    row = next(r for r in result.ablation if r.switch == "prealloc" and r.form == "add")
    assert row.label == "baseline+prealloc"
    assert labels.count("baseline") == 1, "its section is that of the variants"


def test_ablation_adds_the_baseline_it_needs() -> None:
    result = ablate(["opt", "opt-prealloc"])
    assert [group.runs[0].label for group in result.groups] == ["opt", "baseline"]
    assert result.columns == ["opt", "opt-prealloc"]
    assert {row.reference for row in result.ablation} == {"opt", "baseline"}
    assert ablate(["opt"]).columns == ["opt"]


# Data


def test_synthetic_tokens_follow_zipf_and_the_seed() -> None:
    tokens = synthetic(32000, 3).tokens
    counts = np.bincount(tokens, minlength=32000)
    assert len(tokens) == 1 << 18 and counts[0] > 1.2 * counts[1] > 1.4 * counts[2]
    assert counts[:320].sum() > 0.4 * len(tokens)
    assert np.array_equal(tokens, synthetic(32000, 3).tokens)
    assert not np.array_equal(tokens, synthetic(32000, 4).tokens)
    assert synthetic(SEPARATE.vocab_size, 0).tokens.max() < SEPARATE.vocab_size


def test_model_and_data_may_be_files(tmp_path: Path) -> None:
    make_model().save(tmp_path / "m.bin")
    np.asarray(DATA.tokens, "<u2").tofile(tmp_path / "d.bin")
    result = compare(["baseline", "opt"], tmp_path / "m.bin", tmp_path / "d.bin", SMALL)
    assert result.model["name"] == "m.bin" and result.data["tokens"] == 500
    assert result.summary("opt").losses == small(["baseline", "opt"]).summary("opt").losses


def test_real_model_learns_the_same_in_every_variant() -> None:
    """Fifty steps of stories260K: those that only move memory to the bit, the others closely."""
    tokenizer = anepy.Tokenizer.load(needs.data("tok512.bin"))
    ids = tokenizer.encode(needs.data("tinystories_sample.txt").read_text())
    config = CompareConfig(
        rounds=5, steps=10, warmup=0, accum=1, seq=128, lr=1e-3, device="cpu", precision="fp32"
    )
    result = compare(
        ["baseline", "opt", "opt-simd_adam"],
        needs.data("stories260K.bin"),
        TokenData.from_array(np.array(ids)),
        config,
    )
    first, opt, exact = anepy.comparing.result.columns([("", result)])
    assert first.measured.losses[-1] < 0.5 * first.measured.losses[0]
    found = opt.agreement(first)
    assert found is not None and found.agrees and found.steps == 50
    assert exact.agreement(first).identical  # type: ignore[union-attr]


def test_config_error_is_no_unsupported_error() -> None:
    with pytest.raises(ConfigError) as caught:
        anepy.engine.variants.variant_switches("nonsense", "cpu")
    assert type(caught.value) is ConfigError
