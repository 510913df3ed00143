"""Downloads against a real server with every fault: one clear line, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import socket
import threading
from pathlib import Path

import children
import needs
import pytest
from downloads import BODY, QUICK, SHA256, WRONG, fetch, make_secure, refused
from http_server import Answer, FileServer, wait_for

from anepy.errors import ChecksumError, DownloadError, OfflineError
from anepy.system import download, files

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_download_good_file_arrives_with_umask_mode(server: FileServer, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "folder" / "f.bin"
    seen: list[tuple[int, int]] = []
    previous = os.umask(0o027)
    try:
        result = fetch(server, dest, Answer(BODY), progress=lambda *step: seen.append(step))
    finally:
        os.umask(previous)
    assert result == dest and dest.read_bytes() == BODY
    assert dest.stat().st_mode & 0o777 == 0o640
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert list(dest.parent.iterdir()) == [dest]


def test_download_existing_file_is_replaced_not_written_into(
    server: FileServer, tmp_path: Path
) -> None:
    """A library that is mapped into a process must keep its old contents: a new inode is needed."""
    dest = tmp_path / "f.bin"
    dest.write_bytes(b"old")
    with open(dest, "rb") as mapped:
        fetch(server, dest, Answer(BODY))
        assert mapped.read() == b"old"
    assert dest.read_bytes() == BODY


def test_download_failure_keeps_existing_file(server: FileServer, tmp_path: Path) -> None:
    dest = tmp_path / "f.bin"
    dest.write_bytes(b"old")
    with pytest.raises(ChecksumError):
        fetch(server, dest, Answer(WRONG))
    assert dest.read_bytes() == b"old" and list(tmp_path.iterdir()) == [dest]


def test_download_without_length_header_arrives(server: FileServer, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "f.bin", Answer(BODY, length=False)).read_bytes() == BODY


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(b"", 404), "404 Not Found"),
        (Answer(b"", 403), "403 Forbidden"),
        (Answer(b"", 407), "proxy wants a name and password"),
        (Answer(b"", 408), "408 Request Timeout"),
        (Answer(b"", 429), "429 Too Many Requests"),
        (Answer(b"", 503), "503 Service Unavailable"),
        (Answer(b"<html>log in</html>", kind="text/html; charset=utf-8"), "web page instead"),
        (Answer(BODY, cut=100_000), "connection broke|100,000 of 1,048,576"),
        (Answer(BODY, cut=100_000, length=False), "100,000 of 1,048,576 bytes"),
        (Answer(BODY[:-1]), "1,048,575 bytes .* instead of 1,048,576"),
        (Answer(BODY + b"x"), "1,048,577 bytes .* instead of 1,048,576"),
        (Answer(BODY + b"x", length=False), "longer than 1,048,576 bytes"),
        (Answer(BODY, stall=100_000), "stopped sending"),
        (Answer(BODY, stall=0), "stopped sending"),
        (Answer(BODY, drip=0.05), "stopped sending"),
    ],
)
def test_download_fault_is_named_and_leaves_nothing(
    server: FileServer, tmp_path: Path, answer: Answer, words: str
) -> None:
    error = refused(server, tmp_path / "f.bin", answer)
    assert type(error) is DownloadError
    error.args = (" ".join(str(error).split()),)
    with pytest.raises(DownloadError, match=words):
        raise error


def test_download_wrong_bytes_are_a_checksum_error(server: FileServer, tmp_path: Path) -> None:
    error = refused(server, tmp_path / "f.bin", Answer(WRONG))
    assert isinstance(error, ChecksumError)
    assert SHA256 in str(error) and hashlib.sha256(WRONG).hexdigest() in str(error)


def test_download_messages_of_different_faults_differ(server: FileServer, tmp_path: Path) -> None:
    faults = [
        Answer(b"", 404),
        Answer(b"", 503),
        Answer(b"x", kind="text/html"),
        Answer(BODY, cut=9, length=False),
        Answer(BODY, stall=9),
        Answer(WRONG),
        Answer(BODY[:9]),
    ]
    messages = {str(refused(server, tmp_path / "f.bin", fault)) for fault in faults}
    assert len(messages) == len(faults)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_download_passing_server_trouble_is_retried(
    server: FileServer, tmp_path: Path, waits: list[float], status: int
) -> None:
    answers = (Answer(b"", status), Answer(b"", status), Answer(BODY))
    assert fetch(server, tmp_path / "f.bin", *answers, retries=3).read_bytes() == BODY
    assert len(server.requests) == 3 and waits == [0.5, 1.0]


@pytest.mark.parametrize(
    "fault", [Answer(BODY, cut=100_000), Answer(BODY, cut=9, length=False), Answer(BODY, stall=9)]
)
def test_download_lost_connection_is_retried(
    server: FileServer, tmp_path: Path, waits: list[float], fault: Answer
) -> None:
    assert fetch(server, tmp_path / "f.bin", fault, Answer(BODY), retries=1).read_bytes() == BODY
    assert len(server.requests) == 2 and len(waits) == 1


def test_download_retries_end_and_waits_are_capped(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    error = refused(server, tmp_path / "f.bin", Answer(b"", 503), retries=6)
    assert "(7 attempts)" in str(error) and len(server.requests) == 7
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


@pytest.mark.parametrize(("asked", "waited"), [("3", 3.0), ("86400", 30.0), ("soon", 0.5)])
def test_download_retry_after_is_honoured_within_reason(
    server: FileServer, tmp_path: Path, waits: list[float], asked: str, waited: float
) -> None:
    busy = Answer(b"", 429, headers={"Retry-After": asked})
    fetch(server, tmp_path / "f.bin", busy, Answer(BODY), retries=1)
    assert waits == [waited]


@pytest.mark.parametrize(
    "fault", [Answer(b"", 404), Answer(b"x", kind="text/html"), Answer(WRONG), Answer(BODY[:9])]
)
def test_download_lasting_fault_is_not_retried(
    server: FileServer, tmp_path: Path, waits: list[float], fault: Answer
) -> None:
    refused(server, tmp_path / "f.bin", fault, Answer(BODY), retries=3)
    assert len(server.requests) == 1 and waits == []


def test_download_nobody_listens_names_host_and_reason(tmp_path: Path, waits: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://user:secret@127.0.0.1:{port}/f.bin"
    with pytest.raises(DownloadError, match=f"cannot connect to 127.0.0.1:{port}") as caught:
        download.download(url, tmp_path / "f.bin", SHA256, len(BODY), timeout=QUICK, retries=2)
    assert "refused" in str(caught.value) and "secret" not in str(caught.value)
    assert len(waits) == 2


def test_download_dead_proxy_is_named_and_not_retried(
    server: FileServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "HTTP_PROXY" in str(refused(server, tmp_path / "f.bin", Answer(BODY), retries=3))
    assert server.requests == [] and waits == []


def test_download_server_without_tls_is_a_tls_message(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    url = server.url("/f.bin").replace("http:", "https:")
    with pytest.raises(DownloadError, match="no secure connection"):
        download.download(url, tmp_path / "f.bin", SHA256, len(BODY), timeout=QUICK)
    assert waits == []


def test_download_untrusted_certificate_names_the_bundle_variable(
    server: FileServer, tmp_path: Path
) -> None:
    _, certificate = make_secure(server, tmp_path)
    server.answers["/f.bin"] = [Answer(BODY)]
    url = server.url("/f.bin").replace("http:", "https:")
    dest = tmp_path / "new" / "f.bin"
    with pytest.raises(DownloadError, match=r"not trusted.*REQUESTS_CA_BUNDLE"):
        download.download(url, dest, SHA256, len(BODY), timeout=QUICK)
    os.environ["REQUESTS_CA_BUNDLE"] = str(certificate)
    try:
        assert download.download(url, dest, SHA256, len(BODY), timeout=QUICK).read_bytes() == BODY
    finally:
        del os.environ["REQUESTS_CA_BUNDLE"]


def test_download_offline_asks_nobody_and_says_so(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEPY_OFFLINE", "1")
    error = refused(server, tmp_path / "f.bin", Answer(BODY))
    assert isinstance(error, OfflineError) and "ANEPY_OFFLINE" in str(error)
    assert server.requests == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), ("", False), ("0", False), ("no", False), ("1", True), ("yes", True)],
)
def test_offline_reads_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    if value is not None:
        monkeypatch.setenv("ANEPY_OFFLINE", value)
    assert download.offline() is expected


def test_file_url_mirror_replaces_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert download.file_url("https://a.example/v1/", "f.bin") == "https://a.example/v1/f.bin"
    monkeypatch.setenv("ANEPY_MIRROR", "http://mirror.example/anepy/")
    assert (
        download.file_url("https://a.example/v1/", "f.bin") == "http://mirror.example/anepy/f.bin"
    )


def test_cache_dir_variable_wins_and_nothing_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_dir().name == "anepy"
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path / "chosen"))
    assert download.cache_dir() == tmp_path / "chosen"
    assert list(tmp_path.iterdir()) == []


def test_download_unwritable_folder_is_named(server: FileServer, tmp_path: Path) -> None:
    """Mode bits do not stop root, a parent that is a file does."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DownloadError, match=r"cannot write .*/f\.bin: .*/file is not a folder"):
        fetch(server, blocker / "f.bin", Answer(BODY))
    assert list(tmp_path.iterdir()) == [blocker]


def test_download_onto_a_folder_is_refused(server: FileServer, tmp_path: Path) -> None:
    dest = tmp_path / "f.bin"
    dest.mkdir()
    with pytest.raises(DownloadError, match="cannot write"):
        fetch(server, dest, Answer(BODY))
    assert list(tmp_path.iterdir()) == [dest]


def test_download_too_large_for_the_disk_is_refused_before_asking(
    server: FileServer, tmp_path: Path
) -> None:
    with pytest.raises(DownloadError, match="left; free some space"):
        download.download(server.url("/f.bin"), tmp_path / "f.bin", SHA256, 1 << 60)
    assert server.requests == [] and list(tmp_path.iterdir()) == []


@needs.LINUX  # which has /dev/full
def test_download_disk_filling_up_says_full(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full gives the real ENOSPC; it is opened in place of the temporary file."""
    monkeypatch.setattr(files, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    assert "is full" in str(refused(server, tmp_path / "f.bin", Answer(BODY)))


def test_download_ctrl_c_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "f.bin", Answer(BODY), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_download_real_ctrl_c_during_a_stall_leaves_nothing(
    server: FileServer, tmp_path: Path
) -> None:
    server.answers["/f.bin"] = [Answer(BODY, stall=300_000)]
    dest = tmp_path / "f.bin"
    code = (
        "import sys; from pathlib import Path; from anepy.system import download\n"
        f"download.download(sys.argv[1], Path(sys.argv[2]), {SHA256!r}, {len(BODY)})"
    )
    process = children.start("-c", code, server.url("/f.bin"), dest)
    try:
        assert wait_for(lambda: list(tmp_path.glob(".anepy-*.tmp")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


def test_download_two_processes_at_once_both_succeed(server: FileServer, tmp_path: Path) -> None:
    server.answers["/f.bin"] = [Answer(BODY)]
    dest = tmp_path / "f.bin"
    code = (
        "import sys; from pathlib import Path; from anepy.system import download\n"
        f"download.download(sys.argv[1], Path(sys.argv[2]), {SHA256!r}, {len(BODY)})"
    )
    processes = [children.start("-c", code, server.url("/f.bin"), dest) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert dest.read_bytes() == BODY and list(tmp_path.iterdir()) == [dest]


def test_download_threads_at_once_both_succeed(server: FileServer, tmp_path: Path) -> None:
    server.answers["/f.bin"] = [Answer(BODY)]
    url, dest = server.url("/f.bin"), tmp_path / "f.bin"
    done: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: done.append(download.download(url, dest, SHA256, len(BODY)))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [dest] * 4 and list(tmp_path.iterdir()) == [dest]


def test_install_file_good_copy_is_installed(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "new" / "f.bin"
    source.write_bytes(BODY)
    assert download.install_file(source, dest, SHA256.upper(), len(BODY)).read_bytes() == BODY
    assert source.exists() and list(dest.parent.iterdir()) == [dest]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (WRONG, ChecksumError, "SHA-256"),
        (BODY[:-1], DownloadError, "1,048,575 bytes instead of 1,048,576"),
        (b"", DownloadError, "0 bytes instead of"),
        (None, DownloadError, "No such file"),
    ],
)
def test_install_file_bad_copy_is_refused(
    tmp_path: Path, content: bytes | None, kind: type[DownloadError], words: str
) -> None:
    source, dest = tmp_path / "source", tmp_path / "new" / "f.bin"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(kind, match=words) as caught:
        download.install_file(source, dest, SHA256, len(BODY))
    assert str(source) in str(caught.value) and not dest.exists()


def test_progress_bar_without_terminal_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with download.progress_bar("f.bin") as progress:
        assert progress is None
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal_shows_name_and_bytes() -> None:
    code = (
        "from anepy.system import download\n"
        "with download.progress_bar('f.bin') as progress:\n"
        "    progress(0, 4_000_000); progress(3_000_000, 4_000_000)\n"
    )
    master, slave = pty.openpty()
    process = children.start("-c", code, stderr=slave, TERM="xterm", COLUMNS="100")
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:
        pass  # Linux says EIO when the other end is closed
    finally:
        os.close(master)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 0
    assert b"f.bin" in shown and b"3.0/4.0 MB" in shown
