"""docs/formats.md names the fields of every file and every JSON there is, and none besides."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest

import anepy
from anepy.engine.stats import PHASES
from anepy.models.fetching import Fetched

PAGE = needs.CHECKOUT / "docs" / "formats.md"


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[
        [*re.findall(r"^## (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)].index(title) + 1
    ]


def spread(name: str) -> list[str]:
    """Write `a.{b,c}` out: `a.b`, `a.c`."""
    match = re.fullmatch(r"(.*)\{(.*)\}", name)
    return [match[1] + part for part in match[2].split(",")] if match else [name]


def documented(title: str, head: str = "field") -> set[str]:
    """Return the names in the first column of the section's table that begins with `head`."""
    table = re.search(rf"^\| {re.escape(head)} \|.*\n\|[- |]+\n((?:\|.*\n)+)", section(title), re.M)
    assert table is not None, f"{title}: no table of {head}"
    first = [row.split("|")[1] for row in table[1].splitlines()]
    return {n for cell in first for name in re.findall(r"`([^`]+)`", cell) for n in spread(name)}


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of everything in a JSON value that is no object and no list of something."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path


def assert_described(value: Any, names: set[str]) -> None:
    """Every leaf has a name or is inside of something that has one; every name is there."""

    def begins(path: str, name: str) -> bool:
        whole, part = path.replace("[]", ""), name.replace("[]", "")
        return whole == part or whole.startswith(f"{part}.")

    found = set(leaves(value))
    assert {p for p in found if not any(begins(p, name) for name in names)} == set()
    assert {name for name in names if not any(begins(p, name) for p in found)} == set()


def run(where: Path, *words: str) -> str:
    command = [sys.executable, "-m", "anepy", *words]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of byte tokens, its tokenizer, a text and its tokens; train for six steps."""
    made = tmp_path_factory.mktemp("formats")
    config = anepy.ModelConfig(32, 48, 2, 4, 2, 259, 64)
    anepy.Model.init(config, seed=1).save(made / "m.bin")
    anepy.Tokenizer.bytes().save(made / "tokenizer.bin")
    (made / "t.txt").write_text("one fine day\n<|endoftext|>\nanother fine day\n" * 40)
    prepared = run(made, "prepare", "t.txt", "-o", "t.bin", "-z", "tokenizer.bin", "--json")
    (made / "prepare.json").write_text(prepared)
    words = "train m.bin --data t.bin --steps 6 --accum 4 --seq 32 --held-out 0.2 --eval-windows 2"
    words += " --eval-every 2 --log t.jsonl --ckpt t.npz --save s.bin --sample-every 5 --json"
    (made / "train.json").write_text(run(made, *words.split()))
    return made


def test_names_are_compared_in_both_directions() -> None:
    value = {"a": {"b": 1}, "c": [{"d": 2}], "e": []}
    assert_described(value, {"a", "c[].d", "e[]"})
    with pytest.raises(AssertionError):
        assert_described(value, {"a", "c[].d"})
    with pytest.raises(AssertionError):
        assert_described(value, {"a", "c[].d", "e[]", "f"})
    assert spread("a.{b,c[]}") == ["a.b", "a.c[]"]


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("Eval", "eval m.bin --data t.bin --seq 32 --windows 2"),
        ("Generate", "generate m.bin -p on -n 4 -z tokenizer.bin"),
        ("Info", "info"),
        ("Bench", "bench --preset stories260K --seq 16 --rounds 1 --only rmsnorm --threads 1"),
        (
            "Compare",
            "compare baseline opt --ablate --model m.bin --data t.bin --seq 8 --rounds 2 --steps 2",
        ),
        ("Probe", "probe --device sim:m1 add"),
    ],
    ids=lambda value: value.split()[0],
)
def test_json_of_a_command(title: str, words: str, folder: Path) -> None:
    option = ["--json", "-"] if title in ("Bench", "Compare") else ["--json"]
    assert_described(json.loads(run(folder, *words.split(), *option)), documented(title))


def test_json_of_fetch(folder: Path) -> None:
    assert_described(json.loads(run(folder, "fetch", "--json")), documented("Fetch"))
    names = {field.name for field in fields(Fetched)}
    assert names == documented("Fetch", "field of `files[]`")


def test_json_of_prepare_and_the_file_beside_tokens(folder: Path) -> None:
    assert_described(json.loads((folder / "prepare.json").read_text()), documented("Prepare"))
    assert_described(json.loads((folder / "t.bin.json").read_text()), documented("Tokens"))


def test_json_of_train(folder: Path) -> None:
    record = json.loads((folder / "train.json").read_text())
    assert_described(record, documented("Train"))
    assert_described(record["summary"], documented("Train", "field of `summary`"))


def test_log(folder: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section("Log"), re.MULTILINE)
    named = {kind: {n for n in re.findall(r"`([^`]+)`", rest)} for kind, rest in rows}
    named["summary"] = documented("Train", "field of `summary`")
    del named["type"]  # the head of the table
    named["step"] |= {log for _, log in phases()}
    named["perf"] -= {"ane"}  # a device, no field
    assert named.pop("rollback") == {"step", "reason"}  # tests/cli/test_runs.py makes one
    # Of several ranks, see tests/training/test_mpi.py.
    assert named.pop("ranks") == {"step", "hidden", *(f.name for f in fields(anepy.Traffic))}
    assert set(named) == {"run", "step", "batch", "perf", "eval", "sample", "restart", "summary"}
    # With a budget of two programs the third step needs a new process.
    words = "train m.bin --data t.bin --steps 3 --accum 1 --seq 32 --device sim:m4,budget=2"
    run(folder, *words.split(), "--log", "restarted.jsonl", "--ckpt", "restarted.npz")
    seen = set()
    lines = [(folder / f"{name}.jsonl").read_text() for name in ("t", "restarted")]
    for line in "".join(lines).splitlines():
        record = json.loads(line)
        kind = record.pop("type")
        seen.add(kind)
        assert_described(record, named[kind])
    assert seen == set(named)


def phases() -> list[tuple[str, str]]:
    """Return what docs/compare.md says: the name of each phase and that in the log."""
    page = PAGE.with_name("compare.md").read_text("utf-8")
    return re.findall(r"^\| `(\w+)` \| `(t_\w+)` \|", page, re.MULTILINE)


def test_phases_are_those_of_the_table() -> None:
    assert sorted(phases()) == sorted((phase.key, phase.log) for phase in PHASES)
    times = {f.name for f in fields(anepy.StepStats) if f.name.endswith("_ms")}
    assert times == {"step_ms", *(phase.field for phase in PHASES)}


def test_every_number_of_stats_is_in_the_log(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]
    names = {phase.field: phase.log for phase in PHASES}
    for kind, record in ((anepy.StepStats, "step"), (anepy.UpdateStats, "batch")):
        expected = {names.get(f.name, f.name) for f in fields(kind)}
        found = [line for line in lines if line["type"] == record]
        assert found and all(expected <= set(line) for line in found)


def test_folder_of_a_run_and_json_of_runs(folder: Path) -> None:
    words = "train m.bin --data t.bin --steps 4 --accum 2 --seq 32 --held-out 0.2 --eval-every 2"
    words += " --eval-windows 2 --checkpoint-every 2 --keep 1 --run folder"
    run(folder, *words.split())
    named = documented("Run folder", "file")
    found = {path.name.replace("00000004", "STEP") for path in (folder / "folder").iterdir()}
    assert found == named - {"run.owner", "checkpoint.npz.owner"}
    described = json.loads((folder / "folder" / "run.json").read_text())
    assert_described(described, documented("Run folder", "field of `run.json`"))
    record = json.loads(run(folder, "runs", "folder", "--json"))
    assert_described(record, documented("Run folder", "field of `anepy runs --json`"))


def test_checkpoint(folder: Path) -> None:
    names = list(anepy.Model.load(folder / "m.bin").weights)
    with np.load(folder / "t.npz") as arrays:
        expected = {"meta", *(f"{kind}{name}" for kind in ("", "m.", "v.") for name in names)}
        assert set(arrays.files) == expected
        meta = json.loads(str(arrays["meta"]))
    run(folder, "train", "m.bin", *"--data t.bin --seq 16 --steps 1 --lora --ckpt l.npz".split())
    with np.load(folder / "l.npz") as arrays:
        adapter = json.loads(str(arrays["meta"]))["adapter"]
    assert meta["adapter"] == {} and adapter
    assert_described(meta | {"adapter": adapter}, documented("Checkpoint", "field of `meta`"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_model_has_its_tensors_in_the_order_of_the_page(tied: bool, tmp_path: Path) -> None:
    config = anepy.ModelConfig(32, 48, 2, 4, 2, 61, 20, tied=tied)
    model = anepy.Model.init(config, seed=2)
    model.save(tmp_path / "m.bin")
    raw = (tmp_path / "m.bin").read_bytes()
    assert struct.unpack("<7i", raw[:28]) == (32, 48, 2, 4, 2, 61 if tied else -61, 20)
    extents = {"vocabulary": 61, "dim": 32, "kv": 16, "hidden": 48}
    rows = re.findall(r"^\| `([\w.]+)`.*? \| ([\w, ]+) \|$", section("Model"), re.MULTILINE)
    rows = [row for row in rows if row[1].split(",")[0] in extents]
    assert len(rows) == 12
    at, seen = 28, set()
    for name, shape in rows:
        if name == "output.weight":
            at += 2 * 20 * 4 * 4  # tables: context, half a head
            if tied:
                break
        for layer in range(2) if "N" in name else [0]:
            weight = model.weights[name.replace("N", str(layer))]
            seen.add(name.replace("N", str(layer)))
            assert weight.shape == tuple(extents[word] for word in shape.split(", "))
            stored = np.frombuffer(raw, "<f4", weight.size, at)
            assert np.array_equal(stored, weight.ravel()), name
            at += weight.nbytes
    assert at == len(raw)
    assert seen == set(model.weights)


def test_tokenizer_is_laid_out_as_the_page_says(tmp_path: Path) -> None:
    tokenizer = anepy.Tokenizer.bytes()
    tokenizer.save(tmp_path / "t.bin")
    raw = (tmp_path / "t.bin").read_bytes()
    at, entries = 4, []
    while at < len(raw):
        score, n = struct.unpack_from("<fi", raw, at)
        entries.append(raw[at + 8 : at + 8 + n])
        assert score == 0.0
        at += 8 + n
    assert len(entries) == tokenizer.vocab_size == 259
    assert struct.unpack_from("<i", raw)[0] == max(map(len, entries))


def test_every_number_of_stats_is_a_column_of_a_comparison(folder: Path) -> None:
    words = "compare baseline opt --model m.bin --data t.bin --seq 32 --rounds 1 --steps 1 --json -"
    run_ = json.loads(run(folder, *words.split()))["groups"][0]["runs"][0]
    for kind, columns in ((anepy.StepStats, "steps"), (anepy.UpdateStats, "updates")):
        assert {"round", "wall_ms", *(f.name for f in fields(kind))} == set(run_[columns])
        lengths = {len(column) for column in run_[columns].values()}
        assert len(lengths) == 1
