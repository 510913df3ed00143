"""Machines that are odd: `anepy train` writes the model there that it writes anywhere."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import children
import needs
import numpy as np
import pytest
from commands import SMALL

from anepy import Model, TokenData, Tokenizer
from anepy.text.data import window_at

pytestmark = needs.LINUX
ROOT = Path(children.anepy.__file__).resolve().parents[1]
READ_ONLY = (
    f"mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT} && "
    "mount -t tmpfs -o ro tmpfs home && HOME=$PWD/home"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model, data, and what a plain run makes of them."""
    made = tmp_path_factory.mktemp("odd") / "ein Ordner é"
    (made / "home").mkdir(parents=True)
    Model.init(SMALL, seed=1).save(made / "m.bin")
    ids = Tokenizer.bytes().encode("A cat sat on a mat. " * 40)
    (made / "d.bin").write_bytes(b"".join(value.to_bytes(2, "little") for value in ids))
    train(made, "plain.bin")
    return made


def train(folder: Path, output: str, shell: str = "", **environment: str | None) -> None:
    """Run a few steps, `shell` being what happens before, and see that they end well."""
    settings = {**os.environ, "PYTHONPATH": children.PYTHONPATH, "ANEPY_NUM_THREADS": "2"}
    for name, value in environment.items():
        settings.pop(name, None)
        settings.update({name: value} if value is not None else {})
    words = [
        sys.executable, "-m", "anepy", "train", "m.bin", "--data", "d.bin", "--seq", "16",
        "--steps", "4", "--accum", "2", "--precision", "fp32", "--save", output,
    ]  # fmt: skip
    command = ["sh", "-c", f"{shell} {shlex.join(words)}"]
    if "mount" in shell:
        command = ["unshare", "-m", *command]
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "step 4 " in done.stdout, done.stderr
    assert (folder / output).stat().st_size > 0


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        ("taskset -c 0", {}),
        ("", {"HOME": None, "LANG": "C", "LC_ALL": "C"}),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("", {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": "/dev/shm"}),
        (READ_ONLY, {}),
        ("mount -t tmpfs -o noexec tmpfs home && TMPDIR=$PWD/home", {}),
    ],
    ids=["one processor", "no home, C", "ASCII", "no cache", "read-only", "noexec"],
)
def test_an_odd_machine_writes_the_same_model(
    folder: Path, shell: str, environment: dict[str, str | None]
) -> None:
    if "mount" in shell:
        needs.mount_namespace()
    train(folder, "odd.bin", shell, **environment)
    assert (folder / "odd.bin").read_bytes() == (folder / "plain.bin").read_bytes()


def test_half_a_processor(folder: Path) -> None:
    with needs.half_a_processor() as group:
        train(folder, "half.bin", f"echo $$ > {group}/tasks;")
    assert (folder / "half.bin").read_bytes() == (folder / "plain.bin").read_bytes()


def test_data_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A file with a hole; its last tokens lie behind what 32 bits can name."""
    ids = np.arange(3, 19, dtype="<u2")
    with open(tmp_path / "large.bin", "wb") as file:
        file.seek(5 << 30)
        file.write(ids.tobytes())
    data = TokenData(tmp_path / "large.bin")
    assert len(data) == (5 << 29) + 16
    assert data.read(len(data) - 16, len(data)).tolist() == ids.tolist()
    tokens, targets = window_at(data, len(data) - 9, 8)
    assert (tokens.tolist(), targets.tolist()) == (ids[7:15].tolist(), ids[8:].tolist())
