"""Several ranks on MPI train as one process does, and end together whatever happens to one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import children
import mpi
import needs
import numpy as np
import pytest
from commands import SMALL

from anepy.engine.shared import SharedEngine
from anepy.models.model import PRESETS, Model
from anepy.system.launcher import Launch, launch
from anepy.text.data import SIDECAR_FORMAT
from anepy.training import checkpoint

HERE = Path(__file__).parent
SEQ = 16
MIDDLE = "2-00000002.npz"
PLAIN = ("--device", "cpu", "--precision", "fp32", "--seq", SEQ, "--lr", 1e-3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model and its tokens."""
    folder = tmp_path_factory.mktemp("mpi")
    Model.init(SMALL, seed=1).save(folder / "m.bin")
    Model.init(PRESETS["stories260K"], seed=1).save(folder / "s.bin")
    tokens = np.random.default_rng(0).integers(0, 259, 5000).astype("<u2")
    tokens.tofile(folder / "d.bin")
    tokens.tofile(folder / "masked.bin")
    mask = (np.random.default_rng(1).random(len(tokens)) < 0.4).astype(np.uint8)
    mask[np.arange(len(tokens)) // 20 % 4 != 0] = 0  # of four documents three have nothing to learn
    mask.tofile(folder / "masked.mask.bin")
    facts = {"format": SIDECAR_FORMAT, "dtype": "uint16", "tokens": len(tokens)}
    facts |= {"vocab_size": 259, "mask": "masked.mask.bin"}
    facts |= {"documents": len(tokens) // 20, "document_starts": "masked.docs.bin"}
    np.arange(0, len(tokens), 20).astype("<i8").tofile(folder / "masked.docs.bin")
    (folder / "masked.bin.json").write_text(json.dumps(facts))
    return folder


def train(ranks: int, files: Path, *words: object, **environment: str) -> mpi.Ended:
    """Run `anepy train` on so many ranks, with the files of `files`."""
    return mpi.run(ranks, *command(*words), cwd=files, **environment)


def command(*words: object) -> tuple[object, ...]:
    return ("-m", "anepy", "train", "m.bin", "--data", "d.bin", *PLAIN, *words)


def saved(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "meta"}


def same(one: Path, other: Path) -> bool:
    a, b = saved(one), saved(other)
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def near(one: Path, other: Path, begin: Path) -> bool:
    """Return whether two models or checkpoints differ by a small part of what training moved."""
    a, b, c = ({n: v.astype(float) for n, v in saved(path).items()} for path in (one, other, begin))
    return a.keys() == b.keys() and all(
        np.abs(a[n] - b[n]).mean() < 1e-3 * (np.abs(b[n] - c.get(n, 0)).mean() + 1e-12) for n in a
    )


def together(*commands: tuple[object, ...]) -> tuple[object, ...]:
    """Return the words that run these commands one after the other on the same ranks."""
    words: list[object] = [HERE / "mpi_train.py"]
    for each in commands:
        words += [*(["then"] if len(words) > 1 else []), *each]
    return tuple(words)


def told_in(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects of a text that holds nothing else."""
    found: list[dict[str, Any]] = []
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


# ------------------------------------------------------------------------- N ranks, or one process


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process(ranks: int, tmp_path: Path) -> None:
    """Every case of mpi_equal.py: weights, losses, norms, twice, with shards; fp16 overflows."""
    ended = mpi.run(ranks, HERE / "mpi_equal.py", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 14, ended.out


def commands_of(ranks: int) -> list[tuple[object, ...]]:
    """Return what trains stories260K, the demo, and on masked data, alike on any of 1, 2, 4."""
    stories = ("train", "s.bin", "--data", "d.bin", *PLAIN[:4], "--seq", 64, "--steps", 16 // ranks,
               "--accum", 4 // ranks, "--save", f"s{ranks}.bin")  # fmt: skip
    demo = ("train", "--steps", 24, "--batch", 8 // ranks, "--warmup", 4, "--eval-windows", 8,
            "--eval-every", 0, "--save", f"demo{ranks}.bin")  # fmt: skip
    masked = ("train", "m.bin", "--data", "masked.bin", *PLAIN, "--steps", 6, "--batch", 4 // ranks,
              "--accum", 2, "--save", f"masked{ranks}.bin")  # fmt: skip
    return [(*words, "--no-checkpoint", "--json") for words in (stories, demo, masked)]


@pytest.fixture(scope="module")
def alone(files: Path) -> list[dict[str, Any]]:
    """Train as one process; return what each command tells."""
    ended = children.run(*together(*commands_of(1)), cwd=files)
    assert ended.returncode == 0, ended.stderr
    return told_in(ended.stdout)


@pytest.mark.parametrize("ranks", [2, 4])
def test_commands_train_as_one_process(
    ranks: int, files: Path, alone: list[dict[str, Any]]
) -> None:
    """stories260K, the demo, and data of which most documents have no token that is counted."""
    ended = mpi.run(ranks, *together(*commands_of(ranks)), cwd=files)
    assert ended.code == 0, ended.err
    told = told_in(ended.out)
    for ours, theirs in zip(told, alone, strict=True):
        ours, theirs = ours["summary"], theirs["summary"]
        assert len(ours["ranks"]["tokens_per_s"]) == ranks and theirs["ranks"] is None
        for name in ("held_out_before", "held_out_after"):
            assert ours[name] == (theirs[name] and pytest.approx(theirs[name], rel=1e-4))
    assert told[1]["summary"]["held_out_after"] < told[1]["summary"]["held_out_before"] - 0.5
    for name in ("s", "demo", "masked"):
        one, other = (Model.load(files / f"{name}{n}.bin").weights for n in (ranks, 1))
        for tensor, values in other.items():
            off = np.abs(one[tensor] - values).mean() / np.abs(values).mean()
            assert off < (2e-3 if name == "demo" else 1e-4), (name, tensor)  # that may be bf16


def test_run_goes_on_with_another_number_of_ranks(files: Path) -> None:
    """Also from the middle of an accumulation; the windows are those of one process."""
    ended = train(2, files, "--steps", 3, "--accum", 4, "--ckpt", "2.npz", "--checkpoint-every", 2,
                  "--keep", 2)  # fmt: skip
    assert ended.code == 0, ended.err
    meta = checkpoint.read_meta(files / MIDDLE)
    assert meta.accumulated == 2 and meta.sampler["index"] == 4 and meta.counted == 64
    words = ("--steps", 3, "--accum", 3, "--resume", MIDDLE, "--ckpt")
    four = [command(*words, "4.npz")[2:], command(*words, "4s.npz", "--shard")[2:]]
    ended = mpi.run(4, *together(*four), cwd=files)
    assert ended.code == 0, ended.err
    one = [
        command("--steps", 4, "--accum", 4, "--resume", MIDDLE, "--ckpt", "1.npz")[2:],
        command("--steps", 6, "--accum", 6, "--ckpt", "6.npz")[2:],
        command("--steps", 8, "--accum", 8, "--ckpt", "8.npz")[2:],
    ]
    done = children.run(*together(*one), cwd=files)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_meta(files / "4.npz").sampler["index"] == 8
    assert same(files / "4.npz", files / "4s.npz")
    assert near(files / "4.npz", files / "8.npz", files / MIDDLE)
    assert near(files / "1.npz", files / "6.npz", files / MIDDLE)
    assert not near(files / "1.npz", files / "8.npz", files / MIDDLE)


def test_only_rank_0_writes_and_shows(files: Path) -> None:
    ended = train(2, files, "--steps", 4, "--accum", 2, "--no-checkpoint", "--json", "--log", "l")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    ranks = told["summary"]["ranks"]
    assert len(ranks["tokens_per_s"]) == 2 and ranks["nbytes"] > 0 and 0 <= ranks["hidden"] <= 1
    assert told["notes"][0].startswith("2 ranks on 1 host")
    records = [json.loads(line) for line in (files / "l").read_text().splitlines()]
    sums = [record for record in records if record["type"] == "ranks"]
    assert [record["step"] for record in sums] == [2, 4]
    assert all(0 <= record["hidden"] <= 1 and record["nbytes"] > 0 for record in sums)
    assert sum(record["type"] == "step" for record in records) == 4


# ------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_any_rank_may_be_asked_to_stop(files: Path, number: int) -> None:
    job = mpi.Running(2, *command("--steps", 10**6, "--ckpt", f"s{number}.npz"), cwd=files)
    job.until(lambda: "step " in job.printed()[0], "steps")
    mpi.kill(job.ranks()[1], number)
    ended = job.end()
    assert "interrupted after step" in ended.out and ended.code != 0, ended.err
    assert checkpoint.read_meta(files / f"s{number}.npz").step > 0


def test_killed_rank_ends_the_job(files: Path) -> None:
    words = ("--steps", 10**6, "--checkpoint-every", 1, "--ckpt", "k.npz")
    job = mpi.Running(2, *command(*words), cwd=files)
    job.until((files / "k.npz").exists, "a checkpoint")
    mpi.kill(job.ranks()[1])
    ended = job.end()
    assert ended.code != 0 and ended.seconds < 30
    assert checkpoint.read_meta(files / "k.npz").step > 0


def test_rank_that_is_stopped_ends_the_job(files: Path) -> None:
    job = mpi.Running(2, HERE / "mpi_train.py", *command()[2:], "--steps", 10**6, cwd=files,
                      STALL_S="3")  # fmt: skip
    job.until(lambda: "step " in job.printed()[0], "steps")
    mpi.kill(job.ranks()[1], signal.SIGSTOP)
    ended = job.end()
    assert ended.code != 0
    assert "has given no sign of life for 3 s" in ended.err


def test_rank_with_other_data_is_named(files: Path) -> None:
    job = mpi.run(2, HERE / "mpi_train.py", *command()[2:], cwd=files, OTHER_DATA="1")
    assert job.code != 0
    assert job.err.count("anepy: error: ") == 1
    assert "differs from rank 0 in data: 4,900 tokens".replace(",", "") in job.err, job.err
    assert "rank 1 of 2" in job.err


def test_exception_of_one_rank_ends_the_job(files: Path) -> None:
    job = mpi.run(2, HERE / "mpi_train.py", *command()[2:], cwd=files, FAILS="1")
    assert job.code != 0
    assert job.err.count("anepy: error: ") == 1 and "rank 1 of 2" in job.err
    assert "nothing but a test" in job.err


# ------------------------------------------------------------------------------- without a launcher


def test_launchers_are_recognized() -> None:
    assert launch({}) is None
    assert launch({"PMI_SIZE": "3", "PMI_RANK": "2"}) == Launch(3, 2, "PMI_SIZE")
    assert launch({"OMPI_COMM_WORLD_SIZE": "x"}) is None


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 32), (5, 32), (19, 17), (33, 31)])
def test_engine_tells_how_many_tokens_run_last(sequences: int, tokens: int) -> None:
    """Before a step as after it; ranks exchange so many rows of the embedding's gradient."""
    ids = np.random.default_rng(0).integers(0, 259, (sequences, tokens + 1)).astype(np.int32)
    with SharedEngine(Model.init(SMALL), threads=1, device="cpu", precision="fp32") as engine:
        engine.hold_embedding(True)
        told = engine.last_tokens(sequences, tokens)
        engine.step(ids[:, :-1], ids[:, 1:])
        assert engine.held_embedding().shape == (told, SMALL.dim)
        assert told % tokens == 0 and 0 < told <= sequences * tokens


def test_launcher_without_mpi4py_is_told(files: Path) -> None:
    hidden = "import sys; sys.modules['mpi4py'] = None; from anepy.cli.main import main; main()"
    ended = children.run(
        "-c", hidden, *command()[2:], cwd=files, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"
    )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "OMPI_COMM_WORLD_SIZE=2" in ended.stderr and "pip install 'anepy[mpi]'" in ended.stderr


def test_one_process_loads_no_mpi(files: Path) -> None:
    code = "import sys; import anepy.training.trainer; assert 'mpi4py' not in sys.modules"
    assert children.run("-c", code, cwd=files).returncode == 0


def test_launcher_of_another_mpi_is_told(files: Path) -> None:
    needs.mpirun(2)
    ended = children.run(*command(), cwd=files, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    assert ended.returncode == 1 and "use the launcher of that one" in ended.stderr, ended.stderr
