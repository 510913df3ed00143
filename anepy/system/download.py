"""Fetch and install files whose size and SHA-256 are known beforehand, or are asked of a server.

A file appears under its name only when all of it is there and its hash is right, if that is known;
there is no switch that skips the check. `requests` and `rich` are imported on use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

from ..errors import DownloadError, OfflineError
from .arriving import Arriving, check_space

if TYPE_CHECKING:
    import requests

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes received so far and the bytes there will be."""

_CHUNK_NBYTES = 1 << 18
_SLOWEST = 1024  # bytes/s over one read timeout; a slower server counts as silent
_LONGEST_WAIT = 8.0  # s between two attempts
_LONGEST_RETRY_AFTER = 30.0  # s, however long the server asks for
_MOST_REDIRECTS = 10
_PAGES = (b"<!doctype html", b"<html")
R = TypeVar("R")
_sleep = time.sleep
_clock = time.monotonic


class _TransientError(Exception):
    """A failure that another attempt may cure; `wait` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def cache_dir() -> Path:
    """Return the folder for everything anepy keeps: `ANEPY_CACHE`, else the user's cache folder.

    The folder is not created.
    """
    override = os.environ.get("ANEPY_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("anepy")


def offline() -> bool:
    """Return whether `ANEPY_OFFLINE` forbids downloads."""
    return os.environ.get("ANEPY_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def file_url(base_url: str, name: str) -> str:
    """Return the address of a file, with `ANEPY_MIRROR` in place of `base_url` when it is set."""
    return f"{(os.environ.get('ANEPY_MIRROR') or base_url).rstrip('/')}/{name}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            digest.update(chunk)
    return digest.hexdigest()


def download(
    url: str,
    dest: Path,
    sha256: str | None,
    size: int | None,
    *,
    progress: ProgressCallback | None = None,
    timeout: tuple[float, float] = (10.0, 30.0),
    retries: int = 3,
    keep: bool = False,
) -> Path:
    """Download a file, check it and put it at `dest`, replacing what is there.

    A connection that breaks is taken up where it broke, as long as the server says that the file is
    the same; else it begins anew.

    Args:
        url: http or https address; proxies and certificates come from the environment.
        dest: path of the result; its folder is created.
        sha256: expected SHA-256, hexadecimal; None if nobody knows it.
        size: expected bytes; None takes what the server announces.
        progress: told the bytes received and the total.
        timeout: seconds for connecting, and for the longest silence of the server.
        retries: further attempts after a lost connection or status 408, 429 or 5xx.
        keep: keep what has arrived of a broken or interrupted transfer in `NAME.part`, for the
            next call. Without it, nothing is left behind.

    Returns:
        `dest`.

    Raises:
        OfflineError: `ANEPY_OFFLINE` is set.
        BusyError: another process brings the same file, and `keep` is set.
        ChecksumError: the file has the right size and other contents.
        DownloadError: anything else: network, server, wrong size, disk.
    """
    _check_online(url)
    with Arriving(dest, keep, url) as arriving:
        if size is not None:
            check_space(dest, size - min(size, arriving.done))
        try:
            _with_retries(retries, lambda: _receive(url, arriving, sha256, size, progress, timeout))
        except DownloadError as error:
            if keep and arriving.done:
                hint = f"{arriving.done:,} bytes are kept, the same command goes on from there"
                raise type(error)(f"{error}; {hint}") from error.__cause__
            raise
    return dest


def read(url: str, most: int, timeout: tuple[float, float] = (10.0, 30.0)) -> bytes:
    """Return what an address answers, of at most `most` bytes.

    Raises:
        DownloadError, OfflineError: as `download`; also if the answer is longer.
    """
    _check_online(url)
    return _with_retries(3, lambda: _read(url, most, timeout))


def _check_online(url: str) -> None:
    if offline():
        raise OfflineError(
            f"not downloading {shown(url)}: ANEPY_OFFLINE forbids it; unset it, or bring the file "
            "from another machine"
        )


def _with_retries(retries: int, attempt: Callable[[], R]) -> R:
    for number in range(retries + 1):
        try:
            return attempt()
        except _TransientError as failure:
            if number == retries:
                tries = f" ({number + 1} attempts)" if number else ""
                raise DownloadError(f"{failure}{tries}") from failure.__cause__
            wait = failure.wait if failure.wait is not None else 0.5 * 2**number
            _sleep(min(wait, _LONGEST_WAIT if failure.wait is None else _LONGEST_RETRY_AFTER))
    raise AssertionError("unreachable")


def install_file(src: Path, dest: Path, sha256: str, size: int) -> Path:
    """Copy a local file to `dest` with the checks of `download`.

    Args:
        src: the file.
        dest: path of the result; its folder is created.
        sha256: expected SHA-256, hexadecimal.
        size: expected bytes.

    Returns:
        `dest`.

    Raises:
        ChecksumError: the file has the right size and other contents.
        DownloadError: the file is missing, has another size, or `dest` cannot be written.
    """
    try:
        with open(src, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DownloadError(
                    f"{src} has {found:,} bytes instead of {size:,}; it is incomplete or another "
                    "version, get it again"
                )
            check_space(dest, size)
            with Arriving(dest, False, "") as arriving:
                arriving.begin("")
                while chunk := file.read(_CHUNK_NBYTES):
                    arriving.write(chunk)
                if arriving.done != size:  # another process is writing it
                    raise DownloadError(
                        f"only {arriving.done:,} of {size:,} bytes of {src} were read; try again"
                    )
                arriving.finish(sha256, str(src))
    except OSError as error:
        raise DownloadError(f"cannot read {src}: {error.strerror}; check the path") from error
    return dest


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback | None]:
    """Yield a progress callback that draws a bar on stderr, or None if that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from .screen import make_console

    label_column = TextColumn("{task.description}", markup=False)
    columns = (label_column, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=make_console(sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ------------------------------------------------------------------------------------- the network


def _receive(
    url: str,
    arriving: Arriving,
    sha256: str | None,
    size: int | None,
    progress: ProgressCallback | None,
    timeout: tuple[float, float],
) -> None:
    """Make one attempt to bring what is missing of a file, and finish it."""
    where = shown(url)
    if size is not None and arriving.done > size:
        arriving.discard()
    if size is None or arriving.done < size or not arriving.done:
        # Without either, nobody could tell whether the rest belongs to the beginning.
        behind = arriving.done if arriving.validator or sha256 else 0
        headers = {"Range": f"bytes={behind}-"} if behind else {}
        if behind and arriving.validator:
            headers["If-Range"] = arriving.validator
        with _answer(url, headers, timeout) as response:
            if response.status_code == 416:  # the server has another file, and a shorter one
                arriving.discard()
                raise _TransientError(f"the file {where} changed on the server; try again")
            _check_response(response, where)
            total = _total(response, where, behind)
            if size is not None and total is not None and total != size:
                arriving.discard()
                raise DownloadError(
                    f"the server offers {total:,} bytes for {where} instead of {size:,}; "
                    "it is another version or a mirror changed it"
                )
            _take_body(
                response, arriving, total if size is None else size, where, progress, timeout
            )
    arriving.finish(sha256, where)


def _take_body(
    response: requests.Response,
    arriving: Arriving,
    size: int | None,
    where: str,
    progress: ProgressCallback | None,
    timeout: tuple[float, float],
) -> None:
    """Write what the server sends behind what has arrived, or anew if it begins anew."""
    if size is None:
        raise DownloadError(f"the server does not say how long {where} is; nothing could check it")
    validator = _validator(response)
    same = not validator or not arriving.validator or validator == arriving.validator
    if response.status_code == 206 and same:
        arriving.proceed()
    elif response.status_code == 206:
        arriving.discard()
        raise _TransientError(f"the file {where} changed on the server; try again")
    else:
        check_space(arriving.dest, size)
        arriving.begin(validator)
    if progress is not None:
        progress(arriving.done, size)
    for chunk in _chunks(response, where, timeout[1]):
        if arriving.done == 0 and chunk.lstrip()[:14].lower().startswith(_PAGES):
            raise _page(where)
        if arriving.done + len(chunk) > size:
            arriving.discard()
            raise DownloadError(
                f"{where} is longer than {size:,} bytes; it is another version or a mirror "
                "changed it"
            )
        arriving.write(chunk)
        if progress is not None:
            progress(arriving.done, size)
    if arriving.done < size:
        raise _TransientError(
            f"only {arriving.done:,} of {size:,} bytes of {where} arrived; try again"
        )


def _read(url: str, most: int, timeout: tuple[float, float]) -> bytes:
    where = shown(url)
    with _answer(url, {}, timeout) as response:
        _check_response(response, where)
        body = b""
        for chunk in _chunks(response, where, timeout[1]):
            body += chunk
            if len(body) > most:
                raise DownloadError(
                    f"{where} is longer than {most:,} bytes, which it should not be"
                )
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) != len(body):
            raise _TransientError(
                f"the connection broke before all of {where} was there; try again"
            )
        return body


def _total(response: requests.Response, where: str, behind: int) -> int | None:
    """Return the bytes of the whole file, as the server announces them; None if it does not."""
    if response.status_code == 206:
        parts = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if parts is None or int(parts[1]) != behind:
            raise DownloadError(f"the server sent another part of {where} than was asked for")
        return int(parts[2])
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and "Content-Encoding" not in response.headers:
        return int(length)
    return None


def _validator(response: requests.Response) -> str:
    """Return what tells this version of the file from others; weak tags do not."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


@contextlib.contextmanager
def _answer(
    url: str, headers: dict[str, str], timeout: tuple[float, float]
) -> Iterator[requests.Response]:
    """Yield the answer behind all redirects; say what goes wrong with it in a sentence."""
    with _in_words(url, timeout):
        here = url
        for _ in range(_MOST_REDIRECTS):
            with contextlib.closing(_get(here, headers, timeout)) as response:
                target = response.headers.get("Location", "")
                if response.status_code not in (301, 302, 303, 307, 308) or not target:
                    yield response
                    return
            following = urljoin(here, target)
            if urlsplit(following).scheme not in {"https", urlsplit(here).scheme}:
                raise DownloadError(
                    f"{_host(here)} sends {shown(url)} on to {shown(following)}, which is not "
                    "safe; nothing was downloaded"
                )
            here = following
        raise DownloadError(f"{shown(url)} is sent on more than {_MOST_REDIRECTS} times")


def _get(url: str, headers: dict[str, str], timeout: tuple[float, float]) -> requests.Response:
    """Return one answer, its headers complete within the time for connecting and one silence.

    The timeout of a socket restarts with every byte, so another thread waits for the headers.
    """
    import requests

    # Compressed transfer would make the announced length useless for the check.
    headers = {"Accept-Encoding": "identity", "User-Agent": "anepy", **headers}
    found: list[requests.Response | BaseException] = []

    def ask() -> None:
        try:
            found.append(
                requests.get(
                    url, stream=True, timeout=timeout, headers=headers, allow_redirects=False
                )
            )
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="anepy-download", daemon=True)
    thread.start()
    thread.join(sum(timeout))
    if not found:
        raise _stalled(shown(url), sum(timeout))
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@contextlib.contextmanager
def _in_words(url: str, timeout: tuple[float, float]) -> Iterator[None]:
    """Turn every exception of the network libraries into a sentence."""
    import requests
    import urllib3.exceptions as urllib3_errors

    where = shown(url)
    try:
        yield
    # The order matters: SSL, proxy and connect-timeout errors are connection errors too.
    except (requests.exceptions.SSLError, urllib3_errors.SSLError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise DownloadError(
                f"the certificate of {_host(url)} is not trusted, {where} was not downloaded; "
                "behind a company's proxy set REQUESTS_CA_BUNDLE to its certificate file"
            ) from error
        raise DownloadError(
            f"no secure connection to {_host(url)} for {where}: {_reason(error)}; "
            "check the address and the proxy settings"
        ) from error
    except (requests.exceptions.ProxyError, urllib3_errors.ProxyError) as error:
        raise DownloadError(
            f"the proxy did not let {where} through: {_reason(error)}; "
            "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        ) from error
    except requests.exceptions.ConnectTimeout as error:
        raise _TransientError(
            f"{_host(url)} did not answer within {timeout[0]:g} s, {where} was not downloaded; "
            "check the network, or set ANEPY_MIRROR"
        ) from error
    except (requests.exceptions.Timeout, urllib3_errors.TimeoutError) as error:
        raise _stalled(where, timeout[1]) from error
    except (
        requests.exceptions.ChunkedEncodingError,
        urllib3_errors.ProtocolError,
    ) as error:
        raise _TransientError(
            f"the connection broke before all of {where} was there: {_reason(error)}; try again"
        ) from error
    except requests.exceptions.ConnectionError as error:
        raise _TransientError(
            f"cannot connect to {_host(url)} for {where}: {_reason(error)}; "
            "check the network, or set ANEPY_MIRROR"
        ) from error
    except (requests.exceptions.RequestException, urllib3_errors.HTTPError) as error:
        raise DownloadError(f"cannot download {where}: {_reason(error)}") from error


def _check_response(response: requests.Response, where: str) -> None:
    """Refuse an answer that cannot be the file, before a byte of it is stored."""
    code = response.status_code
    status = f"{code} {response.reason or ''}".strip()
    if code in (408, 429) or code >= 500:
        wait = response.headers.get("Retry-After", "")
        raise _TransientError(
            f"the server answered {status} for {where}; try again later, or set ANEPY_MIRROR",
            float(wait) if wait.isdigit() else None,
        )
    if code == 407:
        raise DownloadError(
            f"the proxy wants a name and password ({status}) for {where}; put them into HTTPS_PROXY"
        )
    if code in (401, 403):
        raise DownloadError(
            f"the server answered {status} for {where}; it asks for permission: check the name, or "
            "bring the file by hand"
        )
    if code not in (200, 206):
        raise DownloadError(
            f"the server answered {status} for {where}; check the address, or ANEPY_MIRROR if set"
        )
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise _page(where)


def _page(where: str) -> DownloadError:
    return DownloadError(
        f"got a web page instead of the file {where}, probably from a login page or a "
        "firewall; open the address in a browser"
    )


def _chunks(response: requests.Response, where: str, silence: float) -> Iterator[bytes]:
    """Yield the body as it arrives; give up when it only trickles.

    The timeout of a socket restarts with every byte, so the rate over `silence` seconds counts too.
    """
    raw = response.raw
    read = getattr(raw, "read1", raw.read)  # read() of urllib3 1 waits for the full amount
    window_start, window_nbytes = _clock(), 0
    while chunk := read(_CHUNK_NBYTES, decode_content=True):
        window_nbytes += len(chunk)
        now = _clock()
        if now - window_start >= silence:
            if window_nbytes < _SLOWEST * silence:
                raise _stalled(where, silence)
            window_start, window_nbytes = now, 0
        yield chunk


def _stalled(where: str, silence: float) -> _TransientError:
    return _TransientError(
        f"the server stopped sending {where} for {silence:g} s; "
        "check the network, or set ANEPY_MIRROR"
    )


def shown(url: str) -> str:
    """Return the address without a name and password it may carry."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _reason(error: BaseException) -> str:
    """Return the innermost explanation of an error of requests or urllib3, on one line."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "original_error", None) or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((a for a in error.args if isinstance(a, BaseException)), None)
        if inner is None:
            break
        error = inner
    text = str(getattr(error, "strerror", None) or error)
    # urllib3 puts the repr of its connection object in front.
    return " ".join(text.rpartition(">: ")[2].split()) or type(error).__name__
