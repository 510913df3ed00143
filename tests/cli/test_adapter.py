"""Adapters on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import Result, Run, assert_one_line_error

from anepy.models.lora import Lora
from anepy.models.model import Model, ModelConfig

CONFIG = ModelConfig(16, 24, 2, 2, 1, 259, 64, tied=False)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a model, an adapter, and the model with the adapter fused into it."""
    needs.module("safetensors")
    monkeypatch.chdir(tmp_path)
    model = Model.init(CONFIG)
    model.arena[...] = np.random.default_rng(3).normal(0.0, 0.5, model.arena.shape)
    model.save(tmp_path / "m.bin")
    lora = Lora(rank=2, targets="wq,w2")
    lora.attach(CONFIG)
    lora.arena[...] = np.random.default_rng(1).normal(0.0, 0.5, lora.arena.shape)
    lora.save(tmp_path / "adapter")
    lora.fuse(model).save(tmp_path / "expected.bin")
    (tmp_path / "t.txt").write_text("the cat sat on the mat " * 9)
    return tmp_path


def test_fuse_generate_and_eval_compute_with_the_adapter(run: Run, files: Path) -> None:
    done = run("fuse", "m.bin", "--adapter", "adapter", "-o", "fused.bin")
    assert done.code == 0 and done.out.startswith("fused.bin: m.bin with adapter, 0.1 MB")
    assert (files / "fused.bin").read_bytes() == (files / "expected.bin").read_bytes()
    for words in (["generate", "-p", "a", "-n", "9", "-t", "0"], ["eval", "--text", "t.txt"]):
        command, *rest = words
        records = [
            json.loads(run(command, model, *rest, *more, "--json").out)
            for model, *more in (["m.bin"], ["m.bin", "--adapter", "adapter"], ["fused.bin"])
        ]
        plain, adapted, fused = (
            {
                k: v
                for k, v in each.items()
                if k != "model" and "second" not in k and "_per_s" not in k
            }
            for each in records
        )
        assert adapted == fused
        assert adapted != plain


def test_fuse_replaces_nothing_unless_told(run: Run, files: Path) -> None:
    before = (files / "expected.bin").read_bytes()
    words = ["fuse", "m.bin", "--adapter", "adapter", "-o"]
    assert_one_line_error(run(*words, "expected.bin"), "exists")
    assert_one_line_error(run(*words, "m.bin", "-f"), "are the same file")
    assert (files / "expected.bin").read_bytes() == before
    assert run(*words, "expected.bin", "--force").code == 0
    assert_one_line_error(run(*words, "n.bin", "--dtype", "f16"), "hold f32")
    assert not (files / "n.bin").exists()


def test_an_adapter_of_another_model_is_refused(run: Run, files: Path) -> None:
    Model.init(ModelConfig(32, 24, 2, 2, 1, 259, 64)).save(files / "other.bin")
    done = run("generate", "other.bin", "--adapter", "adapter")
    assert_one_line_error(done, "with this model it must have [2, 32]")
    done = run("generate", "m.bin", "--adapter", "none")
    assert_one_line_error(done, "there is no adapter_config.json in it")


def train(run: Run, *words: object) -> Result:
    return run("train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2, "--lora", *words)


@pytest.fixture
def tokens(files: Path, run: Run) -> None:
    assert run("prepare", "t.txt", "-o", "d.bin", "-z", "bytes").code == 0


def test_training_changes_the_adapter_alone(run: Run, files: Path, tokens: None) -> None:
    before = (files / "m.bin").read_bytes()
    words = ("--steps", 8, "--rank", 3, "--alpha", 9, "--targets", "wv,w1", "--lr", "1e-2")
    done = train(run, *words, "--save", "new", "--held-out", "0.2")
    assert done.code == 0, done
    assert "LoRA of rank 3 on wv, w1: " in done.out and "adapter saved: new" in done.out
    lora = Lora.load("new")
    assert (lora.rank, lora.alpha, lora.targets) == (3, 9.0, ("wv", "w1"))
    lora.attach(CONFIG)
    assert all(values.any() for values in lora.weights.values())
    assert (files / "m.bin").read_bytes() == before
    losses = [
        json.loads(run("eval", "m.bin", "--data", "d.bin", "--seq", 16, *more, "--json").out)[
            "loss"
        ]
        for more in ((), ("--adapter", "new"))
    ]
    assert losses[1] < losses[0]
    with np.load("m.ckpt.npz") as checkpoint:
        names = {name.removeprefix("m.").removeprefix("v.") for name in checkpoint}
        assert names == {*lora.weights, "meta"}


def test_a_resumed_run_is_bit_identical(run: Run, files: Path, tokens: None) -> None:
    assert train(run, "--steps", 8, "--save", "whole", "--ckpt", "a.npz").code == 0
    assert train(run, "--steps", 4, "--ckpt", "b.npz").code == 0
    done = run("train", "--resume", "b.npz", "--steps", 8, "--save", "parts")
    assert done.code == 0, done
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (files / "whole" / name).read_bytes() == (files / "parts" / name).read_bytes()
    assert_one_line_error(run("convert", "b.npz", "x.bin"), "holds an adapter, no model")
    other = train(run, "--rank", 4, "--resume", "b.npz", "--steps", 9)
    assert_one_line_error(other, "b.npz is of an adapter with rank 8, not 4")
    done = run("train", "expected.bin", "--resume", "b.npz", "--steps", 9)
    assert_one_line_error(done, "b.npz is of an adapter to a model with other weights")


def test_the_base_may_be_stored_smaller(run: Run, files: Path, tokens: None) -> None:
    words = ("--base", "q8", "--lr", "1e-2")
    assert train(run, *words, "--steps", 8, "--save", "whole", "--ckpt", "a.npz").code == 0
    assert train(run, *words, "--steps", 4, "--ckpt", "b.npz").code == 0
    done = run("train", "--resume", "b.npz", "--steps", 8, "--save", "parts")
    assert done.code == 0, done
    weights = [
        (files / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")
    ]
    assert weights[0] == weights[1]
    assert (
        train(run, "--lr", "1e-2", "--steps", 8, "--save", "float32", "--ckpt", "c.npz").code == 0
    )
    assert (files / "float32" / "adapter_model.safetensors").read_bytes() != weights[0]
    assert "base is q4" in train(run, "--base", "q4", "--steps", 1).err


def test_an_adapter_is_trained_on(run: Run, files: Path, tokens: None) -> None:
    done = run(
        "train", "m.bin", "--data", "d.bin", "--seq", 16, "--adapter", "adapter", "--lr", 0,
        "--steps", 1, "--save", "again",
    )  # fmt: skip
    assert done.code == 0, done
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (files / "again" / name).read_bytes() == (files / "adapter" / name).read_bytes()


def test_what_contradicts_an_adapter_is_refused(run: Run, files: Path, tokens: None) -> None:
    plain = ("train", "m.bin", "--data", "d.bin")
    for words in (["--rank", 2], ["--alpha", 2], ["--targets", "wq"]):
        assert (done := run(*plain, *words)).code == 2 and "add --lora" in done.err
    assert run(*plain, "--adapter", "adapter", "--rank", 2).code == 2
    assert_one_line_error(train(run, "--save", "x.gguf"), "`anepy fuse` makes a model of it")
    assert_one_line_error(train(run, "--save", "t.txt"), "t.txt: it is no folder")
    assert_one_line_error(train(run, "--targets", "wx"), "there is no 'wx'")
    assert_one_line_error(train(run, "--freeze", "*.wq.*"), "freeze")
    assert_one_line_error(run("train", "--lora"), "an adapter needs a model")
    assert not list(files.glob("*.npz"))
