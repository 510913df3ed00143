"""Models and checkpoints in every format, from every format; the moments where both hold them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import Run, assert_one_line_error, runner

from anepy import (
    ConfigError,
    Model,
    ModelConfig,
    ModelError,
    TokenData,
    TrainConfig,
    Trainer,
)
from anepy.text.tokenizer import Tokenizer
from anepy.training.convert import convert

PLAIN = ModelConfig(32, 48, 2, 4, 4, 61, 16)
GROUPED = ModelConfig(32, 48, 2, 4, 2, 61, 16)
WIDE = ModelConfig(32, 48, 2, 4, 2, 61, 16, head_dim=12)
LAYER = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
LAYER += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm"]


def layout(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield what docs/formats.md says the order is: kind and name."""
    for layer in range(config.n_layers):
        names = [f"layers.{layer}.{part}.weight" for part in LAYER]
        for name in names:
            yield "w", name
        for name in names:
            yield "m", name
            yield "v", name
    for name in ("norm.weight", "tok_embeddings.weight"):
        for kind in "wmv":
            yield kind, name


def write_research(
    path: Path, model: Model, version: int, cut: int | None = None
) -> dict[str, object]:
    """Write a file as the research programs do; return its arrays by kind and name."""
    c = model.config
    width = c.head_dim or c.dim // c.n_heads
    tail = (c.n_kv_heads, width, width * c.n_heads) if version == 4 else (7, 0, 0)
    head = struct.pack("<10i", 0x424C5A54, version, 30, 100, c.n_layers, c.vocab_size, c.dim,
                       c.hidden_dim, c.n_heads, c.seq_len)  # fmt: skip
    head += struct.pack("<2f3d", 1e-3, 2.5, 1.0, 2.0, 3.0) + struct.pack("<6i", 30, 3, 3, *tail)
    assert len(head) == 96
    random = np.random.default_rng(5)
    arrays: dict[str, object] = {}
    with path.open("wb") as file:
        file.write(head)
        for kind, name in layout(c):
            weight = model.weights[name]
            array = weight if kind == "w" else random.random(weight.shape, np.float32)
            arrays[f"{kind}.{name}"] = np.array(array)
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return arrays


def equal(a: Model, b: Model) -> bool:
    return a.config == b.config and np.array_equal(a.arena, b.arena)


def target(folder: Path, kind: str) -> Path:
    if kind == "folder":
        needs.module("safetensors")
    if kind == ".gguf":
        needs.module("gguf")
    return folder / ("out" if kind == "folder" else f"out{kind}")


@pytest.mark.filterwarnings("ignore:.*gets no tokenizer")
@pytest.mark.parametrize("second", [".bin", ".gguf", "folder", "research"])
@pytest.mark.parametrize("first", [".bin", ".gguf", "folder", "research", ".npz"])
def test_every_format_becomes_every_other_with_the_same_weights(
    tmp_path: Path, first: str, second: str
) -> None:
    model = Model.init(GROUPED, seed=3)
    model.save(tmp_path / "m.bin")
    write_research(tmp_path / "r.bin", model, 4)
    source = tmp_path / "r.bin" if first in ("research", ".npz") else tmp_path / "m.bin"
    if first not in ("research",):
        (tmp_path / "a").mkdir()
        made = target(tmp_path / "a", first)
        convert(source, made)
        source = made
    if second == "research":
        made = tmp_path / "out.ckpt"
        convert(source, made, version=4)
    else:
        made = target(tmp_path, second)
        convert(source, made)
    assert equal(Model.load(made), model)


@pytest.mark.parametrize(("version", "config"), [(2, PLAIN), (4, PLAIN), (4, GROUPED), (4, WIDE)])
def test_research_checkpoint_comes_back_to_the_byte(
    tmp_path: Path, version: int, config: ModelConfig
) -> None:
    """Only times and the pad of version 2, which anepy has no use for, may differ."""
    arrays = write_research(tmp_path / "r.bin", Model.init(config, seed=1), version)
    notes = convert(tmp_path / "r.bin", tmp_path / "run.npz")
    assert any("rotary" in note for note in notes) == (version == 2)
    with np.load(tmp_path / "run.npz") as saved:
        for name in Model(config).weights:
            for ours, theirs in (("", "w."), ("m.", "m."), ("v.", "v.")):
                assert np.array_equal(saved[ours + name], arrays[theirs + name]), ours + name
    convert(tmp_path / "run.npz", tmp_path / "back.bin", version=version)
    there, back = (tmp_path / "r.bin").read_bytes(), (tmp_path / "back.bin").read_bytes()
    assert there[96:] == back[96:] and there[:48] == back[:48]
    assert there[80:84] == back[80:84] and (version == 2 or there[84:] == back[84:])


def test_run_of_the_research_programs_goes_on_here(tmp_path: Path) -> None:
    model = Model.init(GROUPED, seed=1)
    write_research(tmp_path / "r.bin", model, 4)
    convert(tmp_path / "r.bin", tmp_path / "run.npz")
    data = TokenData.from_array(np.arange(2000) % 61)
    config = TrainConfig(steps=34, accum=2, seq=16, lr=1e-3, precision="fp32", device="cpu")
    with Trainer(Model(GROUPED), data, config, resume=tmp_path / "run.npz") as trainer:
        assert (trainer.start_step, trainer.engine.updates) == (30, 3)
        reports = list(trainer)
    assert [report.step for report in reports] == [31, 32, 33, 34] and reports[-1].updates == 5


def test_checkpoint_of_a_run_becomes_its_model(tmp_path: Path) -> None:
    """Also one that was interrupted between two updates, or has frozen tensors."""
    data = TokenData.from_array(np.arange(2000) % 61)
    config = TrainConfig(
        steps=9, accum=4, seq=16, precision="fp32", device="cpu", freeze=("tok_embeddings*",)
    )
    with Trainer(Model.init(GROUPED), data, config) as trainer:
        for _ in range(6):
            trainer.run_step()
        trainer.save_checkpoint(tmp_path / "run.npz")
        notes = convert(tmp_path / "run.npz", tmp_path / "m.bin")
        assert equal(Model.load(tmp_path / "m.bin"), trainer.model)
    assert any("gradients of 2 steps" in note for note in notes)
    assert any("moments stay behind" in note for note in notes)
    convert(tmp_path / "run.npz", tmp_path / "r.bin", version=4)
    assert equal(Model.load(tmp_path / "r.bin"), Model.load(tmp_path / "m.bin"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:50], "less than its header"),
        (lambda b: b[:-4], "truncated"),
        (lambda b: b + b"1234", "longer than it says"),
        (lambda b: b[:4] + struct.pack("<i", 3) + b[8:], "version 3"),
        (lambda b: b[:24] + struct.pack("<i", -5) + b[28:], "header of which"),
        (lambda b: b[:32] + struct.pack("<i", 0) + b[36:], "header of which"),
        (lambda b: b[:24] + struct.pack("<i", 2**31 - 1) + b[28:], r"header of which|asks for"),
        (lambda b: b[:92] + struct.pack("<i", 31) + b[96:], "damaged"),
        (lambda b: b[:8] + struct.pack("<i", -1) + b[12:], "negative counts"),
        (lambda b: b[:200] + struct.pack("<f", float("nan")) + b[204:], "NaN"),
    ],
)
def test_bad_research_checkpoints_are_one_line(tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    write_research(tmp_path / "r.bin", Model.init(GROUPED), 4)
    (tmp_path / "r.bin").write_bytes(change((tmp_path / "r.bin").read_bytes()))
    for act in (
        lambda: Model.load(tmp_path / "r.bin"),
        lambda: convert(tmp_path / "r.bin", "x.npz"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            act()
        assert "\n" not in str(caught.value) and "r.bin" in str(caught.value)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    Model.init(GROUPED).save(tmp_path / "m.bin")
    with pytest.raises(ConfigError, match="only a checkpoint can become"):
        convert(tmp_path / "m.bin", tmp_path / "x.npz")
    with pytest.raises(ModelError, match=r"version 2 .* cannot hold this model's n_kv_heads"):
        convert(tmp_path / "m.bin", tmp_path / "x.bin", version=2)
    with pytest.raises(ConfigError, match="2 and 4, not 3"):
        convert(tmp_path / "m.bin", tmp_path / "x.bin", version=3)
    with pytest.raises(ConfigError, match="holds f32"):
        convert(tmp_path / "m.bin", tmp_path / "x.bin", "bf16", version=4)
    Model.init(ModelConfig(32, 48, 2, 4, 2, 61, 16, tied=False)).save(tmp_path / "u.bin")
    with pytest.raises(ModelError, match="tied"):
        convert(tmp_path / "u.bin", tmp_path / "x.bin", version=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "u.bin"]


# The commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys, monkeypatch)


def test_convert_replaces_nothing_unasked(run: Run, tmp_path: Path) -> None:
    Model.init(GROUPED).save(tmp_path / "m.bin")
    write_research(tmp_path / "r.bin", Model.init(GROUPED, seed=2), 4)
    assert_one_line_error(run("convert", "r.bin", "m.bin"), "m.bin exists", "--force")
    assert_one_line_error(run("convert", "r.bin", "r.bin", "--force"), "are the same file")
    (tmp_path / "link.bin").symlink_to("r.bin")
    assert_one_line_error(run("convert", "r.bin", "link.bin", "--force"), "are the same file")
    result = run("convert", "r.bin", "m.bin", "--force")
    assert result.code == 0 and result.out == "m.bin: 17.5 K parameters, f32\n"
    assert "moments stay behind" in result.err
    assert equal(Model.load("m.bin"), Model.init(GROUPED, seed=2))


def test_convert_to_gguf_takes_the_tokenizer_beside(run: Run, tmp_path: Path) -> None:
    needs.module("gguf")
    from anepy import Tokenizer

    config = ModelConfig(32, 48, 2, 4, 2, 259, 16)
    Model.init(config).save(tmp_path / "m.bin")
    Tokenizer.bytes().save(tmp_path / "tokenizer.bin")
    result = run("convert", "m.bin", "m.gguf")
    assert result.code == 0 and result.err == ""
    assert Model.load("m.gguf").tokenizer is not None
    Model.init(GROUPED).save(tmp_path / "other.bin")
    result = run("convert", "other.bin", "other.gguf")
    assert result.code == 0 and "anepy: note: other.gguf gets no tokenizer" in result.err


def test_convert_writes_a_tokenizer_alone(run: Run, tmp_path: Path) -> None:
    words = Tokenizer.load(needs.data("tok512.bin"))
    needs.module("gguf")
    model = Model.init(ModelConfig(32, 32, 1, 2, 2, 512, 64))
    model.save(tmp_path / "m.bin")
    named = ["-z", needs.data("tok512.bin")]
    texts = ["Once upon a time", "It's 12  cats\n", "日本 é"]
    for ending in (".gguf", ".folder"):
        assert run("convert", "m.bin", f"m{ending}", *named).code == 0
        for name in ("tokenizer.json", "tokenizer.bin"):
            result = run("convert", f"m{ending}", name, "--force")
            assert result.code == 0 and "512 tokens" in result.out, result.err
            assert [Tokenizer.load(name).encode(t) for t in texts] == [
                words.encode(t) for t in texts
            ]
    # The scores of a tokenizer.json are ranks, which order the same.
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 99)
    assert run("prepare", "text.txt", "-o", "d.bin", "--train-tokenizer", 270).code == 0
    result = run("convert", "d.tokenizer.json", "tokenizer.bin", "--force")
    assert_one_line_error(result, "tokenizer.bin", "merges bytes")


def test_init_takes_dimensions_of_a_model_or_of_options(run: Run, tmp_path: Path) -> None:
    Model.init(GROUPED).save(tmp_path / "m.bin")
    assert run("init", "--like", "m.bin", "--vocab", 259, "-o", "a.bin").code == 0
    assert Model.load("a.bin").config == ModelConfig(32, 48, 2, 4, 2, 259, 16)
    words = (
        "--dim 64 --layers 3 --heads 4 --kv-heads 2 --hidden 96 --vocab 100 --context 32".split()
    )
    assert run("init", *words, "-o", "b.bin").code == 0
    assert Model.load("b.bin").config == ModelConfig(64, 96, 3, 4, 2, 100, 32)
    assert run("init", "--dim", 128, "--vocab", 100, "-o", "c.bin").code == 0
    assert run("init", "stories260K", "--vocab", 300, "-o", "d.bin").code == 0
    assert Model.load("d.bin").config.vocab_size == 300


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--dim", 64], 1, "--dim needs --vocab"),
        (["stories260K", "--dim", 64], 1, "give one of"),
        (["--like", "none.bin"], 1, "none.bin"),
        (["--dim", 64, "--heads", 4, "--kv-heads", 3, "--vocab", 9], 1, "heads"),
        ([], 2, "say how large"),
        (["stories260K", "--minutes", 3], 2, "needs --data"),
    ],
)
def test_init_refuses_what_makes_no_model(
    run: Run, tmp_path: Path, words: list[object], code: int, told: str
) -> None:
    result = run("init", *words, "-o", "x.bin")
    assert result.code == code and told in result.err and list(tmp_path.iterdir()) == []


def test_init_chooses_a_size_for_data_and_time(run: Run, tmp_path: Path) -> None:
    """More time means no smaller model; the command it prints works and keeps what it says."""
    (np.arange(200_000) % 97).astype("<u2").tofile(tmp_path / "d.bin")
    result = run("init", "--data", "d.bin", "--minutes", 0.02, "-o", "short.bin")
    assert result.code == 0 and "vocabulary of 97" in result.err, result.err
    assert "about " in result.out and Model.load("short.bin").config.vocab_size == 97
    command = result.out.splitlines()[-1].split()
    assert command[:4] == ["anepy", "train", "short.bin", "--data"]
    steps = int(command[command.index("--steps") + 1])
    assert run("init", "--data", "d.bin", "--minutes", 600, "-o", "long.bin").code == 0
    assert Model.load("long.bin").n_parameters >= Model.load("short.bin").n_parameters
    command[command.index("--steps") + 1] = str(min(steps, 3))
    assert run(*command[1:]).code == 0
