"""Token files and windows, with every way they can be wrong."""

from __future__ import annotations

import doctest
import json
import os
from pathlib import Path

import numpy as np
import pytest
from cases import one_line

import anepy.text.data
import anepy.text.documents
from anepy.errors import CheckpointError, ConfigError, DataError
from anepy.text.data import Sampler, TokenData, windows
from anepy.text.document_windows import document_windows

# 99.9 % points of chi-squared, so that a fair draw with these fixed seeds passes.
CHI2_9_DOF = 27.9


def numbers(n: int, name: str = "the token array") -> TokenData:
    return TokenData.from_array(np.arange(n, dtype=np.uint16), name=name)


def write_sidecar(path: Path, **changes: object) -> None:
    facts = {"format": "anepy-tokens-1", "dtype": "uint32", "vocab_size": 10, "tokens": 4}
    path.with_name(path.name + ".json").write_text(json.dumps({**facts, **changes}))


# --- TokenData -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "raw"), [("uint16", "<u2"), ("uint32", "<u4")])
def test_token_data_reads_flat_little_endian_files(tmp_path: Path, dtype: str, raw: str) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(np.array([1, 258, 65535], dtype=raw).tobytes())
    data = TokenData(path, dtype)
    assert data.tokens.tolist() == [1, 258, 65535]
    assert len(data) == 3
    assert data.path == path
    assert isinstance(data.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 5


def test_token_data_auto_without_sidecar_is_uint16(tmp_path: Path) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(bytes(8))
    data = TokenData(str(path))
    assert (len(data), data.vocab_size) == (4, None)


def test_token_data_auto_follows_the_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(np.arange(4, dtype="<u4").tobytes())
    write_sidecar(path)
    data = TokenData(path)
    assert (data.tokens.tolist(), data.vocab_size) == ([0, 1, 2, 3], 10)
    assert len(TokenData(path, "uint16")) == 8


def test_token_data_other_size_than_sidecar_raises(tmp_path: Path) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(bytes(12))
    write_sidecar(path)
    with pytest.raises(DataError, match=r"has 12 bytes, but d.bin.json says 16") as caught:
        TokenData(path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"dtype": "float32"},
        {"dtype": ["uint16"]},
        {"tokens": "4"},
        {"tokens": -4},
        {"tokens": True},
        {"vocab_size": None},
    ],
)
def test_token_data_bad_sidecar_field_raises(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(bytes(16))
    write_sidecar(path, **changes)
    with pytest.raises(DataError, match=r"d.bin.json does not describe token data") as caught:
        TokenData(path)
    one_line(caught)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_token_data_sidecar_not_an_object_raises(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(bytes(16))
    (tmp_path / "d.bin.json").write_bytes(raw)
    with pytest.raises(DataError, match="does not describe token data"):
        TokenData(path)


@pytest.mark.parametrize(
    ("raw", "dtype", "message"),
    [
        (b"", "auto", "is empty"),
        (b"", "uint32", "is empty"),
        (bytes(7), "auto", "has 7 bytes, not a multiple of the 2 of a uint16"),
        (bytes(6), "uint32", "has 6 bytes, not a multiple of the 4 of a uint32"),
    ],
)
def test_token_data_file_of_wrong_size_raises(
    tmp_path: Path, raw: bytes, dtype: str, message: str
) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        TokenData(path, dtype)
    assert str(path) in one_line(caught)


def test_token_data_missing_file_or_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.bin: No such file") as caught:
        TokenData(tmp_path / "none.bin")
    one_line(caught)
    with pytest.raises(DataError, match="it is a folder"):
        TokenData(tmp_path)
    with pytest.raises(DataError, match="it is not a regular file"):
        TokenData(os.devnull)


def test_token_data_unknown_dtype_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown token type 'int8'"):
        TokenData(tmp_path / "d.bin", "int8")


def test_from_array_shares_memory_and_is_read_only() -> None:
    array = np.arange(5)
    data = TokenData.from_array(array)
    assert np.shares_memory(data.tokens, array)
    assert not data.tokens.flags.writeable
    assert array.flags.writeable
    assert data.path is None


@pytest.mark.parametrize("array", [np.zeros((2, 2), int), np.zeros(3), 5])
def test_from_array_not_a_row_of_integers_raises(array: object) -> None:
    with pytest.raises(DataError, match="give a one-dimensional array of integers"):
        TokenData.from_array(array)  # type: ignore[arg-type]


def test_check_names_the_first_bad_token_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anepy.text.data, "_CHECK_TOKENS", 4)
    tokens = np.zeros(11, np.uint16)
    data = TokenData.from_array(tokens, name="d.bin")
    data.check(1)
    tokens[6], tokens[7], tokens[10] = 512, 600, 700
    data.check(701)
    with pytest.raises(DataError, match=r"^d.bin: token 6 is 512, but .* has 512") as caught:
        data.check(512)
    one_line(caught)


def test_check_negative_id_raises_and_huge_vocabulary_passes() -> None:
    with pytest.raises(DataError, match="token 1 is -1"):
        TokenData.from_array(np.array([3, -1])).check(10)
    numbers(4).check(10**9)


def test_split_keeps_the_end_and_shares_memory() -> None:
    data = numbers(100)
    train, held_out = data.split(0.25)
    assert held_out is not None
    assert (len(train), held_out.tokens.tolist()) == (75, list(range(75, 100)))
    assert np.shares_memory(held_out.tokens, data.tokens)
    assert data.split(0) == (data, None)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_split_fraction_out_of_range_raises(fraction: float) -> None:
    with pytest.raises(ConfigError, match="held-out fraction"):
        numbers(10).split(fraction)


def test_split_too_short_part_is_named_by_the_sampler() -> None:
    train, held_out = numbers(20, name="d.bin").split(0.1)
    Sampler(train, 8, 0)
    assert held_out is not None
    with pytest.raises(DataError, match=r"the held-out part of d.bin has 2 tokens, but .* needs 9"):
        Sampler(held_out, 8, 0)


# --- Sampler and windows -------------------------------------------------------------------------


def test_sampler_next_gives_int32_tokens_and_the_ones_after() -> None:
    sampler = Sampler(numbers(50), 7, seed=1)
    for _ in range(20):
        tokens, targets = sampler.next()
        assert tokens.shape == targets.shape == (7,)
        assert tokens.dtype == targets.dtype == np.int32
        assert tokens.flags.c_contiguous and targets.flags.c_contiguous
        assert tokens.flags.owndata and targets.flags.owndata
        assert tokens.tolist() == list(range(tokens[0], tokens[0] + 7))
        assert (targets == tokens + 1).all()


def test_sampler_every_start_is_equally_likely() -> None:
    sampler = Sampler(numbers(15), 5, seed=0)
    counts = np.bincount([sampler.next()[0][0] for _ in range(5000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < CHI2_9_DOF


def test_sampler_exactly_one_window_always_draws_it() -> None:
    sampler = Sampler(numbers(9), 8, seed=5)
    assert [sampler.next()[1].tolist() for _ in range(3)] == [list(range(1, 9))] * 3


def test_sampler_draws_are_pinned_forever() -> None:
    """A resumed run must see the same windows under any later version of numpy or anepy."""
    sampler = Sampler(numbers(60000), 8, seed=1234)
    assert [int(sampler.next()[0][0]) for _ in range(5)] == [38880, 14383, 22478, 21882, 15437]


def test_sampler_rejects_biased_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2**64 - 1, 2**64 - 2, 41])

    class Bits:
        def __init__(self, key: int, counter: int) -> None: ...

        def random_raw(self) -> int:
            return next(values)

    monkeypatch.setattr(np.random, "Philox", Bits)
    # 2**64 is 6 modulo 10: the last six values would favour low starts.
    assert anepy.text.data._draw(10, 0, 0) == 1


def test_sampler_seeds_differ_and_seed_zero_counts() -> None:
    def starts(seed: int) -> list[int]:
        sampler = Sampler(numbers(60000), 8, seed)
        return [int(sampler.next()[0][0]) for _ in range(8)]

    assert starts(0) == starts(0)
    assert len({tuple(starts(seed)) for seed in (0, 1, 2, 2**64 - 1)}) == 4


def test_sampler_restored_state_continues_alike() -> None:
    sampler = Sampler(numbers(5000), 8, seed=3)
    for _ in range(5):
        sampler.next()
    state = json.loads(json.dumps(sampler.state()))
    assert state == {"seed": 3, "index": 5}
    other = Sampler(numbers(5000), 8, seed=99)
    other.restore({name: np.int64(value) for name, value in state.items()})
    assert [other.next()[0][0] for _ in range(5)] == [sampler.next()[0][0] for _ in range(5)]


@pytest.mark.parametrize(
    "state", [{}, {"seed": 1}, {"seed": 1, "index": -1}, {"seed": 1.5, "index": 0}]
)
def test_sampler_damaged_state_raises_and_changes_nothing(state: dict[str, int]) -> None:
    sampler = Sampler(numbers(50), 8, seed=3)
    with pytest.raises(CheckpointError, match="sampler state"):
        sampler.restore(state)
    assert sampler.state() == {"seed": 3, "index": 0}


def test_sampler_short_data_says_how_many_tokens_it_needs() -> None:
    with pytest.raises(DataError, match=r"d.bin has 8 tokens, but a sequence of 8 needs 9") as e:
        Sampler(numbers(8, name="d.bin"), 8, seed=0)
    one_line(e)


@pytest.mark.parametrize(("seq_len", "seed"), [(0, 0), (-1, 0), (4, -1), (4, 2**64)])
def test_sampler_setting_out_of_range_raises(seq_len: int, seed: int) -> None:
    with pytest.raises(ConfigError):
        Sampler(numbers(50), seq_len, seed)


@pytest.mark.parametrize(
    ("n", "seq_len", "count", "starts"),
    [
        (100, 9, 4, [0, 30, 60, 90]),
        (100, 9, 1, [0]),
        (21, 10, 2, [0, 10]),
        (21, 10, 50, [0, 10]),
        (11, 10, 5, [0]),
    ],
)
def test_windows_are_evenly_spaced(n: int, seq_len: int, count: int, starts: list[int]) -> None:
    found = list(windows(numbers(n), seq_len, count))
    assert [int(tokens[0]) for tokens, _ in found] == starts
    assert all(
        (targets == tokens + 1).all() and len(tokens) == seq_len for tokens, targets in found
    )


def test_windows_never_overlap_and_reach_the_end() -> None:
    for n in range(20, 60):
        for count in (2, 3, 7):
            found = [int(t[0]) for t, _ in windows(numbers(n), 4, count)]
            assert min(np.diff(found)) >= 4
            assert found[-1] == n - 5


def test_windows_bad_settings_raise_at_once() -> None:
    with pytest.raises(ConfigError, match="0 evaluation windows"):
        windows(numbers(50), 4, 0)
    with pytest.raises(ConfigError, match="sequence length is 0"):
        windows(numbers(50), 0, 1)
    with pytest.raises(DataError, match="has 4 tokens"):
        windows(numbers(4), 4, 1)


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
@pytest.mark.parametrize("vocabulary", [500, 70_000])
def test_token_data_wider_ids_without_sidecar_are_noticed(
    tmp_path: Path, dtype: str, vocabulary: int
) -> None:
    ids = np.random.default_rng(1).integers(0, vocabulary, 1000)
    (tmp_path / "d.bin").write_bytes(ids.astype(dtype).tobytes())
    with pytest.raises(DataError, match=f"look like {dtype}, not uint16: pass --dtype {dtype}"):
        TokenData(tmp_path / "d.bin")
    assert TokenData(tmp_path / "d.bin", dtype).tokens.tolist() == ids.tolist()
    assert len(TokenData(tmp_path / "d.bin", "uint16")) > 1000
    (tmp_path / "n.bin").write_bytes(ids.astype("uint16").tobytes())
    assert len(TokenData(tmp_path / "n.bin")) == 1000


def test_docstring_examples_run() -> None:
    assert doctest.testmod(anepy.text.data).attempted > 0
    assert doctest.testmod(anepy.text.data).failed == 0


def test_documents_to_evaluate_on_are_whole_and_have_targets_that_count() -> None:
    data = TokenData.from_array(np.arange(20))
    data.starts = np.array([0, 5, 6, 12, 15])
    data.mask = np.ones(20, np.uint8)
    data.mask[12:15] = 0  # nothing to learn of this one; of the second there is no target at all
    data.mask[17] = 0
    found = document_windows(data, data.starts, 4, None)
    assert [tokens.tolist() for tokens, _ in found] == [
        [0, 1, 2, 3], [6, 7, 8, 9], [15, 16, 17, 18]
    ]  # fmt: skip
    assert [targets.tolist() for _, targets in found] == [
        [1, 2, 3, 4], [7, 8, 9, 10], [16, -100, 18, 19]
    ]  # fmt: skip
    few = document_windows(data, data.starts, 4, 2)
    assert [int(tokens[0]) for tokens, _ in few] == [0, 15]
    data.mask[:] = 0
    with pytest.raises(DataError, match="no document with a target that counts"):
        document_windows(data, data.starts, 4, None)
