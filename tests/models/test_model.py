"""Models in memory and llama2.c's files, against an independent reader and writer."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import resource
import signal
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import children
import needs
import numpy as np
import pytest
from reference import llama2c
from reference import llama64 as ref

from anepy.errors import ConfigError, ModelError, NativeError
from anepy.models import model as model_module
from anepy.models.model import PRESETS, Model, ModelConfig, RopeScaling

CONFIGS = {
    "tied": ModelConfig(12, 20, 2, 3, 3, 29, 40),
    "separate": ModelConfig(20, 14, 2, 5, 5, 31, 17, tied=False),
    "gqa": ModelConfig(24, 22, 3, 6, 2, 29, 11),
    "mqa-separate": ModelConfig(16, 26, 1, 4, 1, 19, 9, tied=False),
}
SMALL = CONFIGS["gqa"]
HEADER = struct.Struct("<7i")


def refused(path: Path) -> str:
    """Load a file that must be refused; return what is said, which is one line and names it."""
    with pytest.raises(ModelError) as caught:
        Model.load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 400
    return text


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if memory is asked for."""

    def fail(*_: object) -> None:
        raise AssertionError("memory was allocated for a file that is refused")

    monkeypatch.setattr(model_module.TensorTable, "arena", fail)


def written(path: Path, name: str = "gqa") -> Path:
    llama2c.write(path, CONFIGS[name], ref.random_weights(CONFIGS[name], 4))
    return path


# ---------------------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("name", CONFIGS)
def test_load_file_of_the_reference_writer_is_bit_exact(tmp_path: Path, name: str) -> None:
    weights = ref.random_weights(CONFIGS[name], 4)
    llama2c.write(tmp_path / "m.bin", CONFIGS[name], weights)
    model = Model.load(tmp_path / "m.bin")
    assert model.config == CONFIGS[name] and model.path == tmp_path / "m.bin"
    assert set(model.weights) == set(weights)
    for tensor, values in weights.items():
        assert model.weights[tensor].tobytes() == values.tobytes(), tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_save_file_is_that_of_the_reference_writer(tmp_path: Path, name: str) -> None:
    model = Model.init(CONFIGS[name], seed=2)
    size = model.save(tmp_path / "m.bin")
    llama2c.write(tmp_path / "reference.bin", CONFIGS[name], model.weights)
    ours, reference = (tmp_path / "m.bin").read_bytes(), (tmp_path / "reference.bin").read_bytes()
    assert size == len(ours) == len(reference)
    # The legacy tables are read by nobody and may differ in the last place.
    start = HEADER.size + 4 * (
        model.n_parameters - (0 if model.config.tied else model.weights["output.weight"].size)
    )
    end = start + 4 * model.config.seq_len * model.config.head_width
    assert ours[:start] + ours[end:] == reference[:start] + reference[end:]
    tables = np.frombuffer(ours[start:end], "<f4"), np.frombuffer(reference[start:end], "<f4")
    np.testing.assert_allclose(*tables, atol=1e-6, rtol=0)
    config, weights = llama2c.read(tmp_path / "m.bin")
    # The reference knows more shapes than this format can tell.
    assert dataclasses.asdict(config).items() >= dataclasses.asdict(model.config).items()
    assert all(weights[n].tobytes() == w.tobytes() for n, w in model.weights.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_load_file_without_legacy_tables(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    raw = written(tmp_path / "m.bin", name).read_bytes()
    model = Model.load(tmp_path / "m.bin")
    output = 0 if config.tied else model.weights["output.weight"].nbytes
    tables = 4 * config.seq_len * config.head_width
    start = len(raw) - output - tables
    (tmp_path / "short.bin").write_bytes(raw[:start] + raw[start + tables :])
    short = Model.load(tmp_path / "short.bin")
    assert short.config == config
    assert short.arena.tobytes() == model.arena.tobytes()
    short.save(tmp_path / "again.bin")
    assert (tmp_path / "again.bin").stat().st_size == len(raw), "run.c expects the tables"


def test_weights_take_arrays_of_their_shape() -> None:
    model = Model.init(SMALL, seed=1)
    view, name = model.weights["norm.weight"], "norm.weight"
    for values in (np.arange(24.0), [1] * 24, np.arange(24, dtype=np.int64)[::-1], view * 2):
        model.weights[name] = values
        assert np.array_equal(view, np.asarray(values, np.float32)), "the view that was there"
    model.weights["tok_embeddings.weight"] = np.full((29, 24), 0.1)
    assert model.arena[0] == np.float32(0.1)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("norm.weight", np.ones(23), "shape (24,), not (23,)"),
        ("norm.weight", 1.0, "shape (24,), not ()"),
        ("norm.weight", np.ones((1, 24)), "not (1, 24)"),
        ("norm.weight", ["a"] * 24, "real numbers"),
        ("norm.weight", np.ones(24, complex), "real numbers"),
        ("norm.weight", [[1.0], [1.0, 2.0]], "real numbers"),
        ("norm.weigth", np.ones(24), "did you mean 'norm.weight'?"),
        ("x", np.ones(24), "there is no tensor 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_refuse_what_does_not_fit(name: str, values: object, said: str) -> None:
    model = Model.init(SMALL, seed=1)
    before = model.arena.copy()
    with pytest.raises(ConfigError) as caught:
        model.weights[name] = values  # type: ignore[assignment]
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert np.array_equal(model.arena, before)
    with pytest.raises(KeyError):
        model.weights["x"]


def test_save_and_load_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    """Signed zeros and subnormals included."""
    model = Model.init(SMALL)
    odd = np.array([-0.0, 1e-45, -1e-39, 3.4e38, np.float32(0.1)], np.float32)
    model.weights["layers.1.feed_forward.w2.weight"].ravel()[:5] = odd
    model.save(tmp_path / "a.bin")
    loaded = Model.load(tmp_path / "a.bin")
    assert loaded.arena.tobytes() == model.arena.tobytes()
    loaded.save(tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_real_model_is_saved_byte_for_byte(tmp_path: Path) -> None:
    path = needs.data("stories260K.bin")
    model = Model.load(path)
    assert model.config == PRESETS["stories260K"] and model.n_parameters == 260032
    model.save(tmp_path / "copy.bin")
    config, weights = llama2c.read(path)
    copy_config, copy = llama2c.read(tmp_path / "copy.bin")
    assert copy_config == config
    assert all(copy[n].tobytes() == w.tobytes() for n, w in weights.items())


def test_load_does_not_hold_the_file(tmp_path: Path) -> None:
    """Saving over the file a model was loaded from must not change the model."""
    path = written(tmp_path / "m.bin")
    model = Model.load(path)
    before = model.arena.tobytes()
    Model.init(SMALL, seed=9).save(path)
    with path.open("r+b") as file:
        file.truncate(10)
    assert model.arena.tobytes() == before


def test_load_accepts_strings_and_links(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin")
    (tmp_path / "link").symlink_to(path)
    assert Model.load(str(tmp_path / "link")).config == SMALL


# ------------------------------------------------------------------------------------ atomic save


def unchanged(path: Path, old: bytes) -> None:
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name], "something stayed behind"


def failure(model: Model, path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        model.save(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 6}, "head_dim"),
        ({"head_dim": 6, "n_heads": 2}, "head_dim"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling"),
        ({"rope_scaling": RopeScaling("linear", 2.0), "norm_eps": 1e-6}, "norm_eps and rope_sc"),
    ],
)
def test_save_what_the_format_has_no_place_for_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = tmp_path / "m.bin"
    Model.init(SMALL).save(path)
    old = path.read_bytes()
    text = failure(Model.init(dataclasses.replace(SMALL, **changes)), path)
    assert f"cannot hold this model's {named}" in text
    unchanged(path, old)


def test_save_missing_folder_says_so(tmp_path: Path) -> None:
    text = failure(Model.init(SMALL), tmp_path / "no" / "m.bin")
    assert f"no folder {tmp_path / 'no'}" in text
    assert list(tmp_path.iterdir()) == []


def test_save_onto_folder_or_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").mkdir()
    assert "it is a folder" in failure(Model.init(SMALL), tmp_path / "m.bin")
    assert "it is no folder" in failure(Model.init(SMALL), Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_save_on_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    with needs.small_disk(tmp_path, 128):
        path = tmp_path / "m.bin"
        small = Model.init(SMALL)
        small.save(path)
        old = path.read_bytes()
        text = failure(Model.init(dataclasses.replace(SMALL, vocab_size=3000)), path)
        assert "No space left" in text and "free some space" in text
        unchanged(path, old)
        small.save(path)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond this: fails like a full disk, without any rights."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 20, 28, 5000])
def test_save_that_fails_anywhere_keeps_the_old_file(tmp_path: Path, limit: int) -> None:
    path = written(tmp_path / "m.bin")
    old = path.read_bytes()
    model = Model.init(SMALL, seed=8)
    with file_size_limit(limit):
        text = failure(model, path)
    assert "an older file there is unchanged" in text
    unchanged(path, old)


def test_save_interrupted_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "m.bin")
    old = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anepy.models.llama2c._rotary_tables", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Model.init(SMALL).save(path)
    unchanged(path, old)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("size", "says"),
    [(0, "it is empty"), (1, "1 bytes"), (27, "27 bytes"), (28, "28 bytes")],
)
@pytest.mark.usefixtures("no_allocation")
def test_load_file_without_tensors(tmp_path: Path, size: int, says: str) -> None:
    raw = written(tmp_path / "m.bin").read_bytes()
    (tmp_path / "bad.bin").write_bytes(raw[:size])
    text = refused(tmp_path / "bad.bin")
    assert says in text and ("truncated" in text or not size)


@pytest.mark.parametrize("change", [-4000, -4, -1, 1, 4, 100])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("no_allocation")
def test_load_file_of_wrong_size_names_both_sizes(tmp_path: Path, name: str, change: int) -> None:
    raw = written(tmp_path / "m.bin", name).read_bytes()
    (tmp_path / "bad.bin").write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    text = refused(tmp_path / "bad.bin")
    assert f"has {len(raw) + change} bytes, its header asks for {len(raw)}" in text
    assert ("truncated" if change < 0 else "longer than it says") in text


NONSENSE = {
    "zeros": (0, 0, 0, 0, 0, 0, 0),
    "negative": (-12, 20, 2, 3, 3, 29, 40),
    "all-negative": (-1, -1, -1, -1, -1, -1, -1),
    "least": (-(2**31),) * 7,
    "largest": (2**31 - 1,) * 7,
    "no-heads": (12, 20, 2, 0, 3, 29, 40),
    "no-kv-heads": (12, 20, 2, 3, 0, 29, 40),
    "no-layers": (12, 20, 0, 3, 3, 29, 40),
    "no-vocabulary": (12, 20, 2, 3, 3, 0, 40),
    "no-length": (12, 20, 2, 3, 3, 29, 0),
    "odd-head": (9, 20, 2, 3, 3, 29, 40),
    "heads-do-not-divide": (16, 20, 2, 3, 3, 29, 40),
    "kv-heads-do-not-divide": (16, 20, 2, 4, 3, 29, 40),
    "more-kv-heads": (16, 20, 2, 2, 4, 29, 40),
    # 4 * 32768 * 2^22 is 2^39; these products pass 2^31 and 2^32, where they could look small.
    "vocabulary-wraps": (1 << 15, 1, 1, 1, 1, 1 << 17, 1),
    "hidden-wraps": (1 << 15, 1 << 16, 1 << 10, 1, 1, 1, 1),
    "all-limits": (1 << 15, 1 << 16, 1 << 10, 1 << 10, 1 << 10, 1 << 22, 1 << 20),
    "most-negative-vocabulary": (12, 20, 2, 3, 3, -(2**31), 40),
    "text": HEADER.unpack(b"version https://git-lfs.gith"),
    "big-endian": HEADER.unpack(struct.pack(">7i", 12, 20, 2, 3, 3, 29, 40)),
    "gguf": HEADER.unpack(b"GGUF" + struct.pack("<6i", 3, 0, 291, 0, 24, 0)),
    "llama2c-v1": HEADER.unpack(struct.pack("<7I", 0x616B3432, 1, 64, 172, 5, 8, 4)),
}


@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.usefixtures("no_allocation")
def test_load_header_nonsense_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(HEADER.pack(*NONSENSE[kind]) + bytes(4000))
    refused(path)


@pytest.mark.usefixtures("no_allocation")
def test_load_random_headers_never_do_anything_else(tmp_path: Path) -> None:
    """Any bytes: refused with one line, before memory is asked for."""
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.bin"
    plausible = np.array([1, 2, 3, 4, 6, 8, 12, 64, 100, 512, 1024, 32768, 65536, 1 << 20, 1 << 22])
    for round_ in range(600):
        if round_ % 3 == 0:
            head = rng.bytes(HEADER.size)
        elif round_ % 3 == 1:
            head = HEADER.pack(*(rng.choice(plausible, 7) * rng.choice([1, 1, 1, 1, -1], 7)))
        else:
            values = np.array([24, 22, 3, 6, 2, 29, 11])
            values[rng.integers(7)] = rng.integers(-(2**31), 2**31)
            head = HEADER.pack(*values)
        path.write_bytes(head + rng.bytes(int(rng.integers(0, 300))))
        refused(path)


def test_load_damaged_byte_in_the_header_is_refused(tmp_path: Path) -> None:
    raw = written(tmp_path / "m.bin").read_bytes()
    path = tmp_path / "bad.bin"
    for place in range(HEADER.size):
        for flip in (1, 2, 64, 128, 255):
            damaged = bytearray(raw)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            refused(path)


def test_load_bad_files_take_little_memory(tmp_path: Path) -> None:
    """Headers that promise terabytes, in a process that may have 1 GiB more than it has now."""
    path = tmp_path / "bad.bin"
    paths = []
    for kind in ("all-limits", "hidden-wraps", "vocabulary-wraps", "largest"):
        paths.append(tmp_path / f"{kind}.bin")
        paths[-1].write_bytes(HEADER.pack(*NONSENSE[kind]))
        with paths[-1].open("r+b") as file:
            file.truncate(1 << 40)  # sparse: a terabyte that takes no disk
    code = (
        "import resource, sys\n"
        "from anepy.models.model import Model, PRESETS\n"
        "from anepy.errors import ModelError\n"
        "Model(PRESETS['stories260K'])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: Model.load(path)\n"
        "    except ModelError: print('refused')\n"
    )
    needs.proc()
    result = children.run("-c", code, *paths)
    assert (result.stdout, result.stderr) == ("refused\n" * len(paths), ""), path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["tok_embeddings.weight", "norm.weight"])
def test_load_weights_that_are_not_finite(tmp_path: Path, tensor: str, value: float) -> None:
    weights = ref.random_weights(SMALL, 4)
    weights[tensor].ravel()[-1] = value
    llama2c.write(tmp_path / "bad.bin", SMALL, weights)
    assert "NaN or infinite" in refused(tmp_path / "bad.bin")


@pytest.mark.usefixtures("no_allocation")
def test_load_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "missing.bin")
    assert "it is a folder without config.json" in refused(tmp_path)
    assert "Not a directory" in refused(written(tmp_path / "m.bin") / "inside")
    assert "not a regular file" in refused(Path("/dev/zero"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop")


@pytest.mark.usefixtures("no_allocation")
def test_load_pipe_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    """It blocked for ever."""
    os.mkfifo(tmp_path / "pipe")

    def late(*_: object) -> None:
        raise TimeoutError("Model.load waits for the pipe")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        assert "not a regular file" in refused(tmp_path / "pipe")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.usefixtures("no_allocation")
def test_load_unreadable_file(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin")
    path.chmod(0)
    needs.held_by_permissions()
    assert "Permission denied" in refused(path)


# ------------------------------------------------------------------------------------ in memory


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()], ids=str)
def test_weights_have_the_names_and_shapes_of_llama(config: ModelConfig) -> None:
    model = Model(config)  # zeros: pages that are not touched cost nothing
    expected = ref.tensor_shapes(config)
    assert {n: w.shape for n, w in model.weights.items()} == expected
    assert model.n_parameters == sum(int(np.prod(s)) for s in expected.values())
    assert all(w.dtype == np.float32 and w.flags.c_contiguous for w in model.weights.values())


def test_presets_have_the_known_parameter_counts() -> None:
    counts = {name: Model(config).n_parameters for name, config in PRESETS.items()}
    assert counts == {
        "stories260K": 260_032,
        "stories15M": 15_191_712,
        "stories42M": 41_689_600,
        "stories110M": 109_529_856,
    }


def test_weights_are_writable_views_that_fill_the_arena() -> None:
    model = Model(SMALL)
    for number, weight in enumerate(model.weights.values(), 1):
        assert weight.flags.writeable and np.shares_memory(weight, model.arena)
        weight += number
    counts = dict(zip(*np.unique(model.arena, return_counts=True), strict=True))
    assert counts == {n: w.size for n, w in enumerate(model.weights.values(), 1)}
    model.arena[...] = 7.0
    assert all((weight == 7.0).all() for weight in model.weights.values())
    assert model.arena.ctypes.data % 64 == 0


def test_views_outlive_the_model() -> None:
    view = Model.init(SMALL, seed=1).weights["layers.2.attention.wk.weight"]
    expected = Model.init(SMALL, seed=1).weights["layers.2.attention.wk.weight"].copy()
    gc.collect()
    others = [Model.init(SMALL, seed=9) for _ in range(20)]  # would reuse freed memory
    np.testing.assert_array_equal(view, expected)
    del others


def test_memory_goes_with_the_last_view() -> None:
    needs.proc()

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    config = dataclasses.replace(PRESETS["stories260K"], vocab_size=1 << 20)  # 256 MiB
    before = mapped()
    model = Model(config)
    view = model.weights["norm.weight"]
    del model
    gc.collect()
    assert mapped() - before > 200 << 20, "freed while a view was alive"
    del view
    gc.collect()
    assert mapped() - before < 100 << 20, "not freed"


def test_init_same_seed_same_weights_other_seed_others() -> None:
    first, again, other = (Model.init(SMALL, seed) for seed in (0, 0, 1))
    assert first.arena.tobytes() == again.arena.tobytes()
    assert Model.init(SMALL).arena.tobytes() == first.arena.tobytes(), "the default is 0"
    for name, weight in first.weights.items():
        same = np.array_equal(weight, other.weights[name])
        assert same == (weight.ndim == 1), name


def test_init_no_two_tensors_are_alike() -> None:
    """A seed reused for every tensor would start all layers equal."""
    model = Model.init(SMALL)
    matrices = [w.ravel()[:100] for w in model.weights.values() if w.ndim == 2]
    for i, a in enumerate(matrices):
        for b in matrices[:i]:
            assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.5


def test_init_has_the_documented_deviations() -> None:
    config = ModelConfig(128, 256, 8, 4, 4, 500, 16, tied=False)
    model = Model.init(config, seed=3)
    for name, weight in model.weights.items():
        if weight.ndim == 1:
            assert (weight == 1.0).all(), name
            continue
        expected = 0.02
        if name.endswith(("wo.weight", "w3.weight")):
            expected /= np.sqrt(16)
        n = weight.size
        # Five standard errors; a normal distribution has 4.55 % beyond two deviations.
        assert abs(weight.std() / expected - 1) < 5 / np.sqrt(2 * n), name
        assert abs(weight.mean()) < 5 * expected / np.sqrt(n), name
        assert abs(np.mean(np.abs(weight) > 2 * expected) - 0.0455) < 5 * 0.21 / np.sqrt(n), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"hidden_dim": -1}, "hidden_dim is -1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_heads": 5}, "not a multiple of n_heads 5"),
        ({"n_heads": 24}, "head_dim 1 is odd"),
        ({"n_kv_heads": 4}, "not a multiple of n_kv_heads 4"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"vocab_size": 1 << 23}, "vocab_size is 8388608"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"dim": 2**32 + 24}, "dim is 4294967320"),
        ({"dim": -(2**40)}, "dim is -1099511627776"),
        ({"tied": 2}, "tied is 2"),
        ({"dim": "wide"}, "whole number"),
        ({"dim": None}, "whole number"),
        ({"dim": 24.5}, "whole number"),
        ({"dim": float("inf")}, "whole number"),
        ({"dim": float("nan")}, "whole number"),
    ],
)
def test_model_of_impossible_dimensions(change: dict[str, int], says: str) -> None:
    """Half a channel was taken as none, infinity was an OverflowError."""
    with pytest.raises(ConfigError) as caught:
        Model(dataclasses.replace(SMALL, **change))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_model_too_large_for_this_machine() -> None:
    with pytest.raises(NativeError, match="gave no 44530489491456 bytes"):
        Model(ModelConfig(1 << 15, 1 << 16, 1 << 10, 1 << 10, 1 << 10, 1 << 22, 1 << 18))


def test_init_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        Model.init(SMALL, seed=-1)


def test_model_prints_what_it_is() -> None:
    assert repr(Model(SMALL)) == f"Model({SMALL}, {Model(SMALL).n_parameters:,} parameters)"


def test_copies_have_their_own_weights() -> None:
    """copy.deepcopy(model) used to fail inside ctypes."""
    model = Model.init(PRESETS["stories260K"], seed=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        np.testing.assert_array_equal(other.arena, model.arena)
        other.weights["norm.weight"][0] = 7.0
        assert model.weights["norm.weight"][0] == 1.0
