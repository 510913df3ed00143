"""Find the native library, or get it, and open it once per process.

The places, in this order: the file `ANEPY_LIB` names (nothing else is tried then), `anepy/_lib/`
in the package, the user's cache, a download of the release file pinned in `release.json`, the C
compiler. A library counts only if its SHA-256 is the pinned one, or the one recorded when it was
built from the very sources of this installation; anything else is never opened. System folders are
never searched. Importing this module touches no disk and no network.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import (
    AbiMismatchError,
    DownloadError,
    LibraryBuildError,
    LibraryNotFoundError,
)
from ..system import download
from . import trust
from .build import (
    compile_library,
    compiler_remedy,
    expected_duration,
    find_compiler,
    find_sources,
    platform_tag,
    source_hash,
    translated,
)
from .release import Release, ReleaseFile
from .release import read as read_release

__all__ = [
    "Candidate",
    "Layout",
    "build",
    "fetch",
    "library",
    "loaded",
    "notify",
    "platform_tag",
    "search",
    "source_hash",
    "verify",
]

Status = Literal["usable", "missing", "rejected", "refused", "possible", "impossible", "failed"]


@dataclass(frozen=True)
class Candidate:
    """One place the library may come from.

    Attributes:
        place: `ANEPY_LIB`, `package`, `cache`, `cached release`, `download` or `compile`.
        path: where the library is, or would be put.
        status: `usable` and `possible` places are tried in order, the others are passed over;
            what is `refused` is damaged or open to others, and a line says so.
        reason: why, in a few words.
    """

    place: str
    path: Path | None
    status: Status
    reason: str


@dataclass(frozen=True)
class Layout:
    """Everything the choice of a library depends on.

    Attributes:
        tag: platform, e.g. `linux-x86_64-glibc`.
        package: folder of the package.
        sources: folder with `libsrc/` and `build_lib.sh`, if this installation has them.
        source_hash: SHA-256 of those sources.
        cache: the user's cache folder.
        abi: number of the binary interface.
        release: the pinned release.
        override: value of `ANEPY_LIB`.
        compiler: what will be run as the C compiler.
        offline: downloads are forbidden.
    """

    tag: str
    package: Path
    sources: Path | None
    source_hash: str | None
    cache: Path
    abi: int
    release: Release
    override: str | None
    compiler: str | None
    offline: bool

    @classmethod
    def detect(cls) -> Layout:
        """Describe this process and installation.

        Raises:
            UnsupportedPlatformError: anepy does not run here.
        """
        from . import abi

        here = Path(__file__).resolve().parent
        package = here.parent
        sources = find_sources(package)
        return cls(
            tag=platform_tag(),
            package=package,
            sources=sources,
            source_hash=None if sources is None else source_hash(sources),
            cache=download.cache_dir(),
            abi=abi.ABI_VERSION,
            release=read_release(here),
            override=os.environ.get("ANEPY_LIB") or None,
            compiler=find_compiler(),
            offline=download.offline(),
        )

    @property
    def file_name(self) -> str:
        """Name of the library file on this platform."""
        return "libanepy.dylib" if self.tag.startswith("macos-") else "libanepy.so"

    @property
    def build_id(self) -> str | None:
        """What a library built from the sources answers to `anepy_build_id`, if there are any."""
        return None if self.source_hash is None else self.source_hash[:16]

    @property
    def packaged(self) -> Path:
        """The library inside the package, where a checkout builds it."""
        return self.package / "_lib" / self.tag / self.file_name

    @property
    def cached(self) -> Path:
        """The library compiled into the user's cache."""
        key = f"{self.release['version']}-abi{self.abi}-{self.build_id or 'nosource'}"
        return self.cache / "lib" / key / self.tag / self.file_name

    @property
    def cached_release(self) -> Path:
        """The downloaded library; apart from `cached` because another check applies to it."""
        return self.cached.parent / "release" / self.file_name

    @property
    def pinned(self) -> ReleaseFile | None:
        """The release file for this platform, if it was built from these very sources."""
        if self.source_hash not in (None, self.release["sources"]):
            return None
        return self.release["files"].get(self.tag)

    def exposure(self, path: Path) -> str | None:
        """Say why others could change a file of the cache; of the package that is not asked."""
        return trust.exposure(path, self.cache) if path.is_relative_to(self.cache) else None

    @property
    def build_target(self) -> Path:
        """Where compiling puts the library: the package in a writable checkout, else the cache."""
        checkout = self.sources is not None and self.sources == self.package.parent
        return self.packaged if checkout and _may_write(self.packaged.parent) else self.cached


def _to_stderr(line: str) -> None:
    print(f"anepy: {line}", file=sys.stderr, flush=True)


notify: Callable[[str], None] = _to_stderr
"""Told one line before each step a user would notice."""

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_loaded: Candidate | None = None


# ---------------------------------------------------------------------------------------- the doors


def library() -> ctypes.CDLL:
    """Return the native library; the first call finds, fetches or compiles it and opens it.

    Returns:
        The library with argument and result types set by `abi.bind`; the same object every time.

    Raises:
        LibraryNotFoundError: no place has it; the message lists them all and what to do.
        LibraryBuildError: it had to be compiled and that failed.
        AbiMismatchError: the library found belongs to another version.
        UnsupportedPlatformError: anepy does not run here.
    """
    global _library, _loaded
    if _library is None:
        with _lock:
            if _library is None:
                _library, _loaded = load(Layout.detect())
    return _library


def loaded() -> Candidate | None:
    """Return where the library of this process came from, or None before the first `library()`."""
    return _loaded


def search(layout: Layout | None = None) -> list[Candidate]:
    """List the places `library` would try, in order, without changing or opening anything."""
    layout = layout or Layout.detect()
    if layout.override is not None:
        path = Path(layout.override).expanduser().absolute()
        if path.is_file():
            return [Candidate("ANEPY_LIB", path, "usable", "chosen by ANEPY_LIB, not checked")]
        reason = "is a folder" if path.is_dir() else "does not exist"
        return [Candidate("ANEPY_LIB", path, "missing", reason)]
    places = [
        _built("package", layout.packaged, layout),
        _built("cache", layout.cached, layout),
    ]
    if layout.pinned is not None:
        places.append(_built("cached release", layout.cached_release, layout))
    return [*places, _download(layout), _compiling(layout)]


def build(
    out: Path | None = None,
    debug: bool = False,
    verbose: bool = False,
    *,
    layout: Layout | None = None,
) -> Path:
    """Compile the library, whether or not there is one; a library already open stays in use.

    Args:
        out: folder of the result; by default where `library` looks for it.
        debug: no optimization, assertions on.
        verbose: let the compile commands and warnings through to stderr.

    Returns:
        Path of the library.

    Raises:
        LibraryBuildError: no sources, no compiler, no writable folder, or the compiler failed.
    """
    layout = layout or Layout.detect()
    candidate = _compiling(layout)
    if candidate.status != "possible":
        raise LibraryBuildError(f"cannot compile the native library: {candidate.reason}")
    assert layout.sources is not None
    if out is None:
        target, remedy = layout.build_target, "set ANEPY_CACHE to a writable folder"
    else:
        target, remedy = out.absolute() / layout.file_name, "choose another folder"
    _compile(layout, target, remedy, debug=debug, verbose=verbose)
    return target


def fetch(from_file: Path | None = None, *, layout: Layout | None = None) -> Path:
    """Install the release file of this platform in the cache, from the network or a local file.

    As long as no release is pinned, a local file counts if it was built from the same sources, for
    example by `anepy lib build` on another machine.

    Args:
        from_file: the file to install instead of downloading.

    Returns:
        Path of the installed library.

    Raises:
        DownloadError: nothing to download, or the transfer or a check failed.
    """
    layout = layout or Layout.detect()
    pinned, version = layout.pinned, layout.release["version"]
    if exposure := layout.exposure(layout.cached_release):
        raise DownloadError(f"{layout.cached_release} {exposure}")
    if pinned is not None:
        path = _fetch_pinned(layout, pinned, from_file)
        # The user has just asked for this one; a locally compiled one would come first.
        trust.forget(layout.cached)
    elif from_file is None:
        raise DownloadError(
            f"no library for anepy {version} on {layout.tag} is published; compile it with "
            "`anepy lib build`, or install one from another machine with `anepy lib fetch --from`"
        )
    else:
        try:
            content = from_file.read_bytes()
        except OSError as error:
            raise DownloadError(f"cannot read {from_file}: {error.strerror}") from error
        if layout.build_id is None or layout.build_id.encode() not in content:
            raise DownloadError(
                f"{from_file} was not built from the sources of this anepy {version}; build it "
                "with the same version, or set ANEPY_LIB to use it nevertheless"
            )
        sha256 = hashlib.sha256(content).hexdigest()
        if trust.recorded(from_file) not in (None, sha256):
            raise DownloadError(f"{from_file} does not have the SHA-256 recorded beside it")
        path = layout.cached
        try:
            trust.make_private(path.parent)
            trust.record(path, sha256)
        except OSError as error:
            raise DownloadError(f"cannot write {path}: {error.strerror}") from error
        download.install_file(from_file, path, sha256, len(content)).chmod(0o755)
    first = search(layout)[0]
    if first.status == "usable" and first.path != path:
        notify(f"{first.path} comes before {path}; remove it to use the new one")
    return path


def verify(path: Path | None = None, *, layout: Layout | None = None) -> dict[str, object]:
    """Check a library file: hash, sources, binary interface.

    Args:
        path: the file; by default the first one `library` would use.

    Returns:
        `ok` and `reason`, then `path`, `size` (bytes), `sha256`, `build_id`, `expected_build_id`,
        `recorded_sha256` (from beside the file) and `pinned_sha256`, None where unknown. A file
        whose SHA-256 is neither is not opened, and not ok.
    """
    layout = layout or Layout.detect()
    if path is None:
        path = next((c.path for c in search(layout) if c.status == "usable"), None)
    pinned = None if layout.pinned is None else layout.pinned["sha256"]
    result: dict[str, object] = {
        "ok": False,
        "reason": "there is no library yet",
        "path": None if path is None else str(path),
        "size": None,
        "sha256": None,
        "build_id": None,
        "expected_build_id": layout.build_id,
        "recorded_sha256": None if path is None else trust.recorded(path),
        "pinned_sha256": pinned,
    }
    if path is None:
        return result
    try:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        result.update(size=len(content), sha256=sha256)
        status, result["reason"] = _judge(path, content, sha256, layout)
        if status != "usable":
            return result
        result["build_id"] = _open(path.absolute()).anepy_build_id().decode("ascii", "replace")
    except OSError as error:
        return result | {"reason": error.strerror or str(error)}
    except AbiMismatchError as error:
        return result | {"reason": str(error)}
    return result | {"ok": True}


# --------------------------------------------------------------------------------------- the places


def _built(place: str, path: Path, layout: Layout) -> Candidate:
    """Judge a file, without opening it as a library.

    Opening a stale library to ask it would make the system hand out the same mapping again when a
    new one is opened under the same name.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Candidate(place, path, "missing", "does not exist")
    except OSError as error:
        return Candidate(place, path, "rejected", f"cannot be read: {error.strerror}")
    if exposure := layout.exposure(path):
        return Candidate(place, path, "refused", exposure)
    sha256 = hashlib.sha256(content).hexdigest()
    return Candidate(place, path, *_judge(path, content, sha256, layout))


def _judge(path: Path, content: bytes, sha256: str, layout: Layout) -> tuple[Status, str]:
    """Hold a file to the SHA-256 that is pinned, or recorded beside it and of these sources."""
    pinned = None if layout.pinned is None else layout.pinned["sha256"]
    recorded = trust.recorded(path)
    if sha256 == pinned:
        return "usable", "has the pinned SHA-256"
    ours = layout.build_id is None or layout.build_id.encode() in content
    if recorded is None and pinned is None:
        if not ours:
            return "rejected", "was built from other sources"
        return "refused", "is not used: its SHA-256 is recorded nowhere (anepy lib build)"
    if sha256 != recorded:
        which = "pinned" if recorded is None else "recorded"
        return "refused", f"is damaged: it does not have the {which} SHA-256"
    if not ours:
        return "rejected", "was built from other sources"
    if layout.build_id is None:
        return "usable", "no sources to compare with"
    debug = f"{layout.build_id}-debug".encode() in content
    return "usable", f"{'debug build of' if debug else 'built from'} these sources"


def _download(layout: Layout) -> Candidate:
    place, path, pinned = "download", layout.cached_release, layout.pinned
    if pinned is None:
        version = layout.release["version"]
        reason = f"nothing is published for these sources of anepy {version} on {layout.tag}"
        return Candidate(place, None, "impossible", reason)
    if layout.offline:
        return Candidate(place, path, "impossible", "ANEPY_OFFLINE forbids it")
    if obstacle := layout.exposure(path) or trust.forbidden(path):
        return Candidate(place, path, "impossible", obstacle)
    url = download.file_url(layout.release["base_url"], pinned["name"])
    return Candidate(place, path, "possible", f"from {url}")


def _compiling(layout: Layout) -> Candidate:
    reason = None
    if layout.sources is None:
        reason = "this installation carries no C sources"
    elif layout.compiler is None:
        chosen = os.environ.get("CC")
        tried = "no C compiler (tried cc, gcc, clang, zig)"
        reason = f"CC={chosen} was not found" if chosen else tried
    elif shutil.which("bash") is None:
        reason = "bash is missing"
    elif obstacle := layout.exposure(layout.build_target) or trust.forbidden(layout.build_target):
        reason = f"{layout.build_target} {obstacle}"
    if reason is not None:
        return Candidate("compile", None, "impossible", reason)
    how = f"with {'CC=' if os.environ.get('CC') else ''}{layout.compiler}"
    return Candidate("compile", layout.build_target, "possible", how)


def load(layout: Layout) -> tuple[ctypes.CDLL, Candidate]:
    """Go through the places of `search` and open the first library that works.

    Returns:
        The library, and the place it came from.

    Raises:
        As `library`.
    """
    if translated():
        notify(
            "this is an Intel Python under Rosetta; the Neural Engine needs a native arm64 Python"
        )
    tried: list[Candidate] = []
    for candidate in search(layout):
        if candidate.status not in ("usable", "possible") or candidate.path is None:
            if candidate.status == "refused":
                notify(f"{candidate.path} {candidate.reason}")
            tried.append(candidate)
            continue
        try:
            if candidate.place == "ANEPY_LIB":
                notify(f"using {candidate.path}, which ANEPY_LIB names; it is not checked")
            elif candidate.place == "download" and layout.pinned is not None:
                _fetch_pinned(layout, layout.pinned, None)
            elif candidate.place == "compile" and layout.sources is not None:
                stale = any(c.place == "package" and c.status == "rejected" for c in tried)
                why = "its sources changed" if stale else "once"
                how_long = expected_duration(layout.sources)
                how = f"{candidate.reason} ({why}, about {how_long} s)"
                notify(f"compiling the native library {how} ...")
                _compile(layout, candidate.path, "set ANEPY_CACHE to a writable folder")
            return _open(candidate.path), candidate
        except DownloadError as error:
            notify(str(error))
            tried.append(replace(candidate, status="failed", reason=str(error)))
        except OSError as error:
            reason = f"cannot be opened: {error}"
            if forbidden := trust.forbidden(candidate.path):
                reason += f"; it {forbidden}"
            tried.append(replace(candidate, status="failed", reason=reason))
    raise _not_found(layout, tried)


def _not_found(layout: Layout, tried: list[Candidate]) -> LibraryNotFoundError:
    if layout.override is not None:
        last = tried[-1]
        return LibraryNotFoundError(
            f"the library ANEPY_LIB names, {last.path}, {last.reason}; correct or unset ANEPY_LIB"
        )
    # A reason about a download or a compiler stands alone; one about a file needs its path.
    places = "; ".join(
        f"{c.place}: {c.reason}"
        if c.place in ("download", "compile")
        else f"{c.place}: {c.path} {c.reason}"
        for c in tried
    )
    return LibraryNotFoundError(
        f"no native library for {layout.tag} ({places}); install a C compiler "
        f"({compiler_remedy()}), or install a library built elsewhere with `anepy lib fetch "
        "--from FILE`, or set ANEPY_LIB to one"
    )


def _open(path: Path) -> ctypes.CDLL:
    """Open a library under its full path and let `abi` check and type it.

    Raises:
        OSError: the system refuses it.
        AbiMismatchError: it is another version, or not anepy's.
    """
    from . import abi

    lib = ctypes.CDLL(str(path))
    try:
        try:
            lib.anepy_build_id.restype = ctypes.c_char_p
            lib.anepy_build_id.argtypes = []
        except AttributeError as error:
            raise AbiMismatchError(f"{path} is not a library of anepy; remove it") from error
        abi.bind(lib, str(path))
    except BaseException:
        _ctypes.dlclose(lib._handle)
        raise
    return lib


def _fetch_pinned(layout: Layout, pinned: ReleaseFile, from_file: Path | None) -> Path:
    dest, sha256, size = layout.cached_release, pinned["sha256"], pinned["size"]
    with contextlib.suppress(OSError):  # what writes the file says it better
        trust.make_private(dest.parent)
    if from_file is not None:
        download.install_file(from_file, dest, sha256, size)
    else:
        url = download.file_url(layout.release["base_url"], pinned["name"])
        if not download.offline():
            mirror = " (ANEPY_MIRROR)" if os.environ.get("ANEPY_MIRROR") else ""
            notify(f"downloading the native library, {size / 1e6:.1f} MB, from {url}{mirror}")
        with download.progress_bar(pinned["name"]) as progress:
            download.download(url, dest, sha256, size, progress=progress)
    dest.chmod(0o755)
    return dest


def _compile(
    layout: Layout, target: Path, remedy: str, *, debug: bool = False, verbose: bool = False
) -> None:
    assert layout.sources is not None
    if target.is_relative_to(layout.cache):
        with contextlib.suppress(OSError):  # what writes the file says it better
            trust.make_private(target.parent)
    compile_library(layout.sources, layout.tag, target, remedy, debug=debug, verbose=verbose)


def _may_write(folder: Path) -> bool:
    """Return whether the folder, or the nearest one above it that exists, lets us write."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)
