"""Fetch and install files whose size and SHA-256 are known beforehand.

Serves the native library. A file appears under its name only when all of
it is there and its hash is right; a failed or interrupted transfer leaves nothing behind. There is
no resume and no switch that skips the check. `requests` and `rich` are imported on use.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from ..errors import ChecksumError, DownloadError, OfflineError
from . import files

if TYPE_CHECKING:
    import requests

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes received so far and the bytes there will be."""

_CHUNK_NBYTES = 1 << 18
_SLOWEST = 1024  # bytes/s over one read timeout; a slower server counts as silent
_LONGEST_WAIT = 8.0  # s between two attempts
_LONGEST_RETRY_AFTER = 30.0  # s, however long the server asks for
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
    sha256: str,
    size: int,
    *,
    progress: ProgressCallback | None = None,
    timeout: tuple[float, float] = (10.0, 30.0),
    retries: int = 3,
) -> Path:
    """Download a file, check it and put it at `dest`, replacing what is there.

    Args:
        url: http or https address; proxies and certificates come from the environment.
        dest: path of the result; its folder is created.
        sha256: expected SHA-256, hexadecimal.
        size: expected bytes.
        progress: told the bytes received and the total.
        timeout: seconds for connecting, and for the longest silence of the server.
        retries: further attempts after a lost connection or status 408, 429 or 5xx.

    Returns:
        `dest`.

    Raises:
        OfflineError: `ANEPY_OFFLINE` is set.
        ChecksumError: the file has the right size and other contents.
        DownloadError: anything else: network, server, wrong size, disk.
    """
    if offline():
        raise OfflineError(
            f"not downloading {_shown(url)}: ANEPY_OFFLINE forbids it; unset it, or bring the file "
            "from another machine"
        )
    _check_space(dest, size)
    for attempt in range(retries + 1):
        try:
            return _attempt(url, dest, sha256, size, progress, timeout)
        except _TransientError as failure:
            if attempt == retries:
                tries = f" ({attempt + 1} attempts)" if attempt else ""
                raise DownloadError(f"{failure}{tries}") from failure.__cause__
            wait = failure.wait if failure.wait is not None else 0.5 * 2**attempt
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
            _check_space(dest, size)
            chunks = iter(lambda: file.read(_CHUNK_NBYTES), b"")
            _write_checked(dest, chunks, sha256, size, str(src), None)
    except _TransientError as error:  # another process is writing it
        raise DownloadError(str(error)) from error
    except OSError as error:
        raise DownloadError(f"cannot read {src}: {error.strerror}; check the path") from error
    return dest


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback | None]:
    """Yield a progress callback that draws a bar on stderr, or None if that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ------------------------------------------------------------------------------------- the network


def _attempt(
    url: str,
    dest: Path,
    sha256: str,
    size: int,
    progress: ProgressCallback | None,
    timeout: tuple[float, float],
) -> Path:
    """Make one attempt; turn every exception of the network libraries into a sentence."""
    import requests
    import urllib3.exceptions as urllib3_errors

    where = _shown(url)
    # Compressed transfer would make the announced length useless for the check.
    headers = {"Accept-Encoding": "identity", "User-Agent": "anepy"}
    try:
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
            _check_response(response, where, size)
            chunks = _chunks(response, where, timeout[1])
            _write_checked(dest, chunks, sha256, size, where, progress)
            return dest
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


def _check_response(response: requests.Response, where: str, size: int) -> None:
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
    if code != 200:
        raise DownloadError(
            f"the server answered {status} for {where}; check the address, or ANEPY_MIRROR if set"
        )
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"got a web page instead of the file {where}, probably from a login page or a "
            "firewall; open the address in a browser"
        )
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) != size and "Content-Encoding" not in response.headers:
        raise DownloadError(
            f"the server offers {int(length):,} bytes for {where} instead of {size:,}; "
            "it is another version or a mirror changed it"
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


def _shown(url: str) -> str:
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


# ---------------------------------------------------------------------------------------- the disk


def _write_checked(
    dest: Path,
    chunks: Iterable[bytes],
    sha256: str,
    size: int,
    where: str,
    progress: ProgressCallback | None,
) -> None:
    """Write chunks to `dest`; nothing changes there unless size and hash are right."""
    digest = hashlib.sha256()
    done = 0
    with _replacing(dest) as file:
        if progress is not None:
            progress(0, size)
        for chunk in chunks:
            done += len(chunk)
            if done > size:
                raise DownloadError(
                    f"{where} is longer than {size:,} bytes; it is another version or a mirror "
                    "changed it"
                )
            digest.update(chunk)
            _write(file, chunk, dest)
            if progress is not None:
                progress(done, size)
        if done < size:
            raise _TransientError(f"only {done:,} of {size:,} bytes of {where} arrived; try again")
        found = digest.hexdigest()
        if found != sha256.lower():
            raise ChecksumError(
                f"{where} has SHA-256 {found} instead of {sha256.lower()}; not installed: it is "
                "another version, or something between the server and here changed it"
            )


@contextlib.contextmanager
def _replacing(dest: Path) -> Iterator[BinaryIO]:
    """Like `files.replacing`, with a missing folder made and failures named for a download.

    Errors of the block itself, which may come from the network, pass unchanged.
    """
    with contextlib.ExitStack() as stack:
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(files.replacing(dest))
        except OSError as error:
            raise _unwritable(dest, error) from error
        yield file
        try:
            stack.close()
        except OSError as error:
            raise _unwritable(dest, error) from error


def _write(file: BinaryIO, chunk: bytes, dest: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise _unwritable(dest, error) from error


def _unwritable(dest: Path, error: OSError) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"the disk of {dest} is full; free some space, or choose another")
    reason = error.strerror
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = f"{error.filename} is not a folder"
    return DownloadError(f"cannot write {dest}: {reason}; choose another folder")


def _check_space(dest: Path, size: int) -> None:
    """Refuse a transfer that cannot fit, before it starts."""
    folder = dest.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # the write itself will tell
    if free < size:
        raise DownloadError(
            f"{dest} needs {size:,} bytes and its disk has {free:,} left; "
            "free some space, or choose another"
        )
