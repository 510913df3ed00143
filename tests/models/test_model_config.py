"""Dimensions of models beyond Llama 2's: what makes one, and what RoPE makes of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import llama64 as ref

from anepy.errors import AnepyError, ConfigError
from anepy.models.model import Model, ModelConfig, RopeScaling, TensorTable

SMALL = ModelConfig(24, 22, 3, 6, 2, 29, 11)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_rope_scaling_is_hashable_and_reads_like_the_mapping_it_was_made_from() -> None:
    config = dataclasses.replace(SMALL, rope_scaling=LLAMA3)
    assert config.rope_scaling == RopeScaling(**LLAMA3)  # type: ignore[arg-type]
    assert dict(config.rope_scaling) == LLAMA3
    assert dict(RopeScaling("linear", 2.0)) == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(KeyError):
        RopeScaling("linear", 2.0)["low_freq_factor"]
    assert len({config, dataclasses.replace(SMALL, rope_scaling=dict(LLAMA3)), SMALL}) == 2
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert ModelConfig(**stored) == config and hash(ModelConfig(**stored)) == hash(config)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn', expected linear or llama3"),
        ({"rope_type": "llama3", "factor": 2.0}, "needs low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "has no low_freq_factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "beta_fast"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "rope_high_freq_factor 1 is not above"),
        (LLAMA3 | {"factor": 0.0}, "rope_factor is 0"),
        (LLAMA3 | {"factor": "x"}, "'x'"),
        (LLAMA3 | {"original_max_position_embeddings": 0.5}, "whole"),
    ],
)
def test_rope_scaling_that_makes_no_sense_is_refused(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TensorTable(dataclasses.replace(SMALL, rope_scaling=scaling))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("head_dim", 5, "head_dim 5 is odd"),
        ("head_dim", -2, "head_dim is -2"),
        ("head_dim", 4.5, "whole"),
        ("head_dim", 1 << 40, "far beyond"),
        ("norm_eps", 0.0, "norm_eps is 0"),
        ("norm_eps", -1e-5, "norm_eps is -1e-05"),
        ("norm_eps", math.nan, "norm_eps is nan"),
        ("norm_eps", "small", "norm_eps is 'small'"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("rope_theta", math.inf, "rope_theta is inf"),
        ("rope_theta", None, "rope_theta is None, expected a number"),
        ("qkv_bias", 2, "qkv_bias is 2"),
        ("qk_norm", 2, "qk_norm is 2"),
    ],
)
def test_settings_that_make_no_model_are_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(AnepyError) as caught:
        TensorTable(dataclasses.replace(SMALL, **{field: value}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.5), LLAMA3])
@pytest.mark.parametrize(("head_dim", "theta"), [(None, 10000.0), (10, 500.0), (64, 5e5)])
def test_frequencies_are_those_of_the_reference(
    head_dim: int | None, theta: float, scaling: Any
) -> None:
    config = dataclasses.replace(SMALL, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    wanted = ref.rope_frequencies(config)
    np.testing.assert_allclose(TensorTable(config).frequencies(), wanted, rtol=1e-14)


def test_save_of_the_usual_head_dim_is_that_of_none(tmp_path: Path) -> None:
    usual = dataclasses.replace(SMALL, head_dim=SMALL.dim // SMALL.n_heads)
    Model.init(usual).save(tmp_path / "m.bin")
    assert Model.load(tmp_path / "m.bin").config == SMALL


def test_biases_have_names_and_start_at_zero() -> None:
    model = Model.init(dataclasses.replace(SMALL, qkv_bias=True), seed=1)
    assert {n: w.shape for n, w in model.weights.items()} == ref.tensor_shapes(model.config)
    biases = [n for n in model.weights if n.endswith(".bias")]
    assert len(biases) == 3 * SMALL.n_layers
    assert not any(model.weights[n].any() for n in biases)


def test_norms_of_heads_have_names_and_start_at_one() -> None:
    model = Model.init(dataclasses.replace(SMALL, qk_norm=True), seed=1)
    assert {n: w.shape for n, w in model.weights.items()} == ref.tensor_shapes(model.config)
    norms = [n for n in model.weights if n.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 2 * SMALL.n_layers
    assert all((model.weights[n] == 1).all() for n in norms)
