"""Several ranks on MPI train as one process does, and end together whatever happens to one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import children
import mpi
import needs
import numpy as np
import pytest
from commands import SMALL

from anepy.models.model import Model
from anepy.system.launcher import Launch, launch
from anepy.training import checkpoint

HERE = Path(__file__).parent
MIDDLE = "middle.npz"
PLAIN = ("--device", "cpu", "--precision", "fp32", "--seq", 16, "--lr", 1e-3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model and its tokens."""
    folder = tmp_path_factory.mktemp("mpi")
    Model.init(SMALL, seed=1).save(folder / "m.bin")
    np.random.default_rng(0).integers(0, 259, 5000).astype("<u2").tofile(folder / "d.bin")
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


def near(one: Path, other: Path) -> bool:
    a, b = saved(one), saved(other)
    return a.keys() == b.keys() and all(
        np.abs(a[n] - b[n]).mean() < 1e-4 * (np.abs(b[n]).mean() + 1e-12) for n in a
    )


# ------------------------------------------------------------------------- N ranks, or one process


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process(ranks: int, tmp_path: Path) -> None:
    """Every case of mpi_equal.py: weights, losses, norms, twice, with shards; fp16 overflows."""
    ended = mpi.run(ranks, HERE / "mpi_equal.py", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 14, ended.out


def test_run_goes_on_with_another_number_of_ranks(files: Path) -> None:
    """Also from the middle of an accumulation; the windows are those of one process."""
    ended = train(4, files, "--steps", 3, "--accum", 2, "--ckpt", "4.npz", "--shard")
    assert ended.code == 0, ended.err
    ended = train(2, files, "--steps", 3, "--accum", 4, "--ckpt", "2.npz", "--checkpoint-every", 2,
                  "--keep", 2)  # fmt: skip
    assert ended.code == 0, ended.err
    (files / MIDDLE).write_bytes(next(files.glob("2-*2.npz")).read_bytes())
    middle = checkpoint.read_meta(files / MIDDLE)
    assert middle.accumulated == 2 and middle.sampler["index"] == 4 and middle.counted == 64
    ended = train(1, files, "--steps", 6, "--accum", 4, "--resume", MIDDLE, "--ckpt", "1.npz")
    assert ended.code == 0, ended.err
    words = ("--steps", 3, "--accum", 3, "--resume", MIDDLE)
    for name, more in (("3.npz", ()), ("3s.npz", ("--shard",))):
        ended = train(4, files, *words, "--ckpt", name, *more)
        assert ended.code == 0, ended.err
        assert checkpoint.read_meta(files / name).sampler["index"] == 8
    assert same(files / "3.npz", files / "3s.npz")


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
    job = mpi.Running(2, HERE / "mpi_train.py", *command()[2:], "--steps", 10**6, cwd=files)
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
