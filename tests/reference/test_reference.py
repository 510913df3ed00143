"""Tests of the float64 reference itself: finite differences, PyTorch's autograd, a real model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import needs
import numpy as np
import pytest
import tolerances
from tolerances import assert_tensors_close, relative_error

from reference import adamw64, adapters64, llama2c
from reference import llama64 as ref
from reference.llama64 import Config

# With theta 50 and heads of 12 some pairs are kept, some divided, two in between.
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=0.5,
    high_freq_factor=2.0,
    original_max_position_embeddings=24,
)
# No size is a multiple of another one's tile, and no two are equal, so that a transposed or
# mixed-up dimension cannot pass.
CONFIGS = {
    "mha": Config(12, 20, 2, 3, 3, 29, 40),
    "gqa": Config(24, 22, 2, 6, 2, 29, 40),
    "mqa": Config(18, 10, 1, 3, 1, 23, 40),
    "separate": Config(20, 14, 2, 5, 5, 31, 40, tied=False),
    "gqa-separate": Config(16, 26, 2, 4, 2, 19, 40, tied=False),
    "wide-heads": Config(12, 20, 2, 4, 2, 29, 40, head_dim=10),
    "theta-eps": Config(12, 20, 2, 3, 3, 29, 40, norm_eps=0.3, rope_theta=37.0),
    "linear": Config(12, 20, 2, 3, 3, 29, 40, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "llama3": Config(24, 20, 2, 2, 1, 29, 40, rope_theta=50.0, rope_scaling=LLAMA3),
    "bias": Config(12, 20, 2, 6, 2, 29, 40, qkv_bias=True),
    "qk-norm": Config(12, 20, 2, 4, 2, 29, 40, head_dim=8, norm_eps=0.1, qk_norm=True),
    "everything": Config(
        *(10, 14, 2, 4, 2, 23, 40),
        **dict(head_dim=8, norm_eps=0.01, rope_theta=99.0, rope_scaling=LLAMA3),
        **dict(qkv_bias=True, qk_norm=True, tied=False),
    ),
}
# What a llama2.c file of version 0 can hold.
LLAMA2 = ("mha", "gqa", "mqa", "separate", "gqa-separate")
LENGTHS = (1, 7, 33)


def make_case(name: str, length: int, seed: int = 0):
    """Draw weights far from zero, so that every path matters, and a sequence with repeats."""
    config = CONFIGS[name]
    weights = {
        n: w.astype(np.float64) for n, w in ref.random_weights(config, seed, std=0.3).items()
    }
    ids = np.random.default_rng(seed + 1).integers(0, config.vocab_size, length + 1)
    return config, weights, ids[:-1], ids[1:]


def concerns_scores(tensor: str) -> bool:
    """Say whether a tensor only decides what attention looks at."""
    return tensor.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm")


def numeric_gradient(f, x: np.ndarray, direction: np.ndarray) -> float:
    """Differentiate f() along `direction` in x, which is changed in place and restored.

    Five points: the error is of order step^4, so that a step large enough to keep the rounding
    of f below 1e-12 is still exact to ten digits.
    """
    step, saved = 3e-4, x.copy()
    difference = 0.0
    for multiple, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        x[...] = saved + multiple * step * direction
        difference += weight * f()
    x[...] = saved
    return difference / (12 * step)


def assert_gradient(f, x: np.ndarray, gradient: np.ndarray, rng, label: str) -> None:
    """Compare a gradient with finite differences: two random directions, eight elements."""
    assert gradient.shape == x.shape, label
    directions = [d / np.linalg.norm(d) for d in rng.normal(size=(2, *x.shape))]
    for index in rng.choice(x.size, size=min(8, x.size), replace=False):
        one = np.zeros(x.size)
        one[index] = 1.0
        directions.append(one.reshape(x.shape))
    for direction in directions:
        expected = numeric_gradient(f, x, direction)
        actual = float((gradient * direction).sum())
        assert abs(actual - expected) <= tolerances.FLOAT64_FINITE_DIFFERENCE * max(
            1.0, abs(expected)
        ), f"{label}: {actual} instead of {expected}"


# ---------------------------------------------------------------------------- whole model


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_every_tensor_match_finite_differences(name, length):
    config, weights, tokens, targets = make_case(name, length)
    _, gradients = ref.loss_and_gradients(weights, config, tokens, targets)
    assert list(gradients) == list(ref.tensor_shapes(config))
    rng = np.random.default_rng(2)

    def loss() -> float:
        return ref.cross_entropy(ref.forward(weights, config, tokens), targets)[0]

    for tensor, gradient in gradients.items():
        assert_gradient(loss, weights[tensor], gradient, rng, tensor)
        # One position attends only to itself, whatever q and k are.
        if length > 1 or not concerns_scores(tensor):
            assert np.linalg.norm(gradient) > 1e-3, f"{tensor}: too small to test anything"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_model_against_torch_autograd_is_equal(name, length):
    torch = needs.peer("torch")
    from peers import torch_llama

    config, weights, tokens, targets = make_case(name, length)
    model = torch_llama.build(config, weights, torch.float64)
    ids, labels = torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None]
    expected = model.loss(ids, labels)
    expected.backward()

    loss, gradients = ref.loss_and_gradients(weights, config, tokens, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    with torch.no_grad():
        logits = model(ids)[0].numpy()
    assert relative_error(ref.forward(weights, config, tokens), logits) < 1e-13
    autograd = torch_llama.gradients(model)
    if length == 1:
        for tensor in filter(concerns_scores, list(gradients)):
            assert np.abs(gradients.pop(tensor)).max() < 1e-14  # rounding of zero
            assert np.abs(autograd.pop(tensor)).max() < 1e-14
    assert_tensors_close(gradients, autograd, tolerances.FLOAT64_GRADIENT)


def test_loss_of_real_model_is_the_published_one():
    from anepy.text.tokenizer import Tokenizer

    config, weights = llama2c.read(needs.data("stories260K.bin"))
    tokenizer = Tokenizer.load(needs.data("tok512.bin"), config.vocab_size)
    text = needs.data("tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [s.strip() for s in text.split("<|endoftext|>") if s.strip()]
    # Measured with llama2.c's own model.py in PyTorch.
    published = [(374, 1.3160), (330, 1.2386), (223, 0.9522), (425, 1.4934), (457, 1.1879)]
    assert len(stories) == len(published)
    for story, (count, expected) in zip(stories, published, strict=True):
        ids = tokenizer.encode(story, bos=True)[:513]
        assert len(ids) == count
        loss, _ = ref.cross_entropy(ref.forward(weights, config, ids[:-1]), ids[1:])
        assert loss == pytest.approx(expected, abs=tolerances.LOSS_VALUE)


def test_forward_later_token_changed_leaves_earlier_logits():
    config, weights, tokens, _ = make_case("gqa", 9)
    changed = tokens.copy()
    changed[6] = (changed[6] + 1) % config.vocab_size
    before, after = (ref.forward(weights, config, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert np.abs(before[6:] - after[6:]).max(axis=1).min() > 1e-6


def test_forward_grouped_heads_equal_repeated_kv_weights():
    config, weights, tokens, _ = make_case("gqa", 9)
    group, head_dim = config.n_heads // config.n_kv_heads, config.dim // config.n_heads
    wide = replace(config, n_kv_heads=config.n_heads)
    repeated = dict(weights)
    for name in weights:
        if name.endswith(("wk.weight", "wv.weight")):
            heads = weights[name].reshape(config.n_kv_heads, head_dim, config.dim)
            # Head k's copies must be neighbours: k, k, k', k', not k, k', k, k'.
            repeated[name] = np.concatenate([h for h in heads for _ in range(group)])
    expected = ref.forward(repeated, wide, tokens)
    assert relative_error(ref.forward(weights, config, tokens), expected) < 1e-13


def test_loss_zero_weights_is_log_of_vocabulary():
    config, weights, tokens, targets = make_case("separate", 5)
    zeros = {n: np.zeros_like(w) for n, w in weights.items()}
    loss, _ = ref.loss_and_gradients(zeros, config, tokens, targets)
    assert loss == pytest.approx(math.log(config.vocab_size), rel=1e-14)


@pytest.mark.parametrize("name", ["gqa", "everything"])
def test_masked_batch_averages_over_counted_targets(name):
    config, weights, tokens, targets = make_case(name, 12)
    tokens, targets = tokens.reshape(4, 3), targets.reshape(4, 3).copy()
    targets[0, 1:], targets[2], targets[3, 0] = -100, -1, -7  # 1, 3, 0 and 2 are counted
    loss, gradients = ref.loss_and_gradients(weights, config, tokens, targets)

    total, sums = 0.0, {n: np.zeros_like(w) for n, w in weights.items()}
    for row in range(4):
        logits = ref.forward(weights, config, tokens[row])
        for t in np.flatnonzero(targets[row] >= 0):
            total += ref.cross_entropy(logits[t : t + 1], targets[row, t : t + 1])[0]
            single = np.full(3, -100)
            single[t] = targets[row, t]
            for n, g in ref.loss_and_gradients(weights, config, tokens[row], single)[1].items():
                sums[n] += g
    assert loss == pytest.approx(total / 6, rel=1e-13)
    assert_tensors_close(
        gradients, {n: s / 6 for n, s in sums.items()}, tolerances.FLOAT64_GRADIENT
    )


def test_masked_batch_equals_torch():
    torch = needs.peer("torch")
    from peers import torch_llama

    config, weights, tokens, targets = make_case("everything", 21)
    tokens, targets = tokens.reshape(3, 7), targets.reshape(3, 7).copy()
    targets[0, ::2], targets[1] = -100, -1
    model = torch_llama.build(config, weights, torch.float64)
    expected = model.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
    expected.backward()
    loss, gradients = ref.loss_and_gradients(weights, config, tokens, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    assert_tensors_close(gradients, torch_llama.gradients(model), tolerances.FLOAT64_GRADIENT)


@pytest.mark.parametrize("name", ["gqa", "everything"])
def test_adapter_gradients_match_finite_differences(name):
    config, weights, tokens, targets = make_case(name, 7)
    rng, adapter = np.random.default_rng(5), {}
    for tensor, weight in weights.items():
        if tensor.startswith("layers.1.") and weight.ndim == 2:
            stem = tensor.removesuffix("weight")
            adapter[f"{stem}lora_a"] = rng.normal(0.0, 0.5, (3, weight.shape[1]))
            adapter[f"{stem}lora_b"] = rng.normal(0.0, 0.2, (weight.shape[0], 3))

    def loss() -> float:
        logits = ref.forward(adapters64.adapted(weights, adapter, 1.5), config, tokens)
        return ref.cross_entropy(logits, targets)[0]

    _, full = ref.loss_and_gradients(
        adapters64.adapted(weights, adapter, 1.5), config, tokens, targets
    )
    gradients = adapters64.adapter_gradients(full, adapter, 1.5)
    assert len(gradients) == 14
    for tensor, gradient in gradients.items():
        assert_gradient(loss, adapter[tensor], gradient, rng, tensor)


def test_masked_tail_leaves_its_tokens_without_gradient():
    config, weights, _, _ = make_case("separate", 5)
    _, gradients = ref.loss_and_gradients(weights, config, range(5), [7, 7, -100, -100, -100])
    rows = np.abs(gradients["tok_embeddings.weight"]).max(axis=1)
    assert (rows[:2] > 1e-3).all() and not rows[2:].any()


def test_nothing_counted_is_an_error():
    config, weights, tokens, targets = make_case("mha", 4)
    with pytest.raises(ValueError, match="no target is counted"):
        ref.loss_and_gradients(weights, config, tokens, np.full_like(targets, -100))


# ---------------------------------------------------------------------------- single programs


def test_rmsnorm_backward_matches_finite_differences():
    rng = np.random.default_rng(3)
    x, w, dy = rng.normal(size=(5, 11)), rng.uniform(0.5, 1.5, 11), rng.normal(size=(5, 11))
    dx, dw = ref.rmsnorm_backward(dy, x, w)
    assert_gradient(lambda: float((dy * ref.rmsnorm(x, w)).sum()), x, dx, rng, "x")
    assert_gradient(lambda: float((dy * ref.rmsnorm(x, w)).sum()), w, dw, rng, "w")


def test_rmsnorm_zero_row_stays_finite():
    x, w, dy = np.zeros((1, 4)), np.full(4, 2.0), np.ones((1, 4))
    np.testing.assert_array_equal(ref.rmsnorm(x, w), x)
    dx, _ = ref.rmsnorm_backward(dy, x, w)
    np.testing.assert_allclose(dx, 2.0 / math.sqrt(1e-5), rtol=1e-14)


def test_swiglu_backward_matches_finite_differences():
    rng = np.random.default_rng(4)
    h1, h3, dy = (rng.normal(size=(5, 11)) * 3 for _ in range(3))
    dh1, dh3 = ref.swiglu_backward(dy, h1, h3)
    assert_gradient(lambda: float((dy * ref.swiglu(h1, h3)).sum()), h1, dh1, rng, "h1")
    assert_gradient(lambda: float((dy * ref.swiglu(h1, h3)).sum()), h3, dh3, rng, "h3")


def test_swiglu_extreme_inputs_stay_finite():
    h = np.array([[-1e4, -800.0, 0.0, 800.0, 1e4]])
    np.testing.assert_allclose(ref.swiglu(h, np.ones_like(h)), [[0, 0, 0, 800, 1e4]])


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_backward_matches_finite_differences(length):
    rng = np.random.default_rng(5)
    heads, kv_heads, width = 6, 2, 4
    q, da = (rng.normal(size=(length, heads * width)) for _ in range(2))
    k, v = (rng.normal(size=(length, kv_heads * width)) for _ in range(2))
    _, probs = ref.attention(q, k, v, heads, kv_heads)
    dv, dprobs = ref.attention_backward1(da, v, probs, heads, kv_heads)
    dq, dk = ref.attention_backward2(probs, dprobs, q, k, heads, kv_heads)

    def f() -> float:
        return float((da * ref.attention(q, k, v, heads, kv_heads)[0]).sum())

    for label, x, gradient in (("q", q, dq), ("k", k, dk), ("v", v, dv)):
        assert_gradient(f, x, gradient, rng, label)


def test_attention_probabilities_are_causal_and_sum_to_one():
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(7, 12)), rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    _, probs = ref.attention(q, k, v, 6, 2)
    assert probs.shape == (6, 7, 7)
    assert not np.triu(probs, 1).any()
    np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-14)


def test_rope_first_pair_turns_by_one_radian_per_position():
    x = np.tile([1.0, 0.0, 1.0, 0.0], (3, 2))  # two heads of width 4
    y = ref.rope(x, np.array([1.0, 0.01]))
    for t in range(3):
        slow = t / 100.0  # theta^(-2/4) = 1/100
        head = [math.cos(t), math.sin(t), math.cos(slow), math.sin(slow)]
        np.testing.assert_allclose(y[t], head * 2, atol=1e-15)


def test_rope_inverse_restores_and_products_depend_on_distance_only():
    rng = np.random.default_rng(7)
    f = ref.rope_frequencies(CONFIGS["theta-eps"])
    x = rng.normal(size=(9, 12 * len(f)))
    np.testing.assert_allclose(ref.rope(ref.rope(x, f), f, inverse=True), x, atol=1e-14)
    np.testing.assert_array_equal(ref.rope(x, f)[4:], ref.rope(x[4:], f, start=4))
    q, k = (np.tile(rng.normal(size=2 * len(f)), (9, 1)) for _ in range(2))
    products = ref.rope(q, f) @ ref.rope(k, f).T
    for diagonal in range(-8, 9):
        assert np.ptp(np.diagonal(products, diagonal)) < 1e-13


def test_rope_frequencies_fall_from_one_by_theta():
    np.testing.assert_allclose(ref.rope_frequencies(Config(8, 1, 1, 2, 2, 1, 1)), [1.0, 0.01])
    wide = Config(8, 1, 1, 2, 2, 1, 1, head_dim=8, rope_theta=16.0)
    np.testing.assert_allclose(ref.rope_frequencies(wide), [1.0, 0.5, 0.25, 0.125])


def test_rope_scaling_linear_divides_and_llama3_divides_slow_pairs_only():
    plain = ref.rope_frequencies(replace(CONFIGS["llama3"], rope_scaling=None))
    linear = {"rope_type": "linear", "factor": 4.0}
    found = ref.rope_frequencies(replace(CONFIGS["llama3"], rope_scaling=linear))
    np.testing.assert_allclose(found, plain / 4)
    ratio = ref.rope_frequencies(CONFIGS["llama3"]) / plain
    # Turns within 24 positions: 3.8, 2.0, 1.04, 0.54, 0.28, 0.15; kept from 2, divided to 0.5.
    assert ratio[0] == 1.0 and ratio[4] == ratio[5] == 0.25
    turns = 24 * plain[1:4] / (2 * math.pi)
    assert ((0.5 < turns) & (turns < 2.0)).all()
    np.testing.assert_allclose(ratio[1:4], 0.25 + 0.75 * (turns - 0.5) / 1.5)
    with pytest.raises(ValueError, match="yarn"):
        ref.rope_frequencies(replace(CONFIGS["mha"], rope_scaling=dict(linear, rope_type="yarn")))


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_rope_frequencies_equal_transformers(rope_type):
    needs.peer("torch")
    transformers = needs.peer("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(LLAMA3, rope_type=rope_type)
    config = Config(128, 1, 1, 2, 2, 1, 1, rope_theta=5e5, rope_scaling=scaling)
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters=dict(scaling, rope_theta=5e5)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](theirs, "cpu")
    assert factor == 1.0
    np.testing.assert_allclose(ref.rope_frequencies(config), expected.numpy(), rtol=1e-6)


def test_cross_entropy_large_logits_stay_exact():
    logits = np.array([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    loss, dlogits = ref.cross_entropy(logits, [1, 2])
    assert loss == pytest.approx((1000.0 + math.log(3)) / 2, rel=1e-14)
    np.testing.assert_allclose(dlogits[0], [0.5, -0.5, 0.0], atol=1e-15)
    np.testing.assert_allclose(dlogits[1], [1 / 6, 1 / 6, -1 / 3], atol=1e-15)


# ---------------------------------------------------------------------------- updates


def test_adamw_first_update_is_learning_rate_times_sign():
    w = {"a.weight": np.ones((1, 3)), "norm.weight": np.ones(3)}
    g = {n: np.array([2.0, -1e-3, 0.0]).reshape(x.shape) for n, x in w.items()}
    m, v = ({n: np.zeros_like(x) for n, x in w.items()} for _ in range(2))
    adamw64.adamw(w, g, m, v, 1, lr=0.1, weight_decay=0.5)
    sign = np.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(w["a.weight"][0], 0.95 - 0.1 * sign, rtol=1e-5)
    np.testing.assert_allclose(w["norm.weight"], 1.0 - 0.1 * sign, rtol=1e-5)  # no decay
    np.testing.assert_allclose(m["norm.weight"], 0.1 * g["norm.weight"], rtol=1e-12)
    np.testing.assert_allclose(v["norm.weight"], 0.001 * g["norm.weight"] ** 2, rtol=1e-12)


def test_adamw_ten_updates_equal_torch():
    torch = needs.peer("torch")
    from peers import torch_llama

    config, weights, tokens, targets = make_case("gqa", 7)
    model = torch_llama.build(config, weights, torch.float64)
    optimizer = torch_llama.adamw(model, lr=0.01, weight_decay=0.1)
    m, v = ({n: np.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    losses = []
    for step in range(1, 11):
        loss, gradients = ref.loss_and_gradients(weights, config, tokens, targets)
        adamw64.adamw(weights, gradients, m, v, step, lr=0.01, weight_decay=0.1)
        losses.append(loss)
        expected = model.loss(torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None])
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    assert all(later < earlier for earlier, later in pairwise(losses))
    trained = {n: p.detach().numpy() for n, p in model.named_parameters()}
    assert_tensors_close(weights, trained, 1e-9)


def test_clip_gradients_scales_to_the_bound_and_not_below():
    gradients = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert adamw64.clip_gradients(gradients, 10.0) == 5.0
    assert gradients["a"][0] == 3.0
    assert adamw64.clip_gradients(gradients, 1.0) == 5.0
    assert gradients["a"][0] == pytest.approx(0.6)
    assert gradients["b"][0, 0] == pytest.approx(0.8)


# ---------------------------------------------------------------------------- model files


@pytest.mark.parametrize("name", LLAMA2)
def test_llama2c_written_file_reads_back_equal(tmp_path, name):
    config = CONFIGS[name]
    weights = ref.random_weights(config, seed=8)
    path = tmp_path / "model.bin"
    llama2c.write(path, config, weights)
    read_config, read_weights = llama2c.read(path)
    assert read_config == config
    assert list(read_weights) == list(weights)
    for tensor, w in weights.items():
        np.testing.assert_array_equal(read_weights[tensor], w, err_msg=tensor)


def test_llama2c_file_of_wrong_size_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    llama2c.write(path, CONFIGS["mha"], ref.random_weights(CONFIGS["mha"], seed=8))
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    with pytest.raises(ValueError, match="the header asks for"):
        llama2c.read(path)


def test_llama2c_real_file_is_reproduced_byte_for_byte(tmp_path):
    source = needs.data("stories260K.bin")
    config, weights = llama2c.read(source)
    assert config == Config(64, 172, 5, 8, 4, 512, 512)
    copy = tmp_path / "copy.bin"
    llama2c.write(copy, config, weights)
    before, after = source.read_bytes(), copy.read_bytes()
    tables = 4 * config.seq_len * (config.dim // config.n_heads)
    assert before[:-tables] == after[:-tables]
    # Theirs took the angle in float32: up to 512 rad, half a unit in the last place is 1.5e-5.
    old, new = (np.frombuffer(b[-tables:], "<f4") for b in (before, after))
    np.testing.assert_allclose(old, new, atol=1e-4)
