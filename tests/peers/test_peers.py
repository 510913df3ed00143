"""Training side by side with PyTorch: the same model, data and AdamW."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import needs
import numpy as np
import numpy.typing as npt
import pytest
import tolerances
from cases import GQA, SEPARATE, sequence
from tolerances import assert_tensors_close, relative_error

from anepy.engine import Engine
from anepy.models.model import PRESETS, Model, ModelConfig
from anepy.text.tokenizer import Tokenizer

torch = needs.peer("torch")

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def ids(pair: Pair) -> list[Any]:
    return [torch.from_numpy(np.asarray(part, np.int64))[None] for part in pair]


def losses_of_both(
    model: Model, data: list[Pair], lr: float, accum: int = 1, **options: float
) -> tuple[list[float], list[float]]:
    """Train both on the same sequences and return their losses, step by step.

    An update is the mean over the tokens of its sequences, which need not be of one length.
    """
    from peers import torch_llama

    peer = torch_llama.build(model.config, model.weights)
    adamw = torch_llama.adamw(peer, lr, options.get("weight_decay", 0.0))
    ours, theirs = [], []
    with Engine(model, "opt", "cpu", "fp32", threads=2) as engine:
        for number, pair in enumerate(data, 1):
            first = (number - 1) // accum * accum
            tokens = sum(len(targets) for _, targets in data[first : first + accum])
            loss = peer.loss(*ids(pair))
            (loss * len(pair[1]) / tokens).backward()
            theirs.append(float(loss.detach()))
            ours.append(engine.step(*pair).loss)
            if number % accum:
                continue
            if "grad_clip" in options:
                norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), options["grad_clip"])
            adamw.step()
            adamw.zero_grad()
            stats = engine.update(lr, **options)
            if "grad_clip" in options:
                assert stats.grad_norm == pytest.approx(float(norm), rel=1e-3)
    return ours, theirs


def random_pairs(config: ModelConfig, count: int) -> list[Pair]:
    """Return two sequences in turns, so that there is something to learn."""
    return [sequence(config, 33 + 32 * (n % 2)) for n in range(count)]


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize(
    ("accum", "options"),
    [
        (1, {"lr": 3e-3}),
        (1, {"lr": 3e-3, "weight_decay": 0.1, "grad_clip": 0.5}),
        (4, {"lr": 3e-3, "weight_decay": 0.1}),
    ],
    ids=["plain", "decay-clip", "accumulated"],
)
def test_losses_of_twenty_updates_equal_torch(
    config: ModelConfig, accum: int, options: dict[str, float]
) -> None:
    model = Model.init(config, seed=1)
    data = random_pairs(config, 20 * accum)
    ours, theirs = losses_of_both(model, data, accum=accum, **options)
    assert ours == pytest.approx(theirs, abs=tolerances.TORCH_LOSS_20_STEPS)
    assert np.mean(ours[-5:]) < np.mean(ours[:5]) - 0.1, "nothing was learned"


def test_losses_of_fine_tuning_a_real_model_equal_torch() -> None:
    model = Model.load(needs.data("stories260K.bin"))
    tokenizer = Tokenizer.load(needs.data("tok512.bin"), model.config.vocab_size)
    text = needs.data("tinyshakespeare.txt").read_text("utf-8")[:20000]
    tokens = np.array(tokenizer.encode(text))
    data = [(tokens[i : i + 128], tokens[i + 1 : i + 129]) for i in range(0, 20 * 128, 128)]
    with Engine(model, device="cpu") as engine:
        before = [engine.evaluate(*pair) for pair in data]
    ours, theirs = losses_of_both(model, data, lr=3e-4, weight_decay=0.1, grad_clip=1.0)
    assert ours == pytest.approx(theirs, abs=tolerances.TORCH_LOSS_20_STEPS)
    assert np.mean(ours[10:]) < np.mean(before[10:]) - 0.1, "nothing was learned"


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_gradients_equal_torch(name: str) -> None:
    """At the size of a real model, where the float64 reference would take long."""
    from peers import torch_llama

    model = Model.init(PRESETS[name], seed=1)
    pair = sequence(model.config, 128)
    peer = torch_llama.build(model.config, model.weights)
    loss = peer.loss(*ids(pair))
    loss.backward()
    with Engine(model, "max", "cpu", "fp32", threads=2) as engine:
        assert relative_error(engine.step(*pair).loss, float(loss.detach())) < 1e-6
        # Both are rounded: twice the tolerance against exact gradients.
        found = torch_llama.gradients(peer)
        assert_tensors_close(dict(engine.gradients), found, 2 * tolerances.FP32_GRADIENT)
    assert math.isclose(float(loss.detach()), math.log(model.config.vocab_size), rel_tol=0.05)


# ------------------------------------------------------------------------------------ the scripts

PEERS = Path(__file__).resolve().parent
TINY = ("--preset", "stories260K", "--rounds", "2", "--threads", "1", "--json", "-")


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/peers with this very anepy."""
    path = os.pathsep.join(filter(None, [str(needs.CHECKOUT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(PEERS / name), *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def record(name: str, *words: str) -> dict[str, Any]:
    finished = script(name, *words)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    assert result["format"] == f"anepy-peers-{name.removesuffix('.py')}" and result["version"] == 1
    assert name in result["command"] and result["machine"]["cpus"] >= 1
    return result


def test_step_script_times_only_what_is_right() -> None:
    result = record("step.py", *TINY, "--seq", "32")
    assert set(result["programs"]) == {"anepy fp32", "torch eager"}
    assert result["check"]["anepy fp32"]["gradient_error"] < tolerances.FP32_GRADIENT
    assert result["loss_difference"] < tolerances.PEER_LOSS
    (found,) = result["ratios"]
    ours, theirs = (result["rounds"][name]["step"] for name in ("anepy fp32", "torch eager"))
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    assert found["step"]["median"] == pytest.approx(np.median(pairs))
    assert found["step"]["min"] == pytest.approx(min(pairs))
    assert result["peaks"]["fp32"] > 0


def test_step_script_stops_when_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is the one that counts: a model with another weight must not pass it."""
    monkeypatch.syspath_prepend(str(PEERS))
    import argparse

    import sides  # type: ignore[import-not-found]

    weights = Model.init(PRESETS["stories260K"], seed=1)
    pair = sequence(weights.config, 20)
    options = argparse.Namespace(variant="max", seq=20, threads=1, adam="fused")
    exact = sides.float64_gradients(weights, *pair)
    side = sides.AnepySide(weights, *pair, options, "fp32")
    assert sides.check(side, exact)["gradient_error"] < tolerances.FP32_GRADIENT
    weights.weights["layers.1.feed_forward.w2.weight"][0, 0] += 0.05
    for wrong in (
        sides.AnepySide(weights, *pair, options, "fp32"),
        sides.TorchSide(weights, *pair, options, "fp32", "eager"),
    ):
        with pytest.raises(SystemExit, match=r"float64"):
            sides.check(wrong, exact)


def test_matrix_script_reports_a_point_that_fails() -> None:
    words = ("--axis", "seq", "--values", "16,600", "--precision", "fp32", "--torch", "eager")
    finished = script("matrix.py", *words, *TINY)
    assert finished.returncode == 1
    good, bad = json.loads(finished.stdout)["points"]
    assert good["result"]["settings"]["seq"] == 16 and good["result"]["ratios"]
    assert "600" in bad["result"]["error"]


def test_breakdown_script_accounts_for_the_step() -> None:
    finished = script("breakdown.py", *TINY, "--seq", "64")
    result = json.loads(finished.stdout)
    step = result["step"]
    # A thread that loses its processor between two phases costs a step of microseconds its 3 %.
    left = abs(step["unexplained_ms"]) > 0.03 * step["step_ms"]
    assert finished.returncode == left and ("unexplained" in finished.stderr) == left
    total = sum(step["phases"].values()) + step["unexplained_ms"]
    assert total == pytest.approx(step["step_ms"])
    assert {"device", "classifier", "dw_wait"} <= set(step["phases"])
    products = [row for row in result["parts"] if "products" in row["part"]]
    assert sum(row["operations"] for row in products) == pytest.approx(3 * result["flops"]["fwd"])


def test_generate_script_counts_the_bytes_of_a_token() -> None:
    result = record("generate.py", *TINY, "--tokens", "40")
    config = PRESETS["stories260K"]
    weights = Model(config).table.size
    cache = config.n_layers * config.dim // config.n_heads * config.n_kv_heads * 40
    assert result["bytes_per_token"] == 4 * (weights + cache)
    assert set(result["ms_per_token"]) == {"anepy"} and "ratio" not in result
    reads, times = result["rounds"]["read"], result["rounds"]["anepy"]
    limits = [result["bytes_per_token"] / read / 1e6 for read in reads]
    shares = [limit / ms for limit, ms in zip(limits, times, strict=True)]
    assert result["share"]["anepy"]["median"] == pytest.approx(np.median(shares))


def test_storage_script_compares_the_storages_in_turns() -> None:
    result = record("storage.py", *TINY, "--tokens", "5", "--prompt", "70")
    assert set(result["ms_per_token"]) == set(result["prompt_ms"]) == {"f32", "bf16", "q8"}
    assert set(result["ratio"]) == {"bf16", "q8"} and result["times_as_fast"]["median"] > 0


@needs.LINUX
def test_competitor_script_compares_with_and_without() -> None:
    result = record("competitor.py", *TINY, "--seq", "16", "--steps", "2")
    assert set(result["sides"]) == {"anepy fp32", "torch eager"} and result["missing"] is None
    for name, side in result["sides"].items():
        times = result["rounds"][name]
        pairs = [b / a for a, b in zip(times["alone"], times["beside"], strict=True)]
        assert side["slower"]["median"] == pytest.approx(np.median(pairs))
        assert side["ideal"] >= 1.0


def test_others_script_says_what_is_not_installed() -> None:
    result = record("others.py", *TINY, "--seq", "16")
    assert "not installed" in result["llm.c"]["reason"] and "--mlx" in result["mlx"]["reason"]


def test_precision_script_trains_in_pairs(tmp_path: Path) -> None:
    needs.precision("bf16")
    words = ("--seeds", "2", "--steps", "20", "--threads", "1", "--data", str(tmp_path))
    result = record("precision.py", *words, "--json", "-")
    found = result["runs"]["demo"]
    fp32, bf16 = (found["held_out"][name] for name in ("fp32", "bf16"))
    assert len(fp32) == len(bf16) == 2 and fp32[0] != fp32[1] and fp32 != bf16
    assert found["change"] == pytest.approx([b / a - 1 for a, b in zip(fp32, bf16, strict=True)])
    assert found["largest"] == max(map(abs, found["change"])) < tolerances.BF16_HELD_OUT
    assert "has no stories260K.bin" in result["runs"]["fine-tuning"]["reason"]


def test_precision_script_fails_when_bf16_ends_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    import precision  # type: ignore[import-not-found]

    def train(*words: str) -> str:
        seed, bf16 = int(words[words.index("--seed") + 1]), "bf16" in words
        return json.dumps({"summary": {"held_out_after": 0.1 + 0.0006 * bf16 + 1e-6 * seed}})

    monkeypatch.setattr(precision, "command", train)
    monkeypatch.setattr(sys, "argv", ["precision.py", "--seeds", "3", "--only", "demo"])
    with pytest.raises(SystemExit, match=r"demo: the middle of the pairs is more than 0.5% apart"):
        precision.main()
    shown = capsys.readouterr().out
    assert "largest difference of a pair: 0.60%" in shown and "95 % interval" in shown


def test_numerics_script_holds_variants_against_float64() -> None:
    words = ("numerics.py", "--wide", "--variant", "resident", "--steps", "2", "--length", "16")
    result = subprocess.run(
        [sys.executable, PEERS / words[0], *words[1:]], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["resident", "exact"], ["resident", "fixed"]]
    assert all(0.0 < float(row[2].rstrip("%")) < 1.0 and row[4] == "0" for row in rows)
