"""Public models, tokenizers and data that anepy knows by name: where they are, what they must be.

Addresses name a commit, so that what is behind them stays the same. Sizes and hashes are those that
the Hugging Face Hub shows for its files; where one is None, nobody could be asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass

HUB = "https://huggingface.co"
_GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Source:
    """A file of the public network.

    Attributes:
        name: of the file here.
        base: address that `ANEPY_MIRROR` replaces.
        path: the rest of the address.
        size: bytes; None if not known to the byte.
        sha256: of the contents; None if not known.
        told: the hash was told by the server, not pinned in anepy.
        about: bytes, roughly, where `size` is None.
        member: name of the one file in it that is wanted, if it is a tar archive.
        member_size: bytes of that.
    """

    name: str
    base: str
    path: str
    size: int | None
    sha256: str | None
    told: bool = False
    about: int = 0
    member: str = ""
    member_size: int = 0


@dataclass(frozen=True)
class Item:
    """Something with a name that can be fetched.

    Attributes:
        name: as typed.
        kind: "model", "tokenizer" or "data".
        licence: as its publisher states it.
        purpose: what it is for, in a few words.
        files: what it consists of.
        folder: folder that will hold the files; "" puts them where they are wanted.
    """

    name: str
    kind: str
    licence: str
    purpose: str
    files: tuple[Source, ...]
    folder: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to be transferred, roughly where nobody knows them exactly."""
        return sum(file.size if file.size is not None else file.about for file in self.files)


def hub_path(repository: str, revision: str, name: str) -> str:
    """Return the path of a file of a repository on the Hugging Face Hub."""
    return f"{repository}/resolve/{revision}/{name}"


def _hub(
    repository: str, revision: str, name: str, size: int | None, sha256: str | None, about: int = 0
) -> Source:
    path = hub_path(repository, revision, name)
    return Source(name.rpartition("/")[2], HUB, path, size, sha256, about=about)


_TINYLLAMAS = ("karpathy/tinyllamas", "0bd21da7698eaf29a0d7de3992de8a46ef624add")
_TINYSTORIES = ("datasets/roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64")
_TOKENIZED = ("datasets/enio/TinyStories", "f516edba3f2e734fe306ab116df384d6a6fc817e")
_SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2")
_TINYLLAMA = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "fe8a4ea1ffedaf415f4da2f062534de366a451e6")

_TOK512 = _hub(
    *_TINYLLAMAS,
    "stories260K/tok512.bin",
    6_227,
    "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
)
_TOKENIZER = Source(
    "tokenizer.bin",
    _GITHUB,
    "karpathy/llama2.c/350e04fe35433e6d2941dce5a1f53308f87058eb/tokenizer.bin",
    433_869,
    "50a52ef822ee9e83de5ce9d0be0a025a773d019437f58b5ff9dcafb063ece361",
)


def _stories(name: str, size: int, sha256: str, tokenizer: Source, purpose: str) -> Item:
    path = f"{name}/{name}.bin" if name == "stories260K" else f"{name}.bin"
    model = _hub(*_TINYLLAMAS, path, size, sha256)
    return Item(name, "model", "MIT", purpose, (model, tokenizer))


ITEMS = (
    _stories(
        "stories260K",
        1_056_540,
        "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        _TOK512,
        "the smallest that tells stories",
    ),
    _stories(
        "stories15M",
        60_816_028,
        "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
        _TOKENIZER,
        "stories in good English",
    ),
    _stories(
        "stories42M",
        167_020_572,
        "9f65a1000e17d0bc167dd6332e0ce5119a0222a3d920cead5bce413bfab2ee7b",
        _TOKENIZER,
        "better stories",
    ),
    _stories(
        "stories110M",
        438_381_596,
        "515267168726a1ed1317a64a408492e6af3b67c1f71c5bd98c01d9d721803a24",
        _TOKENIZER,
        "the model of the benchmarks",
    ),
    Item("tok512", "tokenizer", "MIT", "tokenizer of stories260K", (_TOK512,)),
    Item(
        "tokenizer",
        "tokenizer",
        "MIT; Llama 2",
        "Llama 2's, of stories15M to 110M",
        (_TOKENIZER,),
    ),
    Item(
        "tinystories",
        "data",
        "CDLA-Sharing-1.0",
        "2.7 million stories, as text",
        (
            _hub(
                *_TINYSTORIES,
                "TinyStoriesV2-GPT4-train.txt",
                2_227_753_162,
                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
        ),
    ),
    Item(
        "tinystories-valid",
        "data",
        "CDLA-Sharing-1.0",
        "a hundredth of that, to begin with",
        (
            _hub(
                *_TINYSTORIES,
                "TinyStoriesV2-GPT4-valid.txt",
                22_502_601,
                "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
            ),
        ),
    ),
    Item(
        "tinystories-tokens",
        "data",
        "MIT",
        "20.7 million tokens, by Llama 2's",
        (
            Source(
                "tinystories_data00.bin",
                HUB,
                hub_path(*_TOKENIZED, "tok32000/TinyStories_tok32000.tar.gz"),
                None,
                None,
                about=993_000_000,
                member="data00.bin",
                member_size=41_317_962,
            ),
        ),
    ),
    Item(
        "smollm2-135m",
        "model",
        "Apache-2.0",
        "small general model, to adapt",
        (
            _hub(
                *_SMOLLM2,
                "config.json",
                704,
                "1d556eab73b69c7f11f64c557a2f9c6f440bd4c6b89bb2584a6b498c92603843",
            ),
            _hub(
                *_SMOLLM2,
                "tokenizer.json",
                None,
                "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
                about=2_100_000,
            ),
            _hub(
                *_SMOLLM2,
                "tokenizer_config.json",
                None,
                "4bb9af56a342753d39374f4016a16574cab299fe088e896f425ce3c433f61424",
                about=3_660,
            ),
            _hub(
                *_SMOLLM2,
                "special_tokens_map.json",
                831,
                "e786b595b9a23148bf1630df78d9037a048ea671e48bfd3549a1e3c233742bb3",
            ),
            _hub(
                *_SMOLLM2,
                "model.safetensors",
                269_060_552,
                "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
            ),
        ),
        folder="SmolLM2-135M",
    ),
    Item(
        "tinyllama",
        "model",
        "Apache-2.0",
        "1.1 billion parameters, for LoRA",
        (
            _hub(
                *_TINYLLAMA,
                "config.json",
                608,
                "486bedda3a6988332e60d9638a09ca4b260d34ebcf1b19e22cf3b140b63d8fe9",
            ),
            _hub(
                *_TINYLLAMA,
                "generation_config.json",
                124,
                "18046d04f5bd8b4998095ecabdd17a1bf0053d9acdccead4a05be4a3575f3c5c",
            ),
            _hub(
                *_TINYLLAMA,
                "special_tokens_map.json",
                551,
                "82d96d7a9e6ced037f12394b7ea6a5b02e6ca87e0d11edaa8d60d9be857ce7db",
            ),
            _hub(
                *_TINYLLAMA,
                "tokenizer.json",
                1_842_767,
                "bcd04f0eadf90287bd26e1a183ac487d8a141b09b06aecb7725bbdd343640f2e",
            ),
            _hub(
                *_TINYLLAMA,
                "tokenizer.model",
                499_723,
                "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
            ),
            _hub(
                *_TINYLLAMA,
                "tokenizer_config.json",
                1_289,
                "7b41ba7d0eb91e77914ca3dafde559ea3e19878769b7e68409e89bed5222e77a",
            ),
            _hub(
                *_TINYLLAMA,
                "model.safetensors",
                2_200_119_864,
                "6e6001da2106d4757498752a021df6c2bdc332c650aae4bae6b0c004dcf14933",
            ),
        ),
        folder="TinyLlama-1.1B-Chat-v1.0",
    ),
)


def find(name: str) -> Item | None:
    """Return what has this name, or brings a file or folder of this name first of all."""
    for item in ITEMS:
        if name == item.name:
            return item
    for item in ITEMS:
        if name == (item.folder or item.files[0].name):
            return item
    return None
