"""`anepy mil`: what it prints, writes and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from program_cases import make_case, random_model
from typer.testing import CliRunner

from anepy.cli.mil import mil as command
from anepy.hardware import programs as mil
from anepy.hardware.program import Program
from anepy.models.model import PRESETS, Model, ModelConfig

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """Return a function that runs `anepy mil`."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("mil")(command)
    return lambda *words: CliRunner().invoke(app, ["mil", *map(str, words)])


def test_mil_prints_the_text_and_the_table_apart(run: Run) -> None:
    result = run("sdpa_bwd1", "--preset", "stories260K", "--seq", "100")
    assert result.exit_code == 0
    model = Model(PRESETS["stories260K"])
    program = mil.describe(model.table, "sdpa_bwd1", width=128)
    assert result.stdout == mil.generate(model, [program])[0]
    table = result.stderr.splitlines()
    assert table[0] == "sdpa_bwd1, layer 0: a_in [1, 192, 1, 128] -> z_out [1, 2080, 1, 128]"
    assert table[2].split() == ["input", "k", "[32,", "128]", "a_in", "64..95"]
    assert table[-1].split() == ["weight", "wo", "[64,", "64]", "baked"]
    assert len(table) == 1 + len(program.ports)


def test_mil_of_a_dynamic_program_names_its_weight_surfaces(run: Run) -> None:
    result = run("ffn_fwd", "--preset", "stories260K", "--dynamic", "--dialect", "1.0")
    assert result.exit_code == 0
    assert result.stdout.startswith("program(1.0)\n")
    assert "tensor<fp16, [1, 64, 1, 192]> w3_w2) {" in result.stdout
    assert result.stderr.splitlines()[-1].endswith("w3_w2 [1, 64, 1, 192]")


def test_mil_out_writes_files_that_run(run: Run, tmp_path: Path) -> None:
    model = random_model(ModelConfig(32, 64, 2, 2, 1, 40, 64))
    model.save(tmp_path / "m.bin")
    folder = tmp_path / "new" / "out"
    result = run("ffn_fwd", "--model", tmp_path / "m.bin", "--layer", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "a_in [1, 32, 1, 64]" in result.stdout and not result.stderr
    text, blob = (folder / "model.mil").read_text(), (folder / "weights/weight.bin").read_bytes()
    case = make_case(model, "ffn_fwd", 64, layer=1)
    assert (text, blob) == mil.generate(model, [case.program])
    out = Program(text, {"weight.bin": blob})(**case.inputs)
    assert max(case.errors(np.asarray(out)).values()) < 4e-3


def test_mil_out_leaves_no_weights_of_another_program(run: Run, tmp_path: Path) -> None:
    small = ("--preset", "stories260K", "--seq", 64, "--out", tmp_path)
    assert run("sdpa_bwd2", *small).exit_code == 0
    assert (tmp_path / "weights" / "weight.bin").exists()
    assert run("softmax", *small).exit_code == 0
    assert not (tmp_path / "weights" / "weight.bin").exists()


def test_mil_of_several_programs_is_one_text(run: Run) -> None:
    result = run("sdpa_fwd", "ffn_fwd", "--preset", "stories260K", "--seq", 64, "--chip", "m1")
    assert result.exit_code == 0
    assert "func procedure000<" in result.stdout and "func procedure001<" in result.stdout
    assert result.stderr.splitlines()[-1] == "m1: no rule is broken"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["sdpa"], "unknown program 'sdpa': use one of sdpa_fwd"),
        (["ffn_fwd", "--preset", "stories1M"], "unknown preset 'stories1M'"),
        (["ffn_fwd", "--chip", "m9"], "unknown chip 'm9'"),
        (["ffn_fwd", "--dialect", "2"], "unknown MIL dialect '2'"),
        (["ffn_fwd", "--layer", "12"], "layer 12, the model has 0 to 11"),
        (["ffn_fwd", "--model", "none.bin"], "none.bin"),
        (["ffn_fwd", "--model", "a.bin", "--preset", "stories15M"], "not both"),
    ],
)
def test_mil_refuses_in_one_line(run: Run, words: list[str], why: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout == "" and result.stderr.count("\n") == 1 and why in result.stderr
