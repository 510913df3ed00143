"""The weight file: bytes as the format defines them, and a reader that survives any bytes.

`libsrc/programs/blob.c` is not exported, so it is compiled here by itself. The official writer and
reader are those of the public `coremltools` package (test extra; Linux and macOS wheels have them).
"""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from mil_text import blob, old_dialect, program
from needs import CHECKOUT

from anepy.hardware.packing import PACKED, pack
from anepy.hardware.program import FOLDER, Program

F16, F32, U8, I8 = 1, 2, 3, 4
NAMES = {"f2": "fp16", "f4": "float", "u1": "uint8", "i1": "int8"}
Array = np.ndarray[Any, Any]
DTYPES: dict[int, Any] = {F16: np.float16, F32: np.float32, U8: np.uint8, I8: np.int8}


class Blob(ctypes.Structure):
    """anepy_blob."""

    _fields_ = (("data", ctypes.c_void_p), ("n", ctypes.c_uint64), ("capacity", ctypes.c_uint64))

    def image(self) -> bytes:
        """Return the file image."""
        return ctypes.string_at(self.data, self.n) if self.data else b""


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the blob writer and reader alone."""
    compiler = needs.compiler()
    target = tmp_path_factory.mktemp("blob") / "libblob.so"
    sources = [CHECKOUT / "libsrc" / name for name in ("programs/blob.c", "runtime/status.c")]
    subprocess.run(
        [
            compiler,
            *("-std=c11", "-O1", "-g", "-fPIC", "-shared"),
            f"-I{CHECKOUT / 'libsrc'}",
            *("-o", str(target)),
            *map(str, sources),
        ],
        check=True,
    )
    lib = ctypes.CDLL(str(target))
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    lib.anepy_blob_begin.argtypes = (ctypes.POINTER(Blob),)
    lib.anepy_blob_reserve.argtypes = (ctypes.POINTER(Blob), u64)
    lib.anepy_blob_add.argtypes = (
        ctypes.POINTER(Blob),
        ctypes.c_int,
        pointer,
        u64,
        ctypes.POINTER(u64),
    )
    lib.anepy_blob_free.argtypes = (ctypes.POINTER(Blob),)
    lib.anepy_blob_free.restype = None
    lib.anepy_blob_read.argtypes = (
        pointer,
        u64,
        u64,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(pointer),
        ctypes.POINTER(u64),
    )
    return lib


def message(lib: ctypes.CDLL) -> str:
    """Return the sentence of the last failure."""
    text = ctypes.create_string_buffer(512)
    lib.anepy_last_error(text, ctypes.c_uint64(512))
    return text.value.decode()


def write(lib: ctypes.CDLL, *arrays: Array) -> tuple[bytes, list[int]]:
    """Write arrays as records; return the file and their offsets."""
    blob, offsets = Blob(), []
    assert lib.anepy_blob_begin(blob) == 0
    for array in arrays:
        kind = next(k for k, dtype in DTYPES.items() if array.dtype == dtype)
        offset = ctypes.c_uint64()
        assert lib.anepy_blob_add(blob, kind, array.ctypes.data, array.nbytes, offset) == 0
        offsets.append(offset.value)
    image = blob.image()
    lib.anepy_blob_free(blob)
    assert (blob.data, blob.n, blob.capacity) == (None, 0, 0)
    return image, offsets


def read(lib: ctypes.CDLL, image: bytes, offset: int) -> tuple[int, int, bytes]:
    """Read one record: type, where its data starts, data; ValueError with the sentence if not."""
    # A block of exactly this size, so that reading beyond it is noticed under a sanitizer.
    memory = (ctypes.c_char * max(1, len(image))).from_buffer_copy(image.ljust(1, b"\0"))
    kind, payload, n = ctypes.c_uint32(), ctypes.c_void_p(), ctypes.c_uint64()
    status = lib.anepy_blob_read(ctypes.addressof(memory), len(image), offset, kind, payload, n)
    if status != 0:
        raise ValueError(message(lib))
    start = (payload.value or 0) - ctypes.addressof(memory)
    assert 64 <= start <= start + n.value <= len(image)
    return kind.value, start, image[start : start + n.value]


# ------------------------------------------------------------------------------------- written


def test_blob_of_one_record_has_exactly_these_bytes(lib: ctypes.CDLL) -> None:
    image, offsets = write(lib, np.array([1.0, -2.0, 0.5], np.float16))
    expected = (
        bytes.fromhex("01000000 02000000")
        + bytes(56)
        + bytes.fromhex("efbeadde 01000000 0600000000000000 8000000000000000")
        + bytes(40)
        + bytes.fromhex("003c 00c0 0038")
    )
    assert image == expected
    assert offsets == [64]


def test_blob_of_several_records_aligns_each_and_counts_them(lib: ctypes.CDLL) -> None:
    arrays: list[Array] = [
        np.arange(33, dtype=np.float16),
        np.arange(-3, 4, dtype=np.int8),
        np.arange(5, dtype=np.float32),
        np.zeros(0, np.uint8),
        np.arange(64, dtype=np.uint8),
    ]
    image, offsets = write(lib, *arrays)
    assert struct.unpack_from("<II", image) == (5, 2)
    assert offsets == [64, 256, 384, 512, 576]  # 64 + 64 + 66 -> 256, and so on
    assert len(image) == 576 + 64 + 64  # nothing behind the last record
    used = bytearray(len(image))
    used[:8] = b"x" * 8
    for offset, array in zip(offsets, arrays, strict=True):
        kind, start, data = read(lib, image, offset)
        assert DTYPES[kind] == array.dtype and start == offset + 64
        assert data == array.tobytes()
        used[offset : offset + 24] = b"x" * 24
        used[start : start + len(data)] = b"x" * len(data)
    rest = [value for value, x in zip(image, used, strict=True) if not x]
    assert not any(rest), "padding and reserved bytes are zero"


def test_blob_reserved_record_is_zeros(lib: ctypes.CDLL) -> None:
    blob, offset = Blob(), ctypes.c_uint64()
    assert lib.anepy_blob_begin(blob) == 0
    assert lib.anepy_blob_add(blob, F16, None, 200, offset) == 0
    image = blob.image()
    lib.anepy_blob_free(blob)
    assert read(lib, image, 64) == (F16, 128, bytes(200))


def test_blob_reserved_room_is_not_exceeded(lib: ctypes.CDLL) -> None:
    blob, offset = Blob(), ctypes.c_uint64()
    assert lib.anepy_blob_reserve(blob, 10_000) == 0
    start = blob.data
    assert lib.anepy_blob_begin(blob) == 0
    assert lib.anepy_blob_add(blob, U8, None, 10_000 - 128, offset) == 0
    assert (blob.data, blob.n, blob.capacity) == (start, 10_000, 10_000)
    lib.anepy_blob_free(blob)


@pytest.mark.parametrize(
    ("kind", "nbytes"), [(F16, 3), (F32, 6), (0, 4), (5, 4), (F16, 1 << 41), (F16, (1 << 64) - 2)]
)
def test_blob_record_that_cannot_be_is_refused(lib: ctypes.CDLL, kind: int, nbytes: int) -> None:
    blob, offset = Blob(), ctypes.c_uint64()
    assert lib.anepy_blob_begin(blob) == 0
    before = blob.image()
    assert lib.anepy_blob_add(blob, kind, None, nbytes, offset) < 0
    assert "weight record" in message(lib)
    assert blob.image() == before
    lib.anepy_blob_free(blob)


def test_blob_record_without_a_header_is_refused(lib: ctypes.CDLL) -> None:
    assert lib.anepy_blob_add(Blob(), F16, None, 2, ctypes.c_uint64()) < 0


# ------------------------------------------------------------------------------------ official


@pytest.fixture(scope="module")
def official() -> Any:
    """Load the blob storage of coremltools, without the rest of that package (it loads torch)."""
    return needs.peer_part("coremltools", "libmilstoragepython")


CASES: dict[str, list[Array]] = {
    "one": [np.linspace(-2, 2, 768).astype(np.float16)],
    "odd sizes": [np.arange(n, dtype=np.float16) for n in (1, 31, 32, 33, 64, 95, 1000)],
    "fp32": [np.linspace(-1e30, 1e30, n).astype(np.float32) for n in (1, 16, 17)],
    "mixed": [
        np.arange(100, dtype=np.float16),
        np.arange(-100, 100, dtype=np.int8),
        np.arange(3, dtype=np.float32),
        np.arange(77, dtype=np.uint8),
        np.arange(2, dtype=np.float16),
    ],
}


def write_officially(official: Any, path: Path, arrays: list[Array]) -> list[int]:
    """Write a file with coremltools; it is complete once the writer is gone."""
    writer = official._BlobStorageWriter(str(path))
    offsets = []
    for array in arrays:
        raw = array.view(np.uint16) if array.dtype == np.float16 else array
        offsets.append(getattr(writer, f"write_{NAMES[array.dtype.str[1:]]}_data")(raw))
    return offsets


@pytest.mark.parametrize("case", CASES)
def test_blob_equals_the_official_writer_byte_for_byte(
    lib: ctypes.CDLL, official: Any, tmp_path: Path, case: str
) -> None:
    image, offsets = write(lib, *CASES[case])
    path = tmp_path / "weight.bin"
    assert write_officially(official, path, CASES[case]) == offsets
    assert image == path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_blob_is_read_by_the_official_reader(
    lib: ctypes.CDLL, official: Any, tmp_path: Path, case: str
) -> None:
    image, offsets = write(lib, *CASES[case])
    path = tmp_path / "weight.bin"
    path.write_bytes(image)
    reader = official._BlobStorageReader(str(path))
    for array, offset in zip(CASES[case], offsets, strict=True):
        name = f"read_{NAMES[array.dtype.str[1:]]}_data"
        back = np.asarray(getattr(reader, name)(offset))
        assert back.view(array.dtype).tobytes() == array.tobytes()


# --------------------------------------------------------------------------------------- hostile


def good(lib: ctypes.CDLL) -> bytearray:
    """Make a file with one record of 100 fp16 numbers at 64."""
    return bytearray(write(lib, np.arange(100, dtype=np.float16))[0])


def test_blob_reader_takes_data_that_lies_elsewhere(lib: ctypes.CDLL) -> None:
    image = good(lib) + bytes(56 + 64)
    struct.pack_into("<QQ", image, 64 + 8, 10, 384)
    image[384:394] = b"0123456789"
    assert read(lib, bytes(image), 64) == (F16, 384, b"0123456789")


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (4, "<I", "version"),
        (0, "<I", "no record"),
        (64, "<I", "sentinel"),
        (68, "<I", "type"),
    ],
)
def test_blob_reader_refuses_a_field_of_zeros(
    lib: ctypes.CDLL, at: int, value: str, why: str
) -> None:
    image = good(lib)
    struct.pack_into(value, image, at, 0)
    with pytest.raises(ValueError, match=why):
        read(lib, bytes(image), 64)


@pytest.mark.parametrize(
    ("size", "start", "why"),
    [
        (201, 128, "outside"),
        (200, 192, "outside"),
        ((1 << 64) - 1, 128, "outside"),
        ((1 << 64) - 64, 128, "outside"),
        (8, (1 << 64) - 64, "outside"),
        (0, 0, "outside"),
        (8, 130, "aligned"),
        (8, 64, "overlaps"),
    ],
)
def test_blob_reader_refuses_data_out_of_place(
    lib: ctypes.CDLL, size: int, start: int, why: str
) -> None:
    image = good(lib)
    struct.pack_into("<QQ", image, 72, size, start)
    with pytest.raises(ValueError, match=why):
        read(lib, bytes(image), 64)


@pytest.mark.parametrize(
    ("offset", "why"),
    [
        (0, "header"),
        (128, "sentinel"),
        (65, "multiples of 64"),
        (320, "beyond the end"),
        (384, "beyond the end"),
        ((1 << 64) - 64, "beyond the end"),
    ],
)
def test_blob_reader_refuses_an_offset_that_is_no_record(
    lib: ctypes.CDLL, offset: int, why: str
) -> None:
    image = bytes(good(lib))
    assert len(image) == 328
    with pytest.raises(ValueError, match=why):
        read(lib, image, offset)


def test_blob_reader_refuses_every_truncation(lib: ctypes.CDLL) -> None:
    image = bytes(good(lib))
    for n in range(len(image)):
        with pytest.raises(ValueError):
            read(lib, image[:n], 64)


def test_blob_reader_survives_random_damage(lib: ctypes.CDLL) -> None:
    """`read` asserts that whatever is accepted lies inside the file."""
    rng = random.Random(1)
    whole, offsets = write(lib, *CASES["mixed"])
    accepted = refused = 0
    for _ in range(20_000):
        image = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole) + 1)))])
        for _ in range(rng.randrange(4)):
            if image:
                at = rng.choice((rng.randrange(len(image)), 64 + rng.randrange(24)))
                image[at % len(image)] = rng.choice((0, 1, 64, 128, 255, rng.randrange(256)))
        try:
            read(lib, bytes(image), rng.choice((*offsets, rng.randrange(2048))))
            accepted += 1
        except ValueError:
            refused += 1
    assert accepted > 1000 and refused > 1000


def file_of(*arrays: Array) -> bytes:
    """A weight file of several fp16 records."""
    data = struct.pack("<II56x", len(arrays), 2)
    for array in arrays:
        record = struct.pack("<IIQQ40x", 0xDEADBEEF, F16, array.nbytes, len(data) + 64)
        data += record + array.tobytes() + bytes(-array.nbytes % 64)
    return data


def test_several_files_become_one_that_computes_the_same() -> None:
    """Two records of one file, one of another that is cut at its last byte, and an unknown path."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((1, 1, 1, n)).astype(np.float16) for n in (32, 1, 32))
    files = {"one.bin": file_of(a, b), "two.bin": file_of(c)[: 128 + c.nbytes]}
    shapes = {"a": "1,1,1,32", "b": "1,1,1,1", "c": "1,1,1,32"}
    places = {"a": ("one.bin", 64), "b": ("one.bin", 192), "c": ("two.bin", 64)}
    body = "\n".join(blob(name, "fp16", shapes[name], *places[name]) for name in places)
    for left, right, out in (("x", "a", "t"), ("t", "b", "u"), ("u", "c", "y")):
        body += (
            f'\ntensor<fp16, [1,1,1,32]> {out} = add(x={left}, y={right})[name=string("{out}")];'
        )
    text = program("tensor<fp16, [1,1,1,32]> x", body)
    paths = {FOLDER + name: np.frombuffer(data, np.uint8) for name, data in files.items()}
    packed, whole = pack(text.encode(), paths)
    assert list(whole) == [PACKED] and b"one.bin" not in packed and packed.count(b"weight.bin") == 3
    x = rng.standard_normal((1, 1, 1, 32)).astype(np.float16)
    found = Program(packed, {PACKED: whole[PACKED].tobytes()})(x=x)
    assert np.array_equal(found, Program(text, files)(x=x))
    old, _ = pack(old_dialect(text).encode(), paths)
    assert old.count(b"weight.bin") == 3 and b"two.bin" not in old


@pytest.mark.parametrize("damage", [slice(0, 40), slice(0, 100), slice(0, 140)])
def test_files_that_are_broken_are_left_to_the_reader(damage: slice) -> None:
    whole = np.frombuffer(file_of(np.ones(32, np.float16)), np.uint8)
    files = {"a": whole, "b": whole[damage]}
    assert pack(b"text", files) == (b"text", files)
