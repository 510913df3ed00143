"""Every kind of tokenizer gives the ids of the software it comes from."""

from __future__ import annotations

import json
import random
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import needs
import pytest

from anepy.errors import TokenizerError
from anepy.models.model import Model, ModelConfig
from anepy.models.stored_tokenizer import StoredTokenizer
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_packages import JsonTokenizer, SentencePieceTokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer, byte_tokenizer
from anepy.text.tokenizer_stored import of_model, of_stored, resolve_tokenizer
from anepy.text.tokenizer_training import train_tokenizer

WORDS = (
    "the cat sat on a mat", "it's", "I'M", "we'LL", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n",
    "12", "3.14159", "2026", "é", "naïve", "e\u0301", "世界", "こんにちは", "Привет",
    "हिन्दी", "🙂", "\u2581", "\u00a0", "</s>", "<s>", "<unk>", "<|im_start|>",
    "<0x41>", "<|im", "_x_", "fn(x)", "!?", "...", "a.b/c?d", "A", "Z9", "½", "\x00",
    "<|endoftext|>", "שלום", "مرحبا", "👩\u200d💻", "\ufb01",
)  # fmt: skip


def texts(count: int, seed: int = 5) -> Iterator[str]:
    """Yield generated strings: words of several scripts, blanks, digits, look-alikes, letters."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0x9FFF)]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 9)):
            if rng.random() < 0.7:
                parts.append(rng.choice(WORDS))
            else:
                low, high = rng.choice(ranges)
                parts.append(
                    "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(6)))
                )
            parts.append(rng.choice(["", "", " ", "\n"]))
        yield "".join(parts)


def sentencepiece_model(path: Path, **options: Any) -> Any:
    """Train a small model on the words above; return the processor."""
    library = needs.peer("sentencepiece")
    settings = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 0.99, "hard_vocab_limit": False,
    } | options  # fmt: skip
    rng = random.Random(9)
    known = [word for word in WORDS if word.isprintable() and "\u2581" not in word]
    sentences = [" ".join(rng.choice(known) for _ in range(9)) for _ in range(2000)]
    sentences += ["the cat sat on the mat and the other cat sat there"] * 300
    path.parent.mkdir(exist_ok=True)
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path.with_suffix("")), **settings
    )
    return library.SentencePieceProcessor(model_file=str(path))


def llama2c_file(model: Any, path: Path) -> Path:
    """Write a tokenizer.bin as llama2.c exports SentencePiece's models."""
    raw = struct.pack("<i", 40)
    for i in range(model.get_piece_size()):
        text = model.id_to_piece(i)
        text = {model.bos_id(): "\n<s>\n", model.eos_id(): "\n</s>\n"}.get(i, text)
        entry = text.replace("\u2581", " ").encode()
        raw += struct.pack("<fi", model.get_score(i), len(entry)) + entry
    path.write_bytes(raw)
    return path


# ----------------------------------------------------------------------------- tokenizer.bin


def llama2_processor(path: Path) -> Any:
    """Make SentencePiece's model again that the Llama 2 tokenizer.bin was exported from."""
    library = needs.peer("sentencepiece")
    needs.peer("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2 as schema

    entries, scores = PieceTokenizer.read(needs.data("tokenizer.bin")).pieces()
    model = schema.ModelProto()
    for i, (entry, score) in enumerate(zip(entries, scores, strict=True)):
        kind = {0: 2, 1: 3, 2: 3}.get(i, 6 if 3 <= i < 259 else 1)
        text = entry.decode().strip("\n") if i < 3 else entry.decode().replace(" ", "\u2581")
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(entries)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return library.SentencePieceProcessor(model_file=str(path))


def test_llama_2_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    theirs = llama2_processor(tmp_path / "llama.model")
    ours = Tokenizer.load(needs.data("tokenizer.bin"))
    wrapped = Tokenizer.load(tmp_path / "llama.model")
    several = [*texts(10_000), needs.data("tinyshakespeare.txt").read_text("utf-8")[:200_000]]
    several.append(needs.data("tinystories_sample.txt").read_text("utf-8"))
    for text in several:
        # A tokenizer.bin does not know that a mark is a blank, as run.c does not.
        if "\u2581" not in text and "\0" not in text:
            assert ours.encode(text, bos=False) == theirs.encode(text), text
        assert wrapped.encode(text) == [1, *theirs.encode(text)], text
    assert (wrapped.bos_id, wrapped.eos_id, wrapped.vocab_size) == (1, 2, 32000)
    for text in texts(300, seed=1):
        ids = wrapped.encode(text)
        streamed = b"".join(map(wrapped.piece, [-1, *ids], ids))
        assert streamed == ours.decode(ours.encode(text.replace("\u2581", " "))).encode() != b"?"


@pytest.mark.parametrize(
    "options",
    [
        {"pad_id": 3},
        {"pad_id": 0, "unk_id": 3},
        {"bos_id": -1},
        {"bos_id": 2, "eos_id": 1},
        {"bos_id": -1, "eos_id": -1},
    ],
    ids=str,
)
def test_exported_models_give_the_ids_of_sentencepiece(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = sentencepiece_model(tmp_path / "m.model", **options)
    ours = Tokenizer.load(llama2c_file(theirs, tmp_path / "t.bin"))
    assert (ours.bos_id or -1, ours.eos_id or -1) == (theirs.bos_id(), theirs.eos_id())
    for text in texts(1000):
        if "\u2581" in text or "\0" in text:
            continue
        assert ours.encode(text, bos=False) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_defined_symbols": ["<sep>", "foo"]}, "token 3, '<sep>', may be a special token"),
        ({"control_symbols": ["<mask>"]}, "token 3, '<mask>', may be a special token"),
        ({"byte_fallback": False}, "no token for .* of the 256 bytes"),
    ],
)
def test_files_that_do_not_tell_enough_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    theirs = sentencepiece_model(tmp_path / "m.model", **options)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(llama2c_file(theirs, tmp_path / "t.bin"))
    wrapped = Tokenizer.load(tmp_path / "m.model")
    for text in texts(500):
        assert wrapped.encode(text, bos=False) == theirs.encode(text)


def test_files_of_the_first_days(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "new.bin")
    raw = (tmp_path / "new.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes(raw[4:])
    old, new = (Tokenizer.load(tmp_path / name) for name in ("old.bin", "new.bin"))
    for text in texts(100):
        assert old.encode(text) == new.encode(text)
    bare = b"".join(struct.pack("<i", len(e)) + e for e in byte_tokenizer().pieces()[0])
    (tmp_path / "older.bin").write_bytes(bare)
    with pytest.raises(TokenizerError, match="has no scores and cannot encode"):
        Tokenizer.load(tmp_path / "older.bin")


def test_empty_pieces_are_never_made() -> None:
    entries, scores = byte_tokenizer().pieces()
    tokenizer = PieceTokenizer([*entries, b"", b"ab"], [*scores, 0.0, 1.0])
    assert tokenizer.encode("ab") == [1, 35, 260]
    assert tokenizer.decode([1, 35, 259, 260]) == "ab"


# ---------------------------------------------------------------------------- tokenizer.json


@pytest.fixture(scope="module", params=["bytes", "marks"])
def json_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer.json: of letters for bytes as GPT-2's, or of marks as Llama 2's."""
    library = needs.peer("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<s>", "</s>", "<|im_start|>", "<|endoftext|>"]
    if request.param == "bytes":
        made = library.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", *special, *(f"<0x{n:02X}>" for n in range(256))],
            limit_alphabet=100, show_progress=False,
        )  # fmt: skip
    # Without names of special tokens, or merges would make them of plain text.
    made.train_from_iterator([t.replace("<", "") for t in texts(2000, seed=2)], trainer)
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    folder = tmp_path_factory.mktemp(request.param)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_json_gives_the_ids_of_tokenizers(json_file: Path) -> None:
    library = needs.peer("tokenizers")
    ours, theirs = Tokenizer.load(json_file), library.Tokenizer.from_file(str(json_file))
    aware = library.Tokenizer.from_file(str(json_file))
    theirs.encode_special_tokens = True
    begin = theirs.token_to_id("<s>")
    assert (ours.bos_id, ours.eos_id) == (begin, theirs.token_to_id("</s>"))
    several = list(texts(10_000))
    found = theirs.encode_batch(several, add_special_tokens=True)
    for text, each in zip(several, found, strict=True):
        assert ours.encode(text) == each.ids, text
    for text in several[:500]:
        assert ours.encode(text, special=True) == aware.encode(text).ids
        plain = text.replace("\u2581", " ")
        assert ours.decode(ours.encode(plain)) == theirs.decode(ours.encode(plain))
    whole = list(ours.encode_all([(text, True) for text in several[:50]]))
    assert [each.tolist() for each in whole] == [ours.encode(t, bos=False) for t in several[:50]]


def test_pieces_of_json_joined_are_its_text(json_file: Path) -> None:
    ours = Tokenizer.load(json_file)
    for text in texts(1000, seed=8):
        ids = ours.encode(text)
        joined = b"".join(map(ours.piece, [-1, *ids], ids)).decode("utf-8", "replace")
        assert joined == ours.decode(ids)


@pytest.mark.parametrize("kind", ["json", "bin", "model"])
def test_text_cut_anywhere_keeps_its_ids(
    kind: str, json_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "json":
        ours = Tokenizer.load(json_file)
    elif kind == "bin":
        ours = Tokenizer.load(needs.data("tok512.bin"))
    else:
        sentencepiece_model(tmp_path / "m.model", normalization_rule_name="nmt_nfkc")
        ours = Tokenizer.load(tmp_path / "m.model")
    text = needs.data("tinyshakespeare.txt").read_text("utf-8")[:60_000]
    ids, rest, begins, cuts = [], text, True, 0
    while rest:
        cut = ours.divide(rest, 2000) if len(rest) > 3000 else None
        end, after = cut or (len(rest), len(rest))
        part = next(iter(ours.encode_all([(rest[:end], begins)])))
        ids += part.tolist()
        rest, begins, cuts = rest[after:], False, cuts + 1
    assert cuts > 20 and ids == ours.encode(text, bos=False)


def test_json_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    needs.peer("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(TokenizerError, match=r"is no tokenizer\.json that the package") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- GGUF


def gguf_fields(json_file: Path, pre: str) -> StoredTokenizer:
    """Return a byte-level tokenizer.json as a GGUF file would keep it."""
    content = json.loads(json_file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {each["content"] for each in content["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return StoredTokenizer(
        "gguf",
        fields={
            "tokenizer.ggml.model": ((8,), "gpt2"),
            "tokenizer.ggml.pre": ((8,), pre),
            "tokenizer.ggml.tokens": ((9, 8), tokens),
            "tokenizer.ggml.token_type": ((9, 5), [3 if t in special else 1 for t in tokens]),
            "tokenizer.ggml.merges": ((9, 8), merges),
            "tokenizer.ggml.bos_token_id": ((4,), vocabulary["<s>"]),
            "tokenizer.ggml.eos_token_id": ((4,), vocabulary["</s>"]),
            "tokenizer.ggml.add_bos_token": ((7,), True),
        },
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_merges_of_gguf_give_the_ids_of_llama_cpp(
    json_file: Path, tmp_path: Path, pre: str
) -> None:
    needs.module("gguf")
    if json_file.parent.name.startswith("marks"):
        json_file = json_file.parent.parent / json_file.parent.name.replace("marks", "bytes")
        json_file = json_file / "tokenizer.json"
    stored = gguf_fields(json_file, pre)
    size = len(stored.fields["tokenizer.ggml.tokens"][1])
    model = Model.init(ModelConfig(32, 32, 1, 2, 2, size, 64))
    model.tokenizer = stored
    model.save(tmp_path / "m.gguf")
    ours = of_model(Model.load(tmp_path / "m.gguf"))
    assert ours is not None
    several = [t for t in texts(400) if "\0" not in t]
    if pre == "qwen2":  # llama.cpp leaves out that Qwen's own tokenizer composes characters
        several = [text for text in several if unicodedata.is_normalized("NFC", text)]
    found = llama_cpp.ask(tmp_path / "m.gguf", *({"text": text} for text in several))
    for text, ids in zip(several, found, strict=True):
        assert ours.encode(text) == ids, text
    assert Tokenizer.load(tmp_path / "m.gguf").encode("a b") == ours.encode("a b")


def test_pieces_of_gguf_give_the_ids_of_llama_cpp(tmp_path: Path) -> None:
    needs.module("gguf")
    path = needs.data("tokenizer.bin")
    model = Model.init(ModelConfig(32, 32, 1, 2, 2, 32000, 64))
    model.tokenizer = PieceTokenizer.read(path)
    model.save(tmp_path / "m.gguf")
    ours = of_model(Model.load(tmp_path / "m.gguf"))
    assert ours is not None
    several = [text for text in texts(1000) if "\0" not in text]
    found = llama_cpp.ask(tmp_path / "m.gguf", *({"text": text} for text in several))
    for text, ids in zip(several, found, strict=True):
        assert ours.encode(text) == ids, text


def test_smollm2_gives_the_ids_of_llama_cpp() -> None:
    needs.module("gguf")
    ours = Tokenizer.load(needs.smollm2())
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (None, 2, 49152)
    several = [text for text in texts(1000) if "\0" not in text]
    several += needs.data("tinyshakespeare.txt").read_text("utf-8").split("\n\n")[:300]
    found = llama_cpp.ask(needs.smollm2(), *({"text": text} for text in several if text))
    for text, ids in zip(filter(None, several), found, strict=True):
        assert ours.encode(text) == ids, text


def test_kinds_that_anepy_does_not_read_are_named() -> None:
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": ((8,), "bert"),
        "tokenizer.ggml.tokens": ((9, 8), ["a"]),
    }
    with pytest.raises(TokenizerError, match="of kind 'bert'"):
        of_stored(StoredTokenizer("gguf", fields=fields), "m.gguf")
    fields["tokenizer.ggml.model"] = ((8,), "gpt2")
    fields["tokenizer.ggml.pre"] = ((8,), "unheard")
    with pytest.raises(TokenizerError, match="cuts words as 'unheard'"):
        of_stored(StoredTokenizer("gguf", fields=fields), "m.gguf")


# ------------------------------------------------------------------- from one format to another


def converted(tokenizer: Any, size: int, folder: Path, *endings: str) -> Tokenizer:
    """Save a model with a tokenizer in one format after the other; return the last one's."""
    model = Model.init(ModelConfig(32, 32, 1, 2, 2, size, 64))
    model.tokenizer = tokenizer
    for number, ending in enumerate(endings):
        path = folder / f"{number}{ending}"
        model.save(path)
        model = Model.load(path)
    found = of_model(model)
    assert found is not None
    return found


CHATTY = {"chat_template": "{{ messages[0]['content'] }}", "eos_token": "</s>"}


@pytest.mark.parametrize("endings", [(".gguf",), (".gguf", ""), (".bin", ".gguf", "", ".gguf")])
def test_json_goes_through_other_formats(
    json_file: Path, tmp_path: Path, endings: tuple[str, ...]
) -> None:
    needs.module("gguf")
    original = JsonTokenizer(json_file.read_bytes(), "original", CHATTY)
    size = original.vocab_size + 3
    if json_file.parent.name.startswith("marks"):  # whose merges do not come from scores
        model = Model.init(ModelConfig(32, 32, 1, 2, 2, size, 64))
        model.tokenizer = original.stored
        with pytest.warns(UserWarning, match="gets no tokenizer.*not all merges"):
            model.save(tmp_path / "no.gguf")
        return
    found = converted(original.stored, size, tmp_path, *endings)
    assert (found.bos_id, found.eos_id) == (original.bos_id, original.eos_id)
    if ".bin" not in endings:  # beside which lies a tokenizer.json alone
        assert found.chat_template == CHATTY["chat_template"]
    several = [t for t in texts(400) if "\0" not in t]
    assert [found.encode(t) for t in several] == [original.encode(t) for t in several]
    answers = (
        llama_cpp.ask(tmp_path / "0.gguf", *({"text": t} for t in several[:200]))
        if (endings[0] == ".gguf")
        else []
    )
    assert answers == [original.encode(t) for t in several[: len(answers)]]


def test_trained_vocabulary_goes_to_llama_cpp_and_back(tmp_path: Path) -> None:
    needs.module("gguf")
    text = tmp_path / "text.txt"
    text.write_text("Once there was a cat. It's 12 o'clock, said the cat!\n\n" * 50, "utf-8")
    trained, content = train_tokenizer([text], 300, None, lambda count: None)
    stored = StoredTokenizer("huggingface", {"tokenizer.json": content})
    found = converted(stored, trained.vocab_size, tmp_path, ".gguf", "")
    several = ["It's the cat. 123  cats\n", "Grüße, 日本!", " a", "</s>", *texts(100)]
    several = [t for t in several if "\0" not in t]
    wanted = [trained.encode(t) for t in several]
    assert [found.encode(t) for t in several] == wanted
    assert llama_cpp.ask(tmp_path / "0.gguf", *({"text": t} for t in several)) == wanted
    assert (found.bos_id, found.eos_id) == (trained.bos_id, trained.eos_id)


@pytest.mark.parametrize("endings", [("",), (".gguf", ""), (".bin", ".gguf"), ("", ".gguf", "")])
def test_pieces_go_through_other_formats(tmp_path: Path, endings: tuple[str, ...]) -> None:
    needs.module("gguf")
    original = PieceTokenizer.read(needs.data("tokenizer.bin"))
    found = converted(original, 32000, tmp_path, *endings)
    several = [t for t in texts(300) if "\0" not in t]
    several += needs.data("tinyshakespeare.txt").read_text("utf-8").split("\n\n")[:100]
    assert (found.bos_id, found.eos_id) == (1, 2)
    for text in several:
        if "\u2581" not in text:  # means a blank elsewhere
            assert found.encode(text) == original.encode(text), text


def test_sentencepiece_goes_to_gguf(tmp_path: Path) -> None:
    needs.module("gguf")
    sentencepiece_model(tmp_path / "m.model")
    content = (tmp_path / "m.model").read_bytes()
    original = SentencePieceTokenizer(content, "original")
    stored = StoredTokenizer("huggingface", {"tokenizer.model": content})
    found = converted(stored, original.vocab_size, tmp_path, ".gguf")
    several = [t for t in texts(400) if "\0" not in t]
    assert [found.encode(t) for t in several] == [original.encode(t) for t in several]
    assert llama_cpp.ask(tmp_path / "0.gguf", *({"text": t} for t in several[:200])) == [
        original.encode(t) for t in several[:200]
    ]


# ------------------------------------------------------------------------------------- models


def test_model_of_a_folder_brings_its_tokenizer(json_file: Path, tmp_path: Path) -> None:
    needs.module("safetensors")
    size = Tokenizer.load(json_file).vocab_size
    model = Model.init(ModelConfig(32, 32, 1, 2, 2, size + 8, 64))
    model.tokenizer = Tokenizer.load(json_file).stored
    model.save(tmp_path / "model")
    again = Model.load(tmp_path / "model")
    found = resolve_tokenizer(None, again)
    assert found.encode("the cat </s>") == Tokenizer.load(json_file).encode("the cat </s>")
    assert Tokenizer.load(tmp_path / "model").encode("cat") == found.encode("cat")
    small = Model.init(ModelConfig(32, 32, 1, 2, 2, size - 1, 64))
    small.tokenizer = again.tokenizer
    with pytest.raises(TokenizerError, match=f"has {size} tokens, but the model's vocabulary has"):
        resolve_tokenizer(None, small)
