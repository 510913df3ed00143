"""Byte-level BPE vocabularies trained on texts of one's own, by the package tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError, TokenizerError
from .documents import STDIN, opened
from .tokenizer_packages import JsonTokenizer, package

BOS, EOS = "<s>", "</s>"
SMALLEST = 256 + 2


def train_tokenizer(
    paths: Sequence[Path], size: int, separator: str | None, advance: Callable[[int], None]
) -> tuple[JsonTokenizer, bytes]:
    """Train a vocabulary: every byte, BOS, EOS, and the pairs that are most frequent.

    Words are cut as GPT-2 cuts them, so that none spans a blank.

    Args:
        paths: texts, read once more by whoever uses the tokenizer.
        size: tokens wanted; a small text may give fewer.
        separator: text between documents, which is none of the vocabulary's.
        advance: called with the bytes read.

    Returns:
        The tokenizer, and the content of its `tokenizer.json`.

    Raises:
        TokenizerError: the package is not installed, or the size is out of range.
        DataError: a text cannot be read, or not twice.
    """
    if size < SMALLEST:
        raise TokenizerError(
            f"a vocabulary of {size} tokens cannot hold all bytes, BOS and EOS; take {SMALLEST} or "
            "more"
        )
    library = package("tokenizers", "training a tokenizer")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    for path in paths:
        if str(path) == STDIN or not path.is_file():
            raise DataError(
                f"{path} can be read only once, and a tokenizer is trained before it is used; put "
                "the text into a file"
            )

    def texts() -> Iterator[str]:
        for path in paths:
            with opened(path, advance) as source:
                for part in source.parts(separator, None):
                    if part.line is None:
                        yield part.text
                    else:
                        yield from _strings(part.line)

    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    content = made.to_str().encode()
    return JsonTokenizer(content, "the trained tokenizer"), content


def _strings(value: object) -> Iterator[str]:
    """Yield the texts of an object of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
