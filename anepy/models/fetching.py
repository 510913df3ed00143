"""Bring public models, tokenizers and data to this machine, checked.

Where no hash is pinned, the one of the first download of an address is recorded in the cache and
every later download of it must have the same.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import ChecksumError, ConfigError, DownloadError
from ..system import arriving, download, files
from ..system.files import parsed
from ..system.owner import owned
from .catalog import HUB, ITEMS, Item, Source, find, hub_path

_PREFIX = "hf:"
_MOST_LISTING = 1 << 24
# What a model folder consists of, as huggingface.py and the tokenizers read it.
_WANTED = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.json|tokenizer\.model|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja"
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_MEMBERS = 100_000
_MOST_EXPANSION = 64  # an archive of tokens is a third of what is in it

Bar = Callable[[str], AbstractContextManager[download.ProgressCallback | None]]


@dataclass(frozen=True)
class Fetched:
    """A file that is here now.

    Attributes:
        path: where.
        size: its bytes.
        sha256: of its contents, or of the archive it came in.
        state: "downloaded", or "already there".
        checked: against what: "pinned" in anepy, told by the "server", "recorded" at an earlier
            download, or for the "first" time and recorded now.
    """

    path: Path
    size: int
    sha256: str
    state: str
    checked: str


def plan(name: str) -> Item:
    """Return what a name stands for; for `hf:OWNER/NAME` the Hugging Face Hub is asked.

    Raises:
        ConfigError: nothing has this name.
        DownloadError: the Hub cannot be asked, or holds no model of that name.
    """
    if name.startswith(_PREFIX):
        return _repository(name[len(_PREFIX) :])
    item = find(name)
    if item is None:
        known = ", ".join(item.name for item in ITEMS)
        raise ConfigError(
            f"nothing is called {name!r}: choose one of {known}, or hf:OWNER/NAME for a model of "
            "the Hugging Face Hub"
        )
    return item


def fetch(item: Item, folder: Path, bar: Bar, force: bool = False) -> list[Fetched]:
    """Bring all files of something, those that are there and right left alone.

    Args:
        item: what to bring.
        folder: where to.
        bar: given a file's name, a context that yields what is told of its progress, or None.
        force: replace files of other contents.

    Raises:
        ConfigError: a file is there that has other contents.
        BusyError, ChecksumError, DownloadError, OfflineError: a file cannot be had.
    """
    target = folder / item.folder
    return [_bring(source, target, bar, force) for source in item.files]


def _bring(source: Source, folder: Path, bar: Bar, force: bool) -> Fetched:
    dest = folder / source.name
    url = download.file_url(source.base, source.path)
    recorded = _records().get(url, {})
    if os.path.lexists(dest):
        found = _there(dest, source, recorded)
        if found is not None:
            return found
        if not force:
            raise ConfigError(
                f"{dest} is there and is not what {download.shown(url)} holds: move it away, fetch "
                "into another folder, or add --force to replace it"
            )
    sha256 = source.sha256 or recorded.get("sha256")
    arrived = dest if not source.member else dest.with_name(f"{dest.name}.tar.gz")
    with bar(source.name) as progress:
        try:
            download.download(url, arrived, sha256, source.size, progress=progress, keep=True)
        except ChecksumError as error:
            if source.sha256 is not None:
                raise
            raise ChecksumError(
                f"{error}; this address was first fetched on {recorded['date']}: if the change is "
                f"meant, remove its entry from {_records_path()}"
            ) from None
    digest = download.file_sha256(arrived)
    size = arrived.stat().st_size
    if source.member:
        try:
            _unpack(arrived, source, dest)
        finally:
            arrived.unlink()
    if source.sha256 is None:
        _record(url, digest, size, dest if source.member else None)
    checked = _checked(source) if source.sha256 else "recorded" if recorded else "first"
    return Fetched(dest, dest.stat().st_size, digest, "downloaded", checked)


def _checked(source: Source) -> str:
    return "server" if source.told else "pinned"


def _there(dest: Path, source: Source, recorded: Mapping[str, Any]) -> Fetched | None:
    """Return what is said of a file that is there already and right."""
    if not dest.is_file():
        return None
    size = dest.stat().st_size
    whole = source.member_size if source.member else source.size
    if whole is not None and size != whole:
        return None
    expected = source.sha256 if not source.member else None
    expected = expected or recorded.get("unpacked" if source.member else "sha256")
    if expected is None or download.file_sha256(dest) != expected:
        return None
    checked = _checked(source) if source.sha256 else "recorded"
    return Fetched(dest, size, source.sha256 or recorded["sha256"], "already there", checked)


# --------------------------------------------------------------------------------- the first time


def _records_path() -> Path:
    return download.cache_dir() / "fetched.json"


def _records() -> dict[str, dict[str, Any]]:
    """Return what was recorded of addresses whose hash is not pinned."""
    path = _records_path()
    try:
        records = parsed(path.read_bytes())
        if all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in records.values()):
            return dict(records)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ConfigError(
        f"{path}, which records the hashes of what was fetched, is damaged: remove it"
    )


def _record(url: str, sha256: str, size: int, unpacked: Path | None) -> None:
    path = _records_path()
    entry = {"sha256": sha256, "size": size, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    if unpacked is not None:
        entry["unpacked"] = download.file_sha256(unpacked)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with owned(f"{path}.owner", str(path)):
            records = _records()
            records[url] = records.get(url, {}) | entry
            with files.replacing(path) as file:
                file.write(files.dumps(records, indent=1).encode())
    except OSError as error:
        raise ConfigError(files.write_failure(path, "the record of hashes", error)) from error


# -------------------------------------------------------------------------------------- archives


def _unpack(archive: Path, source: Source, dest: Path) -> None:
    """Write the one wanted member of a tar archive, whatever else the archive holds.

    Raises:
        DownloadError: it is not there, no file, of another size, or the archive is damaged.
    """
    arriving.check_space(dest, source.member_size)
    wanted = f"{source.member} of {archive}"
    most = _MOST_EXPANSION * archive.stat().st_size + (1 << 20)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for number, member in enumerate(tar):
                if number >= _MOST_MEMBERS or member.offset_data + member.size > most:
                    raise DownloadError(f"{archive} expands to too much; it is another version")
                if member.name.rpartition("/")[2] != source.member or not member.isfile():
                    continue
                if member.size != source.member_size:
                    raise DownloadError(
                        f"{wanted} has {member.size:,} bytes instead of {source.member_size:,}; "
                        "it is another version"
                    )
                content = tar.extractfile(member)
                assert content is not None
                # Opened by our name for it: names in an archive lead nowhere.
                with files.replacing(dest) as file:
                    left = member.size
                    while chunk := content.read(min(left, 1 << 20)):
                        file.write(chunk)
                        left -= len(chunk)
                    if left:
                        raise DownloadError(f"{wanted} is cut off; fetch it again")
                return
    except (tarfile.TarError, zlib.error, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DownloadError(f"{archive} is damaged ({reason}); fetch it again") from error
    except OSError as error:
        raise arriving.unwritable(dest, error) from error
    raise DownloadError(f"{archive} holds no file {source.member}; it is another version")


# --------------------------------------------------------------------------- the Hugging Face Hub


def _repository(name: str) -> Item:
    """Ask the Hub which files a model folder has, and of which commit."""
    repository, _, revision = name.partition("@")
    revision = revision or "main"
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or not _plain(revision):
        raise ConfigError(
            f"hf:{name} names no model: write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"
        )
    url = download.file_url(HUB, f"api/models/{repository}/revision/{revision}?blobs=true")
    try:
        facts = parsed(download.read(url, _MOST_LISTING))
        commit = facts["sha"]
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(commit)
        listed = [
            Source(
                entry["rfilename"],
                HUB,
                hub_path(repository, commit, entry["rfilename"]),
                int(entry["size"]),
                (entry.get("lfs") or {}).get("sha256"),
                told=True,
            )
            for entry in facts["siblings"]
            if _WANTED.fullmatch(entry["rfilename"])
        ]
        licence = str((facts.get("cardData") or {}).get("license") or "not stated")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DownloadError(
            f"{download.shown(url)} did not answer as the Hugging Face Hub does; check "
            "ANEPY_MIRROR if set"
        ) from error
    names = {source.name for source in listed}
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise DownloadError(
            f"{repository} holds no model folder with config.json and safetensors; choose another"
        )
    folder = repository.rpartition("/")[2]
    return Item(name, "model", licence, f"{repository} at {commit[:12]}", tuple(listed), folder)


def _plain(revision: str) -> bool:
    return re.fullmatch(r"[\w.-]+", revision) is not None and ".." not in revision
