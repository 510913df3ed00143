"""Downloads that go on where they stopped, never with another file, and where servers lead to."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import children
import pytest
from downloads import BODY, QUICK, SHA256, WRONG, fetch, make_secure, refused
from http_server import Answer, FileServer, wait_for

from anepy.errors import BusyError, ChecksumError, DownloadError
from anepy.system import download

pytestmark = pytest.mark.usefixtures("clean_environment")

# Parts that are kept and taken up again

TAGGED = {"ETag": '"one"'}


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_download_goes_on_where_the_connection_broke(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    broken = Answer(BODY, cut=300_000, headers=TAGGED, ranges=True)
    whole = Answer(BODY, headers=TAGGED, ranges=True)
    assert fetch(server, tmp_path / "f.bin", broken, whole, retries=1).read_bytes() == BODY
    assert server.asked == ["", "bytes=300000-"] and kept(tmp_path) == {"f.bin"}


@pytest.mark.parametrize("headers", [TAGGED, {"Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}])
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_download_keeps_what_arrived_for_the_next_command(
    server: FileServer, tmp_path: Path, headers: dict[str, str], fault: str
) -> None:
    broken = Answer(BODY, headers=headers, **{fault: 300_000})  # type: ignore[arg-type]
    with pytest.raises(DownloadError, match="300,000 bytes are kept, the same command goes on"):
        fetch(server, tmp_path / "f.bin", broken, keep=True)
    assert kept(tmp_path) == {"f.bin.part", "f.bin.part.json"}
    seen: list[tuple[int, int]] = []
    whole = Answer(BODY, headers=headers, ranges=True)
    if "ETag" not in headers:
        # The server compares dates as this one compares tags.
        whole = Answer(BODY, headers=headers | {"ETag": headers["Last-Modified"]}, ranges=True)
    fetch(server, tmp_path / "f.bin", whole, keep=True, progress=lambda *step: seen.append(step))
    assert (tmp_path / "f.bin").read_bytes() == BODY and kept(tmp_path) == {"f.bin"}
    assert server.asked[-1] == "bytes=300000-" and seen[0] == (300_000, len(BODY))


def test_download_of_a_file_that_changed_in_between_begins_anew(
    server: FileServer, tmp_path: Path
) -> None:
    old = Answer(WRONG, cut=300_000, headers={"ETag": '"old"'}, ranges=True)
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "f.bin", old, keep=True)
    new = Answer(BODY, headers={"ETag": '"new"'}, ranges=True)
    assert fetch(server, tmp_path / "f.bin", new, keep=True).read_bytes() == BODY
    assert server.asked[-1] == "bytes=300000-" and kept(tmp_path) == {"f.bin"}


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_download_parts_of_two_versions_are_never_joined(
    server: FileServer, tmp_path: Path, waits: list[float], sha256: str | None
) -> None:
    """A server that ignores If-Range is found out by the tag of the part."""
    dest = tmp_path / "f.bin"
    old = Answer(WRONG, cut=300_000, headers={"ETag": '"old"'})
    part = Answer(
        BODY[300_000:], 206,
        headers={"ETag": '"new"', "Content-Range": f"bytes 300000-{len(BODY) - 1}/{len(BODY)}"},
    )  # fmt: skip
    server.answers["/f.bin"] = [old, part, Answer(BODY, headers={"ETag": '"new"'})]
    size = len(BODY) if sha256 else None
    download.download(server.url("/f.bin"), dest, sha256, size, timeout=QUICK, retries=2, keep=True)
    assert dest.read_bytes() == BODY and server.asked == ["", "bytes=300000-", ""]


def test_download_of_unknown_hash_resumes_only_what_the_server_names(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    server.answers["/f.bin"] = [Answer(BODY, cut=300_000, ranges=True), Answer(BODY, ranges=True)]
    url, dest = server.url("/f.bin"), tmp_path / "f.bin"
    download.download(url, dest, None, None, timeout=QUICK, retries=1, keep=True)
    assert dest.read_bytes() == BODY and server.asked == ["", ""]


def test_download_of_unknown_hash_needs_a_length(server: FileServer, tmp_path: Path) -> None:
    server.answers["/f.bin"] = [Answer(BODY, length=False)]
    with pytest.raises(DownloadError, match="does not say how long"):
        download.download(server.url("/f.bin"), tmp_path / "f.bin", None, None, timeout=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_download_shorter_file_on_the_server_is_noticed(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    """The part is longer than the file now is: 416."""
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "f.bin", Answer(BODY, cut=300_000), keep=True)
    short = Answer(BODY[:200_000], ranges=True)
    with pytest.raises(DownloadError, match=r"200,000 bytes .* instead of 1,048,576"):
        fetch(server, tmp_path / "f.bin", short, keep=True, retries=1)
    assert kept(tmp_path) == set()


def test_download_wrong_bytes_are_not_kept(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ChecksumError):
        fetch(server, tmp_path / "f.bin", Answer(WRONG), keep=True)
    assert kept(tmp_path) == set()


def test_download_part_that_was_damaged_is_found_out(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "f.bin", Answer(BODY, cut=300_000, headers=TAGGED), keep=True)
    part = tmp_path / "f.bin.part"
    part.write_bytes(b"!" + part.read_bytes()[1:])
    whole = Answer(BODY, headers=TAGGED, ranges=True)
    with pytest.raises(ChecksumError):
        fetch(server, tmp_path / "f.bin", whole, keep=True)
    assert kept(tmp_path) == set()
    assert fetch(server, tmp_path / "f.bin", whole, keep=True).read_bytes() == BODY


def test_download_real_ctrl_c_keeps_the_part_and_frees_it(
    server: FileServer, tmp_path: Path
) -> None:
    server.answers["/f.bin"] = [
        Answer(BODY, stall=300_000, headers=TAGGED),
        Answer(BODY, headers=TAGGED, ranges=True),
    ]
    dest = tmp_path / "f.bin"
    code = (
        "import sys; from pathlib import Path; from anepy.system import download\n"
        f"download.download(sys.argv[1], Path(sys.argv[2]), {SHA256!r}, {len(BODY)}, keep=True)"
    )
    process = children.start("-c", code, server.url("/f.bin"), dest)
    try:
        part = tmp_path / "f.bin.part"
        assert wait_for(lambda: part.exists() and part.stat().st_size > 250_000)
        with pytest.raises(BusyError, match=rf"process {process.pid}"):
            fetch(server, dest, Answer(BODY), keep=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert kept(tmp_path) == {"f.bin.part", "f.bin.part.json"}
    whole = Answer(BODY, headers=TAGGED, ranges=True)
    assert fetch(server, dest, whole, keep=True).read_bytes() == BODY
    assert server.asked[-1].startswith("bytes=")


def test_download_of_a_killed_process_is_taken_over(server: FileServer, tmp_path: Path) -> None:
    server.answers["/f.bin"] = [Answer(BODY, stall=300_000, headers=TAGGED)]
    dest = tmp_path / "f.bin"
    code = (
        "import sys; from pathlib import Path; from anepy.system import download\n"
        f"download.download(sys.argv[1], Path(sys.argv[2]), {SHA256!r}, {len(BODY)}, keep=True)"
    )
    process = children.start("-c", code, server.url("/f.bin"), dest)
    part = tmp_path / "f.bin.part"
    assert wait_for(lambda: part.exists() and part.stat().st_size > 250_000)
    process.kill()
    process.communicate()
    assert "f.bin.part.owner" in kept(tmp_path)
    assert fetch(server, dest, Answer(BODY), keep=True).read_bytes() == BODY
    assert kept(tmp_path) == {"f.bin"}


# Where a server leads to


def test_download_headers_byte_by_byte_end_in_time(
    server: FileServer, tmp_path: Path, waits: list[float]
) -> None:
    began = time.monotonic()
    error = refused(server, tmp_path / "f.bin", Answer(BODY, header_drip=0.05), timeout=(0.5, 0.4))
    assert "stopped sending" in str(error) and time.monotonic() - began < 5


def test_download_redirects_are_followed(server: FileServer, tmp_path: Path) -> None:
    server.answers["/a"] = [Answer(status=302, headers={"Location": "/b/f.bin"})]
    server.answers["/b/f.bin"] = [Answer(BODY)]
    url, dest = server.url("/a"), tmp_path / "f.bin"
    download.download(url, dest, SHA256, len(BODY), timeout=QUICK)
    assert dest.read_bytes() == BODY and server.requests == ["/a", "/b/f.bin"]


def test_download_redirects_in_a_circle_end(server: FileServer, tmp_path: Path) -> None:
    error = refused(server, tmp_path / "f.bin", Answer(status=302, headers={"Location": "/f.bin"}))
    assert "sent on more than" in str(error) and len(server.requests) < 20


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/f.bin", "gopher://x/f"])
def test_download_redirect_to_another_scheme_is_refused(
    server: FileServer, tmp_path: Path, target: str
) -> None:
    error = refused(server, tmp_path / "f.bin", Answer(status=302, headers={"Location": target}))
    assert "is not safe" in str(error)


def test_download_redirect_from_https_to_http_is_refused(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure, certificate = make_secure(FileServer(), tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    server.answers["/f.bin"] = [Answer(BODY)]
    dest = tmp_path / "new" / "f.bin"
    with secure:
        secure.answers["/f.bin"] = [
            Answer(status=302, headers={"Location": server.url("/f.bin")}),
        ]
        url = secure.url("/f.bin").replace("http:", "https:")
        with pytest.raises(DownloadError, match=r"f\.bin.*is not safe"):
            download.download(url, dest, SHA256, len(BODY), timeout=QUICK)
    assert server.requests == [] and not dest.exists()


def test_download_web_page_without_its_type_is_named(server: FileServer, tmp_path: Path) -> None:
    server.answers["/f.bin"] = [Answer(b"\n<!DOCTYPE html><title>log in</title>")]
    with pytest.raises(DownloadError, match="web page instead"):
        download.download(server.url("/f.bin"), tmp_path / "f.bin", None, None, timeout=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_read_takes_no_more_than_it_was_told(server: FileServer) -> None:
    server.answers["/f"] = [Answer(b"0123456789")]
    assert download.read(server.url("/f"), 10, QUICK) == b"0123456789"
    with pytest.raises(DownloadError, match="longer than 9 bytes"):
        download.read(server.url("/f"), 9, QUICK)
