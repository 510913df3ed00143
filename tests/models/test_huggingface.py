"""Hugging Face folders: what transformers saves is what anepy reads, and the reverse."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import families
import needs
import numpy as np
import pytest
from cases import message
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error

from anepy.errors import ModelError
from anepy.models import hf_config, huggingface
from anepy.models.model import Model, ModelConfig


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    stored = huggingface.open_folder(folder)
    weights = {n: np.full(s, np.nan, "f4") for n, s in ref.tensor_shapes(stored.config).items()}
    stored.fill(weights)
    return stored, weights


@pytest.mark.parametrize("name", families.CASES)
def test_model_of_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    theirs = families.save(name, tmp_path)
    stored, weights = load(tmp_path)
    ids = families.sequence(theirs)
    logits = families.logits_of(theirs, ids[:-1])
    assert np.abs(ref.forward(weights, stored.config, ids[:-1]) - logits).max() < 1e-4
    expected, gradients = families.loss_and_gradients(theirs, ids)
    loss, found = ref.loss_and_gradients(weights, stored.config, ids[:-1], ids[1:])
    assert abs(loss - expected) < 1e-5
    assert_tensors_close(gradients, found, 1e-4)


@pytest.mark.parametrize("name", families.CASES)
def test_saved_model_loads_in_transformers(tmp_path: Path, name: str) -> None:
    transformers = needs.peer("transformers")
    theirs = families.save(name, tmp_path / "a")
    stored, weights = load(tmp_path / "a")
    size = huggingface.save(tmp_path / "b", stored.config, weights, "f32", stored.tokenizer)
    assert size == sum(p.stat().st_size for p in (tmp_path / "b").iterdir())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == needs.peer("torch").float32
    assert again.config.eos_token_id == 2
    ids = families.sequence(theirs)
    assert np.abs(families.logits_of(again, ids) - families.logits_of(theirs, ids)).max() < 1e-5
    config, copies = load(tmp_path / "b")
    assert config.config == stored.config
    for tensor, values in weights.items():
        np.testing.assert_array_equal(copies[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: str) -> None:
    torch = needs.peer("torch")
    theirs = families.build("qwen2").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    _, weights = load(tmp_path)
    expected = families.ours(
        theirs, {n: p.detach().float().numpy() for n, p in theirs.named_parameters()}
    )
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)


@pytest.mark.parametrize(("dtype", "unit"), [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_saved_in_half_precision_is_rounded_to_nearest(
    tmp_path: Path, dtype: str, unit: float
) -> None:
    torch, transformers = needs.peer("torch"), needs.peer("transformers")
    families.save("llama3", tmp_path / "a")
    stored, weights = load(tmp_path / "a")
    huggingface.save(tmp_path / "b", stored.config, weights, dtype, None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    _, halves = load(tmp_path / "b")
    for name, values in weights.items():
        expected = torch.from_numpy(values).to(again.dtype).float().numpy()
        np.testing.assert_array_equal(halves[name], expected, err_msg=name)
        assert relative_error(halves[name], values) < unit


def test_weights_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    config, weights = small()
    weights["norm.weight"][3] = 70000.0
    with pytest.raises(ModelError, match=r"norm\.weight has a weight of 7e\+04, too large for f16"):
        huggingface.save(tmp_path / "b", config, weights, "f16", None)
    assert not any(tmp_path.iterdir())


def test_shards_and_tied_weights_stored_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = needs.peer("transformers")
    theirs = families.build("theta-tied")
    theirs.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    shards = sorted((tmp_path / "a").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    stored, weights = load(tmp_path / "a")
    assert huggingface.open_folder(tmp_path / "a", shards[0]).config == stored.config

    monkeypatch.setattr(huggingface, "SHARD_BYTES", 8000)
    huggingface.save(tmp_path / "b", stored.config, weights, "f32", None)
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = families.sequence(theirs)
    assert np.abs(families.logits_of(again, ids) - families.logits_of(theirs, ids)).max() < 1e-5

    # One file over many: nothing of the older save is left that a reader would take up.
    monkeypatch.undo()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    huggingface.save(tmp_path / "b", stored.config, weights, "f32", None)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    _, copies = load(tmp_path / "b")
    assert all(np.array_equal(copies[n], w) for n, w in weights.items())

    embedding = weights["tok_embeddings.weight"]
    rewrite(tmp_path / "b", add={"lm_head.weight": embedding})
    load(tmp_path / "b")
    rewrite(tmp_path / "b", add={"lm_head.weight": embedding + 1})
    assert "lm_head.weight differs from model.embed_tokens.weight" in failure(tmp_path / "b")


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    config, weights = small()
    huggingface.save(tmp_path / "a", config, weights, "f32", None)
    (tmp_path / "a" / "tokenizer.json").write_bytes(b'{"model": 1}')
    (tmp_path / "a" / "generation_config.json").write_bytes(b"{}")
    (tmp_path / "a" / "README.md").write_bytes(b"not the tokenizer's")
    change(tmp_path / "a", eos_token_id=[5, 6], bos_token_id=None)
    stored, weights = load(tmp_path / "a")
    huggingface.save(tmp_path / "b", stored.config, weights, "f32", stored.tokenizer)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == b'{"model": 1}'
    assert (tmp_path / "b" / "generation_config.json").exists()
    assert not (tmp_path / "b" / "README.md").exists()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == [5, 6]


# ---------------------------------------------------------------------------- config.json


def small(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """Return a configuration of a few hundred weights and random ones."""
    sizes = dict(dim=8, hidden_dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=11)
    config = ModelConfig(**sizes | {"seq_len": 32} | changes)
    return config, ref.random_weights(config, 1, 0.3)


def change(folder: Path, **settings: Any) -> None:
    """Change settings of a `config.json`; one that is `...` is left out."""
    path = folder / "config.json"
    given = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not ...}))


def rewrite(
    folder: Path,
    add: dict[str, Any] = {},  # noqa: B006
    drop: str = "",
    file: str = "model.safetensors",
) -> None:
    """Write the tensors of a folder anew, some added or one left out."""
    from safetensors.numpy import load_file, save_file

    path = folder / file
    save_file({n: v for n, v in load_file(path).items() if n != drop} | add, path)


def failure(folder: Path) -> str:
    """Return the one line that loading a folder fails with."""
    return message(lambda: Model.load(folder), ModelError)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of a small llama that loads."""
    needs.module("safetensors")
    config, weights = small()
    huggingface.save(tmp_path / "model", config, weights, "f32", None)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "gemma3"}, 'model_type "gemma3" is not supported'),
        ({"model_type": ...}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported'),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved true is not supported"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0 is not supported"),
        ({"sliding_window": 16}, "sliding_window 16 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor None of its RoPE is wrong"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor -1 of its RoPE"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}},
            "beta_fast 32 is not supported with rope_type linear",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 500000.0 in another place",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_parameters says otherwise",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type ['linear'] is not supported"),
        ({"rope_scaling": "linear"}, "must be objects"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0 is wrong"),
        ({"num_hidden_layers": 2}, "holds no tensor model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 is wrong"),
        ({"num_hidden_layers": "1"}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "shape [8, 8], but config.json asks for [12, 8]"),
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads 3 does not divide it"),
        ({"num_key_value_heads": 2}, "shape [4, 8], but config.json asks for [8, 8]"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"hidden_size": 10}, "model.embed_tokens.weight has shape [11, 8]"),
        ({"hidden_size": 10**9}, "cannot be computed: dim is 1000000000"),
        ({"num_hidden_layers": 10**9}, "cannot be computed: n_layers is 1000000000"),
        ({"vocab_size": 12}, "model.embed_tokens.weight has shape [11, 8]"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings null is wrong"),
        ({"model_type": "qwen2", "architectures": None}, "self_attn.q_proj.bias"),
        ({"model_type": "qwen3", "architectures": None}, "self_attn.q_norm.weight"),
    ],
)
def test_setting_is_refused_by_its_name(
    folder: Path, settings: dict[str, Any], expected: str
) -> None:
    change(folder, **settings)
    text = failure(folder)
    assert expected in text and str(folder) in text


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token_id": 128000, "use_cache": True, "pretraining_tp": 2, "_name_or_path": "a/b"},
        {"attention_dropout": 0.0, "mlp_bias": None, "rope_interleaved": False, "new_key": []},
        {"partial_rotary_factor": 1.0, "sliding_window": None, "layer_types": ["full_attention"]},
        {"sliding_window": 32},
        {"rope_scaling": {"type": "default"}, "torch_dtype": ..., "dtype": "bfloat16"},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"head_dim": ..., "architectures": ..., "hidden_act": "swish"},
        {"head_dim": None, "rope_scaling": {}, "original_max_position_embeddings": 8},
    ],
)
def test_setting_that_changes_nothing_is_accepted(folder: Path, settings: dict[str, Any]) -> None:
    expected = load(folder)[0].config
    change(folder, **settings)
    assert load(folder)[0].config == expected


def test_what_a_family_leaves_out_is_its_own_default(tmp_path: Path) -> None:
    """Compared with what transformers makes of the same file."""
    transformers = needs.peer("transformers")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        given = {"model_type": kind, "sliding_window": None} if kind == "mistral" else {}
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": kind, **given}))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        config = hf_config.read(path)
        assert config.dim == theirs.hidden_size
        assert config.hidden_dim == theirs.intermediate_size
        assert config.n_layers == theirs.num_hidden_layers
        assert config.n_heads == theirs.num_attention_heads
        assert config.n_kv_heads == theirs.num_key_value_heads
        assert config.vocab_size == theirs.vocab_size
        assert config.seq_len == theirs.max_position_embeddings
        width = getattr(theirs, "head_dim", None) or theirs.hidden_size // config.n_heads
        assert ref.head_width(config) == width
        assert config.norm_eps == theirs.rms_norm_eps
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.tied == theirs.tie_word_embeddings
    path.write_text(json.dumps({"model_type": "mistral"}))
    assert "sliding_window is left out, which means 4096" in message(
        lambda: hf_config.read(path), ModelError
    )


@pytest.mark.parametrize(
    ("kind", "settings", "slides"),
    [
        ("mistral", {"sliding_window": 32, "max_position_embeddings": 32}, False),
        ("mistral", {"sliding_window": 31, "max_position_embeddings": 32}, True),
        ("mistral", {"sliding_window": 31, "use_sliding_window": False}, True),
        ("qwen2", {"sliding_window": 31, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 31, "use_sliding_window": True}, True),
        (
            "qwen2",
            {"sliding_window": 31, "use_sliding_window": True, "max_window_layers": 99},
            False,
        ),
        ("qwen3", {"sliding_window": 31, "use_sliding_window": True, "max_window_layers": 0}, True),
    ],
)
def test_window_counts_only_where_the_family_uses_it(
    tmp_path: Path, kind: str, settings: dict[str, Any], slides: bool
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **settings}))
    if slides:
        assert "sliding_window 31 is not supported" in message(
            lambda: hf_config.read(path), ModelError
        )
    else:
        hf_config.read(path)


def test_llama3_scaling_takes_the_original_length_as_transformers_does(tmp_path: Path) -> None:
    transformers = needs.peer("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for inside, outside in ((None, None), (64, None), (None, 32), (64, 32)):
        given: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 128}
        given["rope_scaling"] = dict(scaling)
        if inside:
            given["rope_scaling"]["original_max_position_embeddings"] = inside
        if outside:
            given["original_max_position_embeddings"] = outside
        (tmp_path / "config.json").write_text(json.dumps(given))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        # Its settings become what it computes with when it does.
        ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
        found = hf_config.read(tmp_path / "config.json").rope_scaling
        assert found is not None
        assert dict(found) == {k: v for k, v in theirs.rope_parameters.items() if k != "rope_theta"}


# ---------------------------------------------------------------------------- damaged folders


def test_damaged_folder_is_named_in_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert str(weights) in failure(folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a Git LFS pointer" in failure(folder)
    weights.write_bytes(whole)
    load(folder)

    rewrite(folder, drop="model.norm.weight")
    assert "holds no tensor model.norm.weight" in failure(folder)
    rewrite(folder, add={"model.norm.weight": np.ones(7, "f4")})
    assert "model.norm.weight has shape [7], but config.json asks for [8]" in failure(folder)
    rewrite(folder, add={"model.norm.weight": np.ones(8, "i4")})
    assert "model.norm.weight is I32, which is not supported" in failure(folder)
    rewrite(folder, add={"model.norm.weight": np.full(8, np.nan, "f4")})
    assert "model.norm.weight has NaN or infinite weights" in failure(folder)
    rewrite(folder, add={"model.norm.weight": np.ones(8, "f4")})
    rewrite(folder, add={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f4")})
    load(folder)
    rewrite(folder, add={"model.layers.0.mlp.gate_proj.bias": np.ones(12, "f4")})
    assert "model.layers.0.mlp.gate_proj.bias" in failure(folder)
    rewrite(folder, drop="model.layers.0.mlp.gate_proj.bias")
    rewrite(folder, add={"model.norm.weight": np.full(8, 1e300)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "model.norm.weight has NaN or infinite weights" in failure(folder)


def test_damaged_index_and_config_are_named_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = small()
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 500)
    huggingface.save(folder, config, weights, "f32", None)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = folder / listed["weight_map"]["model.norm.weight"]
    content = shard.read_bytes()
    shard.unlink()
    assert f"lacks {shard.name}" in failure(folder)
    shard.write_bytes(content)
    for wrong in ("../model.safetensors", "/etc/passwd", "", 3):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": wrong}}))
        assert "which is no file name" in failure(folder)
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"x": shard.name}}))
    assert "holds no tensor x, which" in failure(folder)
    place = shard.name
    index.write_text(json.dumps(listed))
    load(folder)
    twice = "model.embed_tokens.weight"
    other = listed["weight_map"][twice]
    assert other != place
    rewrite(folder, {twice: np.ones((3, 2), "f4")}, file=place)
    text = failure(folder)
    assert f"{shard} holds tensor {twice}, which" in text and f"places in {other}" in text
    shard.write_bytes(content)
    del listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))
    text = failure(folder)
    assert "holds tensor model.norm.weight, which model.safetensors.index.json does not" in text
    index.write_text("{}")
    assert "has no weight_map" in failure(folder)
    index.unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in failure(folder)
    (folder / "config.json").write_text("{")
    assert "is not JSON" in failure(folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert "is not JSON" in failure(folder)
    (folder / "config.json").write_text("[]")
    assert "holds no JSON object" in failure(folder)
    (folder / "config.json").unlink()
    assert "a folder without config.json" in failure(folder)


def test_save_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    config, weights = small(n_layers=2)
    real, calls = huggingface._write_shard, []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(huggingface, "_write_shard", fail)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 1000)
    for target in (folder, folder.parent / "new"):
        calls.clear()
        with pytest.raises(OSError, match="No space"):
            huggingface.save(target, config, weights, "f32", None)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_model_no_family_computes_is_refused(tmp_path: Path) -> None:
    config, weights = small(qkv_bias=True, qk_norm=True)
    with pytest.raises(ModelError, match="qkv_bias and qk_norm"):
        huggingface.save(tmp_path / "x", config, weights, "f32", None)


def test_heads_that_do_not_divide_the_width_load_in_transformers(tmp_path: Path) -> None:
    """LlamaConfig refuses such a model, MistralConfig does not."""
    transformers = needs.peer("transformers")
    config, weights = small(n_heads=3, head_dim=4)
    huggingface.save(tmp_path, config, weights, "f32", None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = families.sequence(again, 20)
    found = ref.forward(weights, config, ids)
    assert np.abs(families.logits_of(again, ids) - found).max() < 1e-5
