"""The limits of the machine, and the benchmark against them. Nothing here depends on a time."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from cases import GQA, message
from ckernels import mutate, toolchain

from anepy.bench import cases as bench
from anepy.bench import peaks
from anepy.engine.flops import flops_per_step
from anepy.errors import ConfigError
from anepy.models.model import PRESETS, Model, ModelConfig, TensorTable
from anepy.native.info import library_info

QUICK = {"rounds": 2, "round_ms": 0.0, "seq": 65}
ODD = ModelConfig(52, 44, 2, 2, 1, 600, 70, tied=False)


def test_peaks_of_every_instruction_set_are_numbers_of_that_set() -> None:
    for isa in library_info()["isa_available"]:
        found = peaks.peaks(isa, 1)
        assert (found.isa, found.threads) == (isa, 1)
        numbers = [found.fp32_gflops, found.read_gbs, found.copy_gbs, found.triad_gbs]
        assert all(0.0 < n < 1e7 and math.isfinite(n) for n in numbers), found


def test_peak_without_arguments_is_that_of_an_engine() -> None:
    found = peaks.peaks()
    info = library_info()
    assert (found.isa, found.threads) == (info["isa"], info["threads"])
    assert peaks.peaks() is found  # measured once
    assert peaks.peaks(again=True).fp32_gflops >= found.fp32_gflops
    found = peaks.peaks()
    assert peaks.machine_peak() == found.fp32_gflops
    if found.bf16_gflops is None:
        assert math.isnan(peaks.machine_peak("bf16"))
    else:
        assert peaks.machine_peak("bf16") == found.bf16_gflops


def test_peaks_that_nobody_can_measure_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16.*fp32, bf16"):
        peaks.machine_peak("fp16")
    with pytest.raises(ConfigError, match=r"avx1024.*scalar"):
        peaks.peaks("avx1024")
    for threads in (0, -1, 2**31, 5000):
        with pytest.raises(ConfigError, match="threads"):
            peaks.peaks(threads=threads)


# ---------------------------------------------------------------------------------- the benchmark


def measured(config: ModelConfig, **options: Any) -> list[bench.Result]:
    settings = bench.Settings(**{**QUICK, **options})
    table = TensorTable(config)
    return [bench.measure(table, job, settings) for job in bench.plan(table, settings)]


@pytest.mark.parametrize("config", [GQA, ODD], ids=["gqa", "odd"])
@pytest.mark.parametrize("seq", [1, 64, 77, 130])
def test_every_case_of_every_set_is_right(config: ModelConfig, seq: int) -> None:
    """`measure` compares with the scalar kernels, and raises unless they agree."""
    results = measured(config, seq=seq, rounds=1)
    isas = library_info()["isa_available"]
    for isa in isas:
        names = [r.name for r in results if r.isa == isa and r.precision == "fp32"]
        assert names == [name for name in bench.cases() if name not in ("to_bf16", "from_bf16")]
        named = [r.name for r in results if r.isa == isa and r.precision == "bf16"]
        assert bool(named) == (peaks.peaks(isa, 1).bf16_gflops is not None)
    for result in results:
        assert len(result.seconds) == 1 and result.seconds[0] > 0.0
        assert result.error < 0.03 and (result.error > 0.0) <= (result.isa != "scalar")
        assert result.limit in peaks.LIMITS and result.peak > 0.0
        assert result.bytes > 0.0 and result.operations > 0.0
        assert result.share == pytest.approx(result.rate / result.peak)


def test_error_is_measured_and_not_assumed() -> None:
    """Sums in another order differ a little; that no vector set shows any would be suspicious."""
    needs.vector_sets()
    found = [r.error for r in measured(GQA, only=["w2_forward"]) if r.isa != "scalar"]
    assert all(1e-9 < error < 1e-5 for error in found)


def test_products_of_a_step_add_up_to_its_operations() -> None:
    """Forward products, twice that backward, and the classifier: flops.flops_per_step."""
    config = PRESETS["stories110M"]
    table = TensorTable(config)
    suffixes = ("_forward", "_dx", "_dw")
    names = [n for n in bench.cases() if n.endswith(suffixes) and "attention" not in n]
    total = 0.0
    for name in names:
        found = bench.describe(table, bench.Job(name, "scalar", "fp32", 1), 256)
        total += found.operations * found.calls
    flops = flops_per_step(config, 256)
    assert len(names) == 15
    assert total == pytest.approx(flops["total"] - flops["sdpa_bwd"])


def test_shapes_are_those_of_the_model() -> None:
    table = TensorTable(PRESETS["stories110M"])

    def shape(name: str) -> str:
        return bench.describe(table, bench.Job(name, "scalar", "fp32", 1), 256).shape

    assert shape("qkv_forward") == "2304 x 256 x 768"
    assert shape("w13_dx") == "768 x 256 x 4096"
    assert shape("w2_dw") == "768 x 2048 x 256"
    assert shape("classifier_forward") == "32000 x 256 x 768"
    assert shape("attention_backward") == "12 x 64 x 256"


def test_settings_that_mean_nothing_are_refused() -> None:
    table = TensorTable(GQA)

    def says(**options: Any) -> str:
        return message(lambda: bench.plan(table, bench.Settings(**{**QUICK, **options})))

    assert "'warp'" in says(only=["warp"]) and "adam" in says(only=["warp"])
    assert "'avx1024'" in says(isas=["avx1024"])
    assert "'fp64'" in says(precisions=["fp64"])
    assert "bf16" in says(precisions=["bf16"], isas=["scalar"])
    for name in ("seq", "rounds"):
        for value in (0, -1, 2**31):
            assert f"{name} is {value}" in says(**{name: value})
    assert "threads" in says(threads=[0]) and "threads" in says(threads=[100_000])


def test_only_selects_by_the_beginning_of_a_name() -> None:
    table = TensorTable(GQA)
    jobs = bench.plan(table, bench.Settings(only=["adam", "w2"], isas=["scalar"], threads=[1, 2]))
    names = [job.name for job in jobs]
    assert names == ["w2_forward", "w2_dx", "w2_dw", "adam"] * 2
    assert [job.threads for job in jobs] == [1] * 4 + [2] * 4


# ------------------------------------------------------------------------------ a kernel is wrong


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library with a mistake in some vector kernels; the scalar ones stay right."""
    compiler, folder = needs.program("gcc", "cc", *needs.CLANGS), tmp_path_factory.mktemp("broken")
    flags, sources = toolchain.script_flags(folder, "--werror"), toolchain.library_sources()
    objects = toolchain.compile_files(compiler, flags, sources, folder / "right")
    right = dict(zip(sources, objects, strict=True))
    made = mutate.rebuilt(mutate.of("bench"), right, compiler, lambda _: flags, folder)
    return toolchain.link(compiler, ["-shared"], made, folder / "libanepy.so")


def anepy(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anepy", *words],
        cwd=toolchain.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=toolchain.PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("case", ["wo_forward", "wo_dx", "wo_dw", "adam", "to_fp16", "swiglu"])
def test_wrong_kernel_stops_the_benchmark(broken: Path, case: str) -> None:
    vector = needs.vector_sets()
    command = ["bench", "--preset", "stories260K", "--rounds", "1", "--precision", "fp32"]
    command += ["--only", case, "--isa"]
    result = anepy(*command, vector[-1], ANEPY_LIB=str(broken))
    assert result.returncode == 1 and result.stdout == ""
    told, error = result.stderr.splitlines()
    assert "which ANEPY_LIB names" in told and error.startswith("anepy: error: ")
    assert case in result.stderr and vector[-1] in result.stderr
    assert (
        "differs from the scalar kernels" in result.stderr and "nothing was timed" in result.stderr
    )
    right = anepy(*command, "scalar", ANEPY_LIB=str(broken))
    assert right.returncode == 0 and case in right.stdout


# ------------------------------------------------------------------------------- the command line


def test_file_has_the_documented_schema(tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    command = ["bench", "--preset", "stories260K", "--seq", "33", "--rounds", "3", "--only", "adam"]
    command += ["--only", "wo_", "--threads", "1", "--threads", "2", "--json", str(target)]
    result = anepy(*command)
    assert result.returncode == 0 and result.stderr == ""
    record = json.loads(target.read_text())
    assert (record["format"], record["version"]) == ("anepy-bench", 1)
    assert record["command"] == ["anepy", *command]
    info = library_info()
    assert record["library"]["build_id"] == info["build_id"]
    assert set(record["machine"]) == {"system", "processor", "cpus", "memory"}
    assert record["model"] == {"name": "stories260K", "shape": vars(PRESETS["stories260K"])}
    assert record["settings"]["seq"] == 33
    sets = [(isa, threads) for isa in info["isa_available"] for threads in (1, 2)]
    assert [(peak["isa"], peak["threads"]) for peak in record["peaks"]] == sets
    for row in record["results"]:
        assert len(row["seconds"]) == 3
        assert [row["q1"], row["median"], row["q3"]] == list(
            np.percentile(row["seconds"], (25, 50, 75))
        )
        work = row["operations"] if row["limit"] in ("fp32", "bf16") else row["bytes"]
        assert row["rate"] == pytest.approx(work / row["median"] * 1e-9)
        assert row["share"] == pytest.approx(row["rate"] / row["peak"])
    names = [
        (r["name"], r["isa"], r["threads"]) for r in record["results"] if r["precision"] == "fp32"
    ]
    cases = ("wo_forward", "wo_dx", "wo_dw", "adam")
    assert names == [(name, *which) for which in sets for name in cases]


def test_object_on_standard_output_is_all_there_is() -> None:
    result = anepy(
        "bench", "--preset", "stories260K", "--rounds", "1", "--only", "copy", "--json", "-"
    )
    assert result.returncode == 0
    assert json.loads(result.stdout)["format"] == "anepy-bench"


def test_shapes_come_from_a_model_file(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    Model.init(GQA, seed=1).save(path)
    result = anepy(
        "bench",
        "--model",
        str(path),
        "--rounds",
        "1",
        "--only",
        "wo_forward",
        "--isa",
        "scalar",
        "--seq",
        "50",
    )
    assert result.returncode == 0 and "40 x 50 x 40" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "warp"], "'warp'"),
        (["--isa", "avx1024"], "'avx1024'"),
        (["--threads", "many"], "'many'"),
        (["--threads", "0"], "'0'"),
        (["--preset", "stories9G"], "stories110M"),
        (["--precision", "fp64"], "'fp64'"),
        (["--preset", "stories260K", "--model", "m.bin"], "not both"),
        (["--model", "absent.bin"], "absent.bin"),
        (["--json", "absent/b.json"], "absent"),
    ],
)
def test_bad_input_gets_one_line(words: list[str], said: str) -> None:
    result = anepy("bench", *words)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("anepy: error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    "words", [["--seq", "0"], ["--rounds", "0"], ["--rounds", "x"], ["--wrong"]]
)
def test_bad_usage_gets_exit_code_two(words: list[str]) -> None:
    assert anepy("bench", *words).returncode == 2


def test_list_names_every_case() -> None:
    assert anepy("bench", "--list").stdout.split() == list(bench.cases())


def terminal(columns: int, *words: str) -> str:
    """Run a command on a terminal of that width; return what is shown, control codes left out."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "anepy", *words],
        cwd=toolchain.ROOT,
        env=environment,
        stdout=slave,
        stderr=subprocess.DEVNULL,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux ends a terminal nobody holds this way
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait(toolchain.PATIENCE) == 0
    text = shown.decode().replace("\r\n", "\n")
    return "".join(
        c
        for c in text.replace("\x1b[1m", "").replace("\x1b[0m", "")
        if c.isprintable() or c == "\n"
    )


@pytest.mark.parametrize(("columns", "has"), [(72, False), (80, None), (200, True)])
def test_table_fits_the_terminal(columns: int, has: bool | None) -> None:
    words = (
        "bench",
        "--preset",
        "stories260K",
        "--rounds",
        "1",
        "--isa",
        "scalar",
        "--only",
        "adam",
    )
    text = terminal(columns, *words, "--only", "classifier")
    lines = text.split("\n")
    assert max(map(len, lines)) <= columns
    head = next(line.split() for line in lines if line.strip().startswith("case"))
    assert head[:3] == ["case", "shape", "ms"] and has in (None, "of" in head)
    assert {"rate", "share"} <= set(head)
    row = next(line for line in lines if line.strip().startswith("classifier_forward"))
    assert "512 x 256 x 64" in row and "GFLOP/s" in row and "%" in row
