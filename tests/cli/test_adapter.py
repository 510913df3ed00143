"""Adapters on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import Run, assert_one_line_error

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
            {k: v for k, v in each.items() if k not in ("model", "seconds")} for each in records
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
