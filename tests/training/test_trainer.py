"""The training loop against the real engine: schedule, accumulation, resume, divergence."""

from __future__ import annotations

import dataclasses
import inspect
import math
import signal
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest

from anepy.comparing.config import CompareConfig
from anepy.engine import Engine
from anepy.engine.flops import flops_per_step
from anepy.errors import (
    AnepyError,
    CheckpointError,
    ClosedError,
    ConfigError,
    DataError,
    DivergedError,
)
from anepy.models.model import Model, ModelConfig
from anepy.text.data import TokenData
from anepy.text.prepare import prepare
from anepy.text.tokenizer_stored import resolve_tokenizer
from anepy.training import checkpoint
from anepy.training.config import TrainConfig, config_from
from anepy.training.convert import convert
from anepy.training.reports import StepReport
from anepy.training.settings import setting_help
from anepy.training.trainer import Trainer

CONFIG = ModelConfig(
    dim=32, hidden_dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, seq_len=24
)


def tokens(n: int = 2000) -> TokenData:
    """Return a sequence that can be learned: a random walk over the vocabulary."""
    steps = np.random.default_rng(0).integers(-1, 2, n)
    return TokenData.from_array((np.cumsum(steps) % CONFIG.vocab_size).astype(np.uint16))


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 12, "accum": 4, "lr": 1e-2, "seq": 16} | changes))


def trained(
    config: TrainConfig,
    resume: Path | None = None,
    stop: int | None = None,
    save: Path | None = None,
) -> tuple[dict[str, np.ndarray], list[StepReport]]:
    """Run a training, perhaps interrupted after step `stop`, and return weights and reports."""
    model, reports = Model.init(CONFIG, seed=3), []
    with Trainer(model, tokens(), config, resume) as trainer:
        for report in trainer:
            reports.append(report)
            if report.step == stop:
                break
        if save is not None:
            trainer.save_checkpoint(save)
    return {name: np.array(value) for name, value in model.weights.items()}, reports


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        assert got[name].tobytes() == value.tobytes(), f"{name} is not bit-identical"


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("accum", 0),
        ("seq", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", math.inf),
        ("grad_clip", 0.0),
        ("schedule", "cubic"),
        ("decay", 0.0),
        ("optimizer", "adam"),
        ("momentum", 1.0),
        ("matrix_lr", -0.1),
        ("warmup", -1),
        ("min_lr_ratio", 1.5),
        ("seed", -1),
        ("threads", 0),
        ("held_out", 1.0),
        ("eval_windows", 0),
    ],
)
def test_validate_out_of_range_names_the_setting(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
        TrainConfig(**{name: value}).validate()
    assert "\n" not in str(caught.value)


def test_validate_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="held_out"):
        Trainer(Model.init(CONFIG), tokens(), settings(eval_every=5))


@pytest.mark.parametrize("config", [TrainConfig, CompareConfig])
def test_every_setting_has_a_help_text_and_a_line_in_the_docstring(config: type) -> None:
    text = inspect.getdoc(config) or ""
    lines = text.split("\nAttributes:\n")[1].splitlines()
    for item in dataclasses.fields(config):
        assert setting_help(config, item.name).strip()
        assert any(line.startswith(f"    {item.name}: ") for line in lines), item.name
    assert all(len(line) <= 96 for line in lines) and "--" not in text
    assert "\n\nExample:\n    >>> " in text


def test_config_from_prefers_given_then_saved_and_keeps_zero() -> None:
    config = config_from({"lr": 1.0, "seed": 7, "unknown": 1}, {"seed": 0, "lr": None, "steps": 3})
    assert (config.lr, config.seed, config.steps, config.accum) == (1.0, 0, 3, 10)


def test_learning_rate_constant_after_warmup() -> None:
    config = TrainConfig(lr=1.0, warmup=4)
    assert [config.learning_rate(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_learning_rate_cosine_falls_to_its_floor_at_the_last_update() -> None:
    config = TrainConfig(steps=95, accum=10, lr=1.0, schedule="cosine", min_lr_ratio=0.2)
    rates = [config.learning_rate(i) for i in range(config.updates)]
    assert len(rates) == 10 and rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.2) and config.learning_rate(99) == pytest.approx(0.2)
    assert rates[3] + rates[6] == pytest.approx(1.2), "a cosine is symmetric about its middle"


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (10, 10)])
def test_learning_rate_of_degenerate_cosine_is_finite(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, accum=1, warmup=warmup, schedule="cosine")
    assert all(0 < config.learning_rate(i) <= config.lr for i in range(20))


def test_learning_rate_linear_falls_evenly_after_the_warm_up() -> None:
    config = TrainConfig(
        steps=60, accum=5, lr=2.0, schedule="linear", warmup=2, min_lr_ratio=0.5, decay=0.9
    )
    rates = [config.learning_rate(update) for update in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0] and rates[-1] == pytest.approx(1.0)
    assert np.diff(rates[2:]) == pytest.approx(np.full(9, -1.0 / 9))
    assert config.learning_rate(40) == pytest.approx(1.0)


@pytest.mark.parametrize(("decay", "flat"), [(0.25, 16), (1.0, 1), (1e-9, 20)])
def test_learning_rate_wsd_is_flat_and_falls_at_the_end(decay: float, flat: int) -> None:
    config = TrainConfig(
        steps=23, accum=1, lr=3.0, schedule="wsd", warmup=2, min_lr_ratio=0.0, decay=decay
    )
    rates = [config.learning_rate(update) for update in range(23)]
    assert rates[:2] == [1.5, 3.0] and rates[2 : 2 + flat] == [3.0] * flat
    falling = rates[1 + flat :]
    assert falling[-1] == 0.0 and np.diff(falling) == pytest.approx(-3.0 / (len(falling) - 1))


def test_flops_of_stories110m_agree_with_the_research_programs() -> None:
    shape = ModelConfig(768, 2048, 12, 12, 12, 32000, 1024)
    flops = flops_per_step(shape, 256)
    millions = {name: round(count / 1e6) for name, count in flops.items()}
    assert millions == {
        "fwd": 43487,
        "bwd_dx": 43487,
        "bwd_dw": 43487,
        "sdpa_bwd": 6040,
        "classifier": 37749,
        "total": 174248,
    }


# The loop


def test_trainer_learns_and_reports_every_step() -> None:
    _, reports = trained(settings(steps=200, accum=1))
    assert [report.step for report in reports] == list(range(1, 201))
    assert reports[0].loss == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    last = [report.loss for report in reports[-10:]]
    assert sum(last) / 10 < reports[0].loss - 1
    assert all(report.ms_per_step > 0 and report.gflops > 0 for report in reports)


def test_trainer_updates_every_accum_steps_and_at_the_end() -> None:
    _, reports = trained(settings(steps=10, accum=4))
    assert [report.step for report in reports if report.update] == [4, 8, 10]
    assert [report.updates for report in reports][-1] == 3
    assert [report.accumulated for report in reports] == [1, 2, 3, 0, 1, 2, 3, 0, 1, 0]


def test_trainer_partial_last_accumulation_is_averaged_over_its_own_steps() -> None:
    """The research programs divided it by the full accumulation."""
    weights, _ = trained(settings(steps=2, accum=10))
    model, data = Model.init(CONFIG, seed=3), tokens()
    from anepy.text.data import Sampler

    sampler = Sampler(data, 16, 0)
    with Engine(model, seq_len=16) as engine:
        for _ in range(2):
            engine.step(*sampler.next())
        engine.update(lr=1e-2)
        assert_same(weights, {name: np.array(value) for name, value in model.weights.items()})


def test_trainer_same_settings_are_bit_identical() -> None:
    assert_same(trained(settings())[0], trained(settings())[0])


def test_trainer_seed_changes_the_data() -> None:
    assert trained(settings(steps=1))[1][0].loss != trained(settings(steps=1, seed=1))[1][0].loss


def test_trainer_can_go_on_after_a_break() -> None:
    model, steps = Model.init(CONFIG, seed=3), []
    with Trainer(model, tokens(), settings()) as trainer:
        for report in trainer:
            if report.step == 5:
                break
        steps = [report.step for report in trainer]
    assert steps == list(range(6, 13))
    weights, _ = trained(settings())
    assert_same({name: np.array(value) for name, value in model.weights.items()}, weights)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 11])
def test_resume_after_interruption_is_bit_identical(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "c.npz"
    config = settings(schedule="cosine", warmup=1, grad_clip=0.5, weight_decay=0.1, held_out=0.2)
    expected, reports = trained(config)
    trained(config, stop=stop, save=path)
    with np.load(path) as file:
        assert ("grad.norm.weight" in file) == (stop % 4 != 0)
    got, resumed = trained(config, resume=path)
    assert_same(got, expected)
    assert [r.loss for r in resumed] == [r.loss for r in reports[stop:]]
    assert [r.lr for r in resumed] == [r.lr for r in reports[stop:]]


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_resume_goes_on_where_the_schedule_was(tmp_path: Path, schedule: str) -> None:
    config = settings(schedule=schedule, accum=1, warmup=1, decay=0.5)
    expected, reports = trained(config)
    trained(config, stop=7, save=tmp_path / "c.npz")
    weights, rest = trained(config, resume=tmp_path / "c.npz")
    assert_same(weights, expected)
    assert [report.lr for report in rest] == [report.lr for report in reports[7:]]
    assert len({report.lr for report in reports}) > 3


def test_resume_of_complete_run_equals_a_longer_run(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    trained(settings(steps=8), save=path)
    assert_same(trained(settings(steps=14), resume=path)[0], trained(settings(steps=14))[0])


def test_resume_keeps_the_data_order_and_tells_differences(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    expected, _ = trained(settings())
    trained(settings(), stop=5, save=path)
    got, _ = trained(settings(seed=9), resume=path)
    assert_same(got, expected)
    config = settings(seed=9, lr=0.5, schedule="cosine", steps=20)
    with Trainer(Model.init(CONFIG), tokens(1000), config, path) as trainer:
        notes = "\n".join(trainer.notes)
    for part in ("seed 9 is ignored", "lr is 0.5", "cosine", "the data is not"):
        assert part in notes
    with Trainer(Model.init(CONFIG), tokens(), settings(), path) as trainer:
        assert trainer.notes == []
        assert len(trainer.losses) == 5 and trainer.start_step == 5


def test_resume_that_cannot_work_leaves_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    trained(settings(), stop=5, save=path)
    other = ModelConfig(**(dataclasses.asdict(CONFIG) | {"n_layers": 1}))
    cases: list[tuple[ModelConfig, TrainConfig, type[AnepyError], str]] = [
        (other, settings(), CheckpointError, "n_layers 2 instead of 1"),
        (CONFIG, settings(steps=4), ConfigError, "at step 5"),
    ]
    for shape, config, kind, reason in cases:
        model = Model.init(shape, seed=1)
        before = {name: np.array(value) for name, value in model.weights.items()}
        with pytest.raises(kind, match=reason):
            Trainer(model, tokens(), config, path)
        assert_same({name: np.array(value) for name, value in model.weights.items()}, before)


def test_checkpoint_keeps_settings_and_fits_its_estimate(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with Trainer(Model.init(CONFIG), tokens(), settings()) as trainer:
        trainer.run_step()
        assert trainer.save_checkpoint(path) <= trainer.checkpoint_nbytes()
        assert path.stat().st_size > trainer.checkpoint_nbytes() - (1 << 16)
    meta = checkpoint.read_meta(path)
    assert meta.settings["accum"] == 4 and meta.settings["seq"] == 16
    assert (meta.step, meta.accumulated, meta.updates) == (1, 1, 0)
    assert meta.config == dataclasses.asdict(CONFIG)


def test_trainer_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    model = Model.init(CONFIG, seed=3)
    with Trainer(model, tokens(), settings(accum=1)) as trainer:
        trainer.run_step()
        model.weights["tok_embeddings.weight"][...] = np.nan
        norm = np.array(model.weights["norm.weight"])
        with pytest.raises(DivergedError, match=r"step 2: .*after update 1") as caught:
            trainer.run_step()
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(model.weights["norm.weight"], norm)
        assert trainer.engine.updates == 1


def test_trainer_evaluates_held_out_data_before_between_and_after() -> None:
    with Trainer(
        Model.init(CONFIG, seed=3), tokens(), settings(held_out=0.2, eval_every=5, eval_windows=4)
    ) as trainer:
        reports = list(trainer)
        summary = trainer.summary()
        assert trainer.held_out is not None and len(trainer.held_out) == 400
        assert trainer.evaluate() == summary.held_out_after
    assert [r.step for r in reports if r.held_out_loss is not None] == [5, 10, 12]
    assert summary.held_out_before == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    assert summary.held_out_after is not None and summary.held_out_before is not None
    assert summary.held_out_after < summary.held_out_before


def test_trainer_without_held_out_data_says_so() -> None:
    with Trainer(Model.init(CONFIG), tokens(), settings()) as trainer:
        with pytest.raises(ConfigError, match="held_out"):
            trainer.evaluate()


@pytest.mark.parametrize("batch", [1, 3])
def test_evaluation_takes_no_memory_that_training_does_not(batch: int) -> None:
    memory = []
    for changes in ({}, {"eval_every": 1, "held_out": 0.2}):
        config = settings(device="cpu", batch=batch, **changes)
        with Trainer(Model.init(CONFIG, seed=3), tokens(), config) as trainer:
            list(trainer)
            memory.append(trainer.engine.memory)
    assert memory[0] == memory[1]


def test_evaluation_does_not_change_the_training() -> None:
    with_evaluation, _ = trained(settings(eval_every=1, held_out=0.2))
    assert_same(with_evaluation, trained(settings(held_out=0.2))[0])


def test_summary_counts_what_was_done() -> None:
    with Trainer(Model.init(CONFIG), tokens(), settings()) as trainer:
        empty = trainer.summary()
        losses = [report.loss for report in trainer]
        summary = trainer.summary()
    assert (empty.steps, empty.first_loss, empty.tokens_per_s) == (0, None, 0.0)
    assert summary.first_loss == pytest.approx(sum(losses[:6]) / 6)
    assert summary.last_loss == pytest.approx(sum(losses[6:]) / 6)
    assert (summary.steps, summary.updates, summary.tokens) == (12, 3, 12 * 16)
    assert summary.ms_q1 <= summary.ms_per_step <= summary.ms_q3
    assert summary.peak_memory > 1 << 20
    assert summary.allocations == 0, "steps after the first must not allocate"


def test_trainer_sequence_length_defaults_and_limits() -> None:
    with Trainer(Model.init(CONFIG), tokens(), TrainConfig(steps=1)) as trainer:
        assert trainer.seq == CONFIG.seq_len
    with pytest.raises(ConfigError, match="context is 24"):
        Trainer(Model.init(CONFIG), tokens(), settings(seq=25))


def test_trainer_bad_data_is_refused() -> None:
    with pytest.raises(DataError, match="vocabulary"):
        Trainer(Model.init(CONFIG), TokenData.from_array(np.full(100, 50)), settings())
    with pytest.raises(DataError):
        Trainer(Model.init(CONFIG), tokens(10), settings())
    with pytest.raises(DataError, match="held-out"):
        Trainer(Model.init(CONFIG), tokens(100), settings(held_out=0.01))


def test_trainer_after_close_refuses_steps() -> None:
    trainer = Trainer(Model.init(CONFIG), tokens(), settings())
    trainer.close()
    trainer.close()
    with pytest.raises(ClosedError, match="make another one"):
        next(iter(trainer))


def test_trainer_at_its_end_frees_its_engine() -> None:
    trainer = Trainer(Model.init(CONFIG), tokens(), settings(held_out=0.2))
    engine = trainer.engine
    reports = list(trainer)
    with pytest.raises(ClosedError):
        engine.step([1], [2])
    summary = trainer.summary()
    assert (summary.steps, summary.updates, len(reports)) == (12, 3, 12)
    assert len(trainer.losses) == 12 and trainer.steps_done == 12
    for use in (trainer.evaluate, trainer.run_step, lambda: list(trainer)):
        with pytest.raises(ClosedError, match=r"made its 12 steps .* `with Trainer") as caught:
            use()
        assert "\n" not in str(caught.value)
    with Trainer(Model.init(CONFIG), tokens(), settings(held_out=0.2)) as trainer:
        assert [report.loss for report in trainer] == [report.loss for report in reports]
        assert trainer.evaluate() == reports[-1].held_out_loss and list(trainer) == []
    with pytest.raises(ClosedError):
        trainer.evaluate()


def test_trainer_from_paths_remembers_them(tmp_path: Path) -> None:
    model, data = tmp_path / "m.bin", tmp_path / "d.bin"
    Model.init(CONFIG, seed=3).save(model)
    tokens().tokens.astype("<u2").tofile(data)
    with Trainer(str(model), str(data), settings()) as trainer:
        list(trainer)
        assert trainer.source["model"] == str(model) and trainer.source["data"] == str(data)
        assert_same(
            {name: np.array(value) for name, value in trainer.model.weights.items()},
            trained(settings())[0],
        )


def test_trainer_lowers_the_loss_of_a_real_model() -> None:
    from anepy.text.tokenizer import Tokenizer

    model = Model.load(needs.data("stories260K.bin"))
    ids = Tokenizer.load(needs.data("tok512.bin")).encode(
        needs.data("tinyshakespeare.txt").read_text()[:60000]
    )
    data = TokenData.from_array(np.array(ids, dtype=np.uint16))
    config = TrainConfig(steps=30, accum=2, lr=1e-3, seq=128, held_out=0.1, eval_windows=8)
    with Trainer(model, data, config) as trainer:
        list(trainer)
        summary = trainer.summary()
    assert summary.held_out_before is not None and summary.held_out_after is not None
    assert summary.held_out_after < summary.held_out_before - 0.3


def test_freezing_lasts_through_a_checkpoint(tmp_path: Path) -> None:
    path, patterns = tmp_path / "c.npz", ("tok_embeddings*", "layers.0.*")
    config = settings(freeze=patterns, weight_decay=0.1, grad_clip=0.5)
    start = {name: np.array(value) for name, value in Model.init(CONFIG, seed=3).weights.items()}
    expected, reports = trained(config)
    trained(config, stop=5, save=path)
    frozen = {n for n in start if n.startswith(("tok", "layers.0."))}
    for name, value in expected.items():
        assert (value.tobytes() == start[name].tobytes()) == (name in frozen)
    with np.load(path) as file:
        for part in ("m", "v", "grad"):
            assert {n for n in start if f"{part}.{n}" in file} == set(start) - frozen
    meta = checkpoint.read_meta(path)
    assert set(meta.frozen) == frozen and meta.settings["freeze"] == list(patterns)
    assert reports[0].gflops * reports[0].ms_per_step * 1e6 == pytest.approx(
        flops_per_step(CONFIG, 16, freeze=patterns)["total"]
    )
    assert config_from(meta.settings, {}).freeze == patterns
    assert_same(trained(config_from(meta.settings, {"steps": 12}), resume=path)[0], expected)
    same = settings(freeze=["layers.0.*", "tok_*"], weight_decay=0.1, grad_clip=0.5)
    assert_same(trained(same, resume=path)[0], expected)


@pytest.mark.parametrize("optimizer", ["lion", "sgd", "muon"])
def test_optimizer_lasts_through_a_checkpoint(tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "c.npz"
    config = settings(optimizer=optimizer, schedule="cosine", weight_decay=0.1, momentum=0.8)
    expected, _ = trained(config)
    trained(config, stop=5, save=path)
    assert checkpoint.read_meta(path).settings["optimizer"] == optimizer
    with np.load(path) as file:
        second = {name[2:] for name in file if name.startswith("v.")}
    assert {n for n in second if n.endswith("w1.weight")} == set()
    assert ("norm.weight" in second) == (optimizer == "muon")
    assert_same(
        trained(config_from(checkpoint.read_meta(path).settings, {}), resume=path)[0], expected
    )
    with Trainer(Model.init(CONFIG), tokens(), config) as trainer:
        trainer.run_step()
        assert trainer.save_checkpoint(tmp_path / "d.npz") <= trainer.checkpoint_nbytes()
    model = Model.init(CONFIG, seed=1)
    before = {name: np.array(value) for name, value in model.weights.items()}
    with pytest.raises(CheckpointError, match=f"optimizer {optimizer}, this run is to use adamw"):
        Trainer(model, tokens(), settings(), path)
    assert_same({name: np.array(value) for name, value in model.weights.items()}, before)
    notes = convert(path, tmp_path / "model.bin")
    assert any(f"moments of optimizer {optimizer} stay behind" in note for note in notes)


def test_resume_with_other_frozen_tensors_leaves_the_model_alone(tmp_path: Path) -> None:
    frozen, free = tmp_path / "frozen.npz", tmp_path / "free.npz"
    trained(settings(freeze=["norm*"]), stop=5, save=frozen)
    trained(settings(), stop=5, save=free)
    for path, freeze, reason in (
        (frozen, (), r"norm\.weight frozen, this one has no tensor frozen"),
        (frozen, "layers.0.*", r"layers\.0\.attention_norm\.weight and 8 more frozen"),
        (free, "norm*", r"with no tensor frozen, this one has norm\.weight frozen"),
    ):
        model = Model.init(CONFIG, seed=1)
        before = {name: np.array(value) for name, value in model.weights.items()}
        with pytest.raises(CheckpointError, match=reason):
            Trainer(model, tokens(), settings(freeze=freeze), path)
        assert_same({name: np.array(value) for name, value in model.weights.items()}, before)
    with pytest.raises(ConfigError, match=r"'layers\.2\.\*'"):
        Trainer(Model.init(CONFIG), tokens(), settings(freeze="layers.2.*"))


def test_checkpoint_of_a_run_with_frozen_tensors_fits_its_estimate(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with Trainer(Model.init(CONFIG), tokens(), settings(freeze="layers.*")) as trainer:
        trainer.run_step()
        assert trainer.save_checkpoint(path) <= trainer.checkpoint_nbytes()
        assert path.stat().st_size > trainer.checkpoint_nbytes() - (1 << 16)


def test_a_run_interrupted_at_random_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    """A handler that raises, in an iteration; then what Ctrl-C in a script leads to."""

    class Raised(Exception):
        pass

    def handler(*_: object) -> None:
        raise Raised

    config = settings(steps=60, accum=3, held_out=0.1, eval_every=7, threads=1)
    expected, _ = trained(config)
    random, path, interrupted = np.random.default_rng(2), tmp_path / "c.npz", 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        while True:
            model = Model.init(CONFIG, seed=3)
            resume = path if path.exists() else None
            with Trainer(model, tokens(), config, resume) as trainer:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 6e-3))
                    for _ in trainer:
                        pass
                except Raised:
                    interrupted += 1
                    trainer.save_checkpoint(path)
                    continue
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                break
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    assert_same(dict(model.weights), expected)


def test_a_tokenizer_trained_for_the_data_stays_with_the_model(tmp_path: Path) -> None:
    needs.module("tokenizers")
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat, the dog on the log. " * 40)
    prepared = prepare(text, 300, tmp_path / "d.bin")
    config = ModelConfig(16, 32, 1, 2, 2, prepared.vocab_size + 3, 16)
    model = Model.init(config)
    with Trainer(model, tmp_path / "d.bin", settings(steps=2)) as trainer:
        for _ in trainer:
            pass
    expected = resolve_tokenizer(None, model).encode("the cat sat")
    for name in ("m.bin", "folder"):
        needs.module("safetensors")
        model.save(tmp_path / name)
        again = Model.load(tmp_path / name)
        assert resolve_tokenizer(None, again).encode("the cat sat") == expected
    assert (tmp_path / "m.tokenizer.json").is_file()
    (tmp_path / "m.bin").rename(tmp_path / "n.bin")
    assert Model.load(tmp_path / "n.bin").tokenizer is None
