"""Checkpoints: complete or not there, checked before anything is touched. No native library."""

from __future__ import annotations

import os
import resource
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from cases import BAD_TARGETS

from anepy.errors import CheckpointError
from anepy.training import checkpoint
from anepy.training.checkpoint import Meta

CONFIG = {"dim": 4, "n_layers": 1}
SHAPES = {"tok_embeddings.weight": (10, 4), "norm.weight": (4,)}


def arenas(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return weights, adam_m, adam_v and gradients with random contents."""
    random = np.random.default_rng(seed)
    return {
        part: {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for part in ("weights", "adam_m", "adam_v", "gradients")
    }


def meta(accumulated: int = 0) -> Meta:
    return Meta(CONFIG, 7, 2, accumulated, {"seed": 0, "index": 7}, losses=[1.5], anepy="0.1.0")


def save(path: Path, source: dict[str, dict[str, np.ndarray]], accumulated: int = 0) -> int:
    arrays = dict(source["weights"])
    for prefix, part in (("m", "adam_m"), ("v", "adam_v"), ("grad", "gradients")):
        if prefix != "grad" or accumulated:
            arrays |= {f"{prefix}.{name}": value for name, value in source[part].items()}
    return checkpoint.save(path, arrays, meta(accumulated))


def load(path: Path, into: dict[str, dict[str, np.ndarray]], **config: Any) -> Meta:
    with checkpoint.Checkpoint(path) as file:
        file.load(CONFIG | config, {}, **into)
        return file.meta


def rewritten(path: Path, **changes: bytes | None) -> None:
    """Replace (or with None remove) members of a zip file; `__` in a name stands for a dot."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    for key, content in changes.items():
        name = key.replace("__", ".") + ".npy"
        if content is None:
            del members[name]
        else:
            members[name] = content
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def npy(array: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let every write beyond this size of a file fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("accumulated", [0, 3])
def test_load_after_save_restores_every_bit(tmp_path: Path, accumulated: int) -> None:
    path, source, into = tmp_path / "c.npz", arenas(0), arenas(1)
    nbytes = save(path, source, accumulated)
    assert nbytes == path.stat().st_size
    assert load(path, into) == meta(accumulated) == checkpoint.read_meta(path)
    for part in ("weights", "adam_m", "adam_v"):
        for name in SHAPES:
            assert into[part][name].tobytes() == source[part][name].tobytes()
    for name in SHAPES:
        expected = source["gradients"][name] if accumulated else np.zeros(SHAPES[name])
        np.testing.assert_array_equal(into["gradients"][name], expected)


def test_save_writes_what_plain_numpy_reads(tmp_path: Path) -> None:
    path, source = tmp_path / "c.npz", arenas(0)
    save(path, source)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"meta"} | {p + name for p in ("", "m.", "v.") for name in SHAPES}
        np.testing.assert_array_equal(file["m.norm.weight"], source["adam_m"]["norm.weight"])
        assert file["meta"].shape == () and '"step": 7' in str(file["meta"])


def test_save_keeps_umask_and_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "c.npz"
    link.symlink_to(tmp_path / "real" / "c.npz")
    old = os.umask(0o027)
    try:
        save(link, arenas(0))
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert (tmp_path / "real" / "c.npz").stat().st_mode & 0o777 == 0o640


# The last one fits everything but the directory at the end of the file.
@pytest.mark.parametrize("limit", [100, 600, 2000])
def test_save_on_full_disk_keeps_old_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "c.npz"
    nbytes = save(path, arenas(0))
    assert limit < nbytes
    before = path.read_bytes()
    with largest_file(limit), pytest.raises(CheckpointError, match="free some space") as caught:
        save(path, arenas(1))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_on_small_tmpfs_keeps_old_file(tmp_path: Path) -> None:
    with needs.small_disk(tmp_path, 64):
        path = tmp_path / "c.npz"
        save(path, arenas(0))
        before = path.read_bytes()
        (tmp_path / "filler").write_bytes(b"x" * (shutil.disk_usage(tmp_path).free - 4096))
        with pytest.raises(CheckpointError, match="free some space"):
            big = {"weight": np.zeros(20000, np.float32)}
            checkpoint.save(path, big, meta())
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c.npz", "filler"]


@pytest.mark.parametrize("bad, reason", BAD_TARGETS)
def test_save_to_bad_target_is_refused_in_one_line(tmp_path: Path, bad: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=reason) as caught:
        save(tmp_path / bad, arenas(0))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_load_of_bad_file_changes_nothing(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    save(good, arenas(0), accumulated=1)
    whole = good.read_bytes()
    position = whole.index(arenas(0)["adam_v"]["norm.weight"].tobytes())
    flipped = bytearray(whole)
    flipped[position] ^= 1
    matrix = np.zeros((10, 4))
    cases: list[tuple[str, Any]] = [
        ("no such checkpoint", None),
        ("truncated, damaged", b""),
        ("truncated, damaged", b"not a zip file at all"),
        ("truncated, damaged", whole[:-1]),
        ("truncated, damaged", whole[: len(whole) // 2]),
        ("truncated, damaged", bytes(flipped)),
        ("no 'meta'", {"meta": None}),
        ("not a text", {"meta": npy(np.zeros(3))}),
        ("not JSON", {"meta": npy(np.array("{"))}),
        ("names no format", {"meta": npy(np.array("[]"))}),
        ("checkpoint format 9", {"meta": npy(np.array('{"format": 9}'))}),
        ("'step' in 'meta'", {"meta": npy(np.array('{"format": 1, "step": -1}'))}),
        ("truncated, damaged", {"meta": npy(np.array([{}], dtype=object))}),
        ("'norm.weight' is missing", {"norm__weight": None}),
        ("'v.norm.weight' is missing", {"v__norm__weight": None}),
        ("'grad.norm.weight' is missing", {"grad__norm__weight": None}),
        (r"float32 \[5\]", {"norm__weight": npy(np.zeros(5, np.float32))}),
        (r"float64 \[4\]", {"norm__weight": npy(np.zeros(4))}),
        (
            "column order",
            {"tok_embeddings__weight": npy(np.asfortranarray(matrix.astype(np.float32)))},
        ),
        ("has 15 bytes", {"norm__weight": npy(np.zeros(4, np.float32))[:-1]}),
        ("truncated, damaged", {"norm__weight": b"no numpy header"}),
        ("truncated, damaged", {"norm__weight": npy(np.array([None] * 4, dtype=object))[:60]}),
    ]
    for number, (reason, content) in enumerate(cases):
        path, into = tmp_path / f"{number}.npz", arenas(1)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            shutil.copy(good, path)
            rewritten(path, **content)
        with pytest.raises(CheckpointError, match=reason) as caught:
            load(path, into)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        for part, values in arenas(1).items():
            for name, value in values.items():
                np.testing.assert_array_equal(into[part][name], value, err_msg=f"{reason}: {part}")


def test_damage_of_any_one_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    save(path, arenas(0))
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.Checkpoint(path)


def test_the_one_before_is_kept_and_offered(tmp_path: Path) -> None:
    path, before = tmp_path / "c.npz", tmp_path / "c-previous.npz"
    arrays = {"weight": np.zeros(4, np.float32)}
    for step in range(3):
        checkpoint.save(path, arrays, replace(meta(), step=step), keep=True)
    assert checkpoint.read_meta(before).step == 1
    assert sorted(tmp_path.iterdir()) == [before, path]
    for damage in (path.read_bytes()[:-1], None):
        path.write_bytes(damage) if damage else path.unlink()
        with pytest.raises(CheckpointError, match=r"of step 1, is whole: resume from .*previous"):
            checkpoint.Checkpoint(path)
    before.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="check the path"):
        checkpoint.Checkpoint(path)


def test_the_one_before_is_kept_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "c.npz"
    for step in range(3):
        checkpoint.save(path, {}, replace(meta(), step=step), keep=True)
    assert checkpoint.read_meta(tmp_path / "c-previous.npz").step == 1
    assert checkpoint.read_meta(path).step == 2


def test_all_is_read_from_the_file_that_was_opened(tmp_path: Path) -> None:
    path, into = tmp_path / "c.npz", arenas(2)
    save(path, arenas(0))
    with checkpoint.Checkpoint(path) as file:
        save(path, arenas(1))
        file.load(CONFIG, {}, **into)
    np.testing.assert_array_equal(
        into["weights"]["norm.weight"], arenas(0)["weights"]["norm.weight"]
    )


def test_load_of_another_model_names_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    save(path, arenas(0))
    with pytest.raises(CheckpointError, match="dim 4 instead of 8"):
        load(path, arenas(1), dim=8)


def test_load_of_a_checkpoint_older_than_a_field_takes_its_default(tmp_path: Path) -> None:
    path, into = tmp_path / "c.npz", arenas(1)
    save(path, arenas(0))
    load(path, into, head_dim=None, norm_eps=1e-5, rope_scaling=None, qk_norm=False)
    with pytest.raises(CheckpointError, match=r"norm_eps 1e-05 instead of 0\.001"):
        load(path, into, norm_eps=0.001)


def test_load_accepts_a_compressed_copy(tmp_path: Path) -> None:
    path, copy, into = tmp_path / "c.npz", tmp_path / "copy.npz", arenas(1)
    save(path, arenas(0))
    with np.load(path) as file:
        np.savez_compressed(copy, **dict(file))
    load(copy, into)
    np.testing.assert_array_equal(
        into["weights"]["norm.weight"], arenas(0)["weights"]["norm.weight"]
    )
