"""Adapters: what PEFT saves is what anepy computes with, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import needs
import numpy as np
import pytest
from cases import message

from anepy.errors import ConfigError, ModelError
from anepy.models import tensors
from anepy.models.lora import Lora
from anepy.models.model import Model, ModelConfig
from anepy.models.targets import TARGETS

CONFIG = ModelConfig(24, 40, 2, 4, 2, 61, 64, tied=False)


def random_adapter(config: ModelConfig, **settings: Any) -> Lora:
    lora = Lora(**{"rank": 3, "alpha": 5} | settings)
    lora.attach(config)
    random = np.random.default_rng(1)
    lora.arena[...] = random.normal(0.0, 0.2, lora.arena.shape)
    return lora


@pytest.mark.parametrize("name", families.CASES)
def test_adapter_of_peft_computes_the_same(tmp_path: Path, name: str) -> None:
    theirs = families.save(name, tmp_path / "base")
    base = Model.load(tmp_path / "base")
    wrapped = families.with_adapter(theirs)
    wrapped.save_pretrained(tmp_path / "adapter")
    lora = Lora.load(tmp_path / "adapter")
    assert (lora.rank, lora.alpha, lora.targets) == (3, 5.0, TARGETS)
    lora.fuse(base).save(tmp_path / "fused")
    fused = needs.peer("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    ids = families.sequence(theirs)
    expected = families.logits_of(wrapped, ids)
    assert np.abs(families.logits_of(fused, ids) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", families.CASES)
def test_adapter_loads_in_peft(tmp_path: Path, name: str) -> None:
    peft = needs.peer("peft")
    theirs = families.save(name, tmp_path / "base")
    base = Model.load(tmp_path / "base")
    lora = random_adapter(base.config, targets=("wq", "wv", "w2"))
    size = lora.save(tmp_path / "adapter", base="some/model")
    assert size == sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    ids = families.sequence(theirs)
    before = families.logits_of(theirs, ids)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert wrapped.peft_config["default"].base_model_name_or_path == "some/model"
    found = families.logits_of(wrapped, ids)
    lora.fuse(base).save(tmp_path / "fused")
    fused = needs.peer("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    expected = families.logits_of(fused, ids)
    assert np.abs(expected - before).max() > 0.1
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_saved_adapter_loads_with_the_same_bits(tmp_path: Path) -> None:
    needs.module("safetensors")
    lora = random_adapter(CONFIG, alpha=7.5)
    lora.save(tmp_path / "a")
    again = Lora.load(tmp_path / "a")
    again.attach(CONFIG)
    assert (again.rank, again.alpha, again.targets) == (3, 7.5, TARGETS)
    assert list(again.weights) == list(lora.weights)
    for name, values in lora.weights.items():
        np.testing.assert_array_equal(again.weights[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_half_precision_and_by_the_root_of_the_rank(tmp_path: Path, dtype: str) -> None:
    torch = needs.peer("torch")
    wrapped = families.with_adapter(
        families.build("llama3"), use_rslora=True, r=4, target_modules=["q_proj"]
    )
    wrapped.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    lora = Lora.load(tmp_path)
    assert lora.scale == pytest.approx(5 / 2)
    assert lora.targets == ("wq",)
    lora.attach(ModelConfig(32, 40, 2, 4, 2, 61, 64, tied=False))
    state = {n: p.float().detach().numpy() for n, p in wrapped.named_parameters() if "lora_A" in n}
    (first, *_) = state.values()
    np.testing.assert_array_equal(lora.weights["layers.0.attention.wq.lora_a"], first)


def test_layers_without_an_adapter_stay_as_they_are(tmp_path: Path) -> None:
    wrapped = families.with_adapter(families.build("llama2"), layers_to_transform=[1])
    wrapped.save_pretrained(tmp_path)
    lora = Lora.load(tmp_path)
    lora.attach(ModelConfig(24, 40, 2, 4, 4, 61, 64, tied=False))
    for name, values in lora.weights.items():
        assert values.any() == ("layers.1" in name or name.endswith("lora_a")), name


def test_new_adapter_changes_nothing_and_is_the_seeds() -> None:
    one, two, other = Lora(seed=3), Lora(seed=3), Lora(seed=4)
    for each in (one, two, other):
        each.attach(CONFIG)
    assert one.arena.ctypes.data % 64 == 0
    np.testing.assert_array_equal(one.arena, two.arena)
    assert (one.arena != other.arena).any()
    a = one.weights["layers.1.feed_forward.w2.lora_a"]
    assert a.shape == (8, 40)
    assert 0.9 / np.sqrt(40) < np.abs(a).max() <= 1 / np.sqrt(40)
    assert not one.weights["layers.1.feed_forward.w2.lora_b"].any()
    model = Model.init(CONFIG, seed=1)
    before = model.arena.copy()
    one.fuse(model)
    np.testing.assert_array_equal(model.arena, before)


def test_tensors_belong_to_one_shape_of_models() -> None:
    lora = Lora()
    with pytest.raises(ConfigError, match="has no tensors yet"):
        lora.weights  # noqa: B018
    lora.attach(CONFIG)
    lora.attach(ModelConfig(24, 40, 2, 4, 2, 99, 32))  # neither vocabulary nor context matter
    with pytest.raises(ConfigError, match="belongs to models like"):
        lora.attach(ModelConfig(24, 40, 3, 4, 2, 61, 64))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": True}, "rank is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": "wq,wx"}, "there is no 'wx'"),
        ({"targets": ()}, "targets are none"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Lora(**settings)


def test_targets_have_the_order_of_the_model() -> None:
    assert Lora(targets="w3, wq,wq").targets == ("wq", "w3")
    assert set(TARGETS) == set(tensors.PROJECTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    needs.module("safetensors")
    random_adapter(CONFIG).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "of a IA3 adapter, anepy computes LORA"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 4}, "has shape"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_dora": True}, "use_dora is True, which anepy cannot compute"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(
    folder: Path, settings: dict[str, Any], reason: str
) -> None:
    change(folder, **settings)
    assert reason in message(lambda: Lora.load(folder).attach(CONFIG), ModelError)


def test_files_that_are_missing_or_do_not_fit_are_named(folder: Path) -> None:
    def failure(config: ModelConfig = CONFIG) -> str:
        return message(lambda: Lora.load(folder).attach(config), ModelError)

    assert "adapts layer 1, the model has 1 layers" in failure(ModelConfig(24, 40, 1, 4, 2, 61, 64))
    assert "B of layer 0, wk, has shape [12, 3]" in failure(ModelConfig(24, 40, 2, 4, 4, 61, 64))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert "no whole safetensors file" in failure()
    weights.rename(folder / "adapter_model.bin")
    assert "only adapter_model.bin: save it as safetensors" in failure()
    (folder / "adapter_config.json").unlink()
    assert "there is no adapter_config.json in it" in failure()


def test_tensors_that_are_no_projections_are_refused(tmp_path: Path) -> None:
    wrapped = families.with_adapter(families.build("llama2"), target_modules=["q_proj", "lm_head"])
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="adapts lm_head"):
        Lora.load(tmp_path)


def test_save_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anepy.models import tensor_file

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(tensor_file, "write", fail)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ModelError, match="cannot write adapter"):
            random_adapter(CONFIG).save(target)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
