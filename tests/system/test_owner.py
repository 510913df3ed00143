"""Owner files: one process at a time, those of the dead taken over, those of others respected."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import children
import pytest

from anepy.errors import BusyError
from anepy.system.owner import owned

HOLD = (
    "import signal, sys; from anepy.system.owner import owned\n"
    "with owned(sys.argv[1], 'it'):\n"
    "    print('held', flush=True); signal.pause()"
)


def test_owner_file_is_there_during_the_block_only(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    with owned(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_second_owner_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    with owned(path, "the run r"):
        words = f"^the run r is in use by process {os.getpid()}; .*$"
        with pytest.raises(BusyError, match=words), owned(path, "the run r"):
            pass
        assert path.exists()


def test_owner_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    process = children.start("-c", HOLD, path)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {process.pid}"), owned(path, "it"):
        pass
    process.kill()
    process.communicate()
    assert path.exists()
    with owned(path, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    with owned(path, "it"):
        record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"started": "1"}))
    with owned(path, "it"):
        pass


def test_owner_of_another_computer_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    path.write_text(json.dumps({"pid": 1, "host": f"not-{socket.gethostname()}"}))
    with pytest.raises(BusyError, match=r"on not-.*remove"), owned(path, "it"):
        pass
    assert path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": "y"}'])
def test_owner_file_that_names_nobody_is_respected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "owner"
    path.write_text(text)
    with pytest.raises(BusyError, match="names no process"), owned(path, "it"):
        pass


def test_one_of_many_takes_over_a_dead_owners_file(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    for _ in range(20):
        path.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
        inside, refused = [], []
        barrier, release = threading.Barrier(6), threading.Event()

        def attempt(
            barrier: threading.Barrier = barrier,
            release: threading.Event = release,
            inside: list[int] = inside,
            refused: list[int] = refused,
        ) -> None:
            barrier.wait()
            try:
                with owned(path, "it"):
                    inside.append(1)
                    release.wait(10)
            except BusyError:
                refused.append(1)

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        while len(inside) + len(refused) < 6 and any(t.is_alive() for t in threads):
            release.wait(0.01)
        release.set()
        for thread in threads:
            thread.join()
        assert (len(inside), len(refused)) == (1, 5)
        assert list(tmp_path.iterdir()) == []
