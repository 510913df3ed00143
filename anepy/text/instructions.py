"""Instructions: lines of JSON as token ids, and which of these are to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, TokenizerError
from .chat import render
from .tokenizer import Tokenizer

Mask = npt.NDArray[np.uint8]


def encode_line(
    tokenizer: Tokenizer, line: dict[str, Any], where: str, mask_prompt: bool
) -> tuple[list[int], Mask]:
    """Encode a line with `messages`, or with `prompt` and `completion`.

    Messages go through the chat template. Strings of `prompt` and `completion` are joined as they
    are, between BOS and EOS; lists of messages there are one conversation.

    Args:
        tokenizer: with a chat template if there are messages.
        line: the object.
        where: file and line, for messages.
        mask_prompt: count the answers of the assistant only, of several turns each one.

    Returns:
        The ids, and for each of them 1 if it counts as a target; the first one never does.

    Raises:
        DataError: the line is malformed, or the template refuses it.
        TokenizerError: there is no template, or jinja2 is not installed.
    """
    if "messages" in line:
        ids, mask = _conversation(tokenizer, line["messages"], where, mask_prompt)
    else:
        prompt, completion = line["prompt"], line["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            ids, mask = _conversation(tokenizer, prompt + completion, where, mask_prompt)
        elif isinstance(prompt, str) and isinstance(completion, str):
            ids = tokenizer.encode(prompt + completion, eos=True)
            before = tokenizer.encode(prompt) if mask_prompt else []
            mask = np.ones(len(ids), np.uint8)
            mask[: _common(ids, before)] = 0
        else:
            raise DataError(
                f"{where}: prompt and completion are not both strings or both lists of messages; "
                "repair or remove it"
            )
    if len(ids) < 2:
        raise DataError(f"{where}: there is nothing to learn in it; repair or remove it")
    mask[0] = 0
    return ids, mask


def _conversation(
    tokenizer: Tokenizer, messages: Any, where: str, mask_prompt: bool
) -> tuple[list[int], Mask]:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f"{where}: messages is no list of objects with role and content; repair or remove it"
        )
    try:
        text = render(tokenizer, messages, answer=False)
        ids = tokenizer.encode(text, bos=False, special=True)
        mask = np.full(len(ids), 0 if mask_prompt else 1, np.uint8)
        if mask_prompt:
            for begin, end in _answers(tokenizer, messages, text, where):
                first, last = (
                    _common(ids, tokenizer.encode(text[:at], bos=False, special=True))
                    for at in (begin, end)
                )
                mask[first:last] = 1
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    except TokenizerError as error:
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{where} holds messages, and {tokenizer.name} has no chat template; take the "
                "tokenizer of a model that was made for conversations"
            ) from None
        raise error
    return ids, mask


def _answers(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], text: str, where: str
) -> list[tuple[int, int]]:
    """Return where the answers of the assistant are in the text of a conversation."""
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], answer=True)
        after = render(tokenizer, messages[: i + 1], answer=False)
        if not (text.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{where}: the chat template writes earlier turns otherwise once others follow, so "
                "answers cannot be told from prompts; use one answer a line, or leave "
                "--mask-prompt out"
            )
        # Line ends behind the token that ends the turn are no answer.
        found.append((len(before), len(after.rstrip())))
    return found


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
    )


def _common(ids: Sequence[int], begin: Sequence[int]) -> int:
    """Return how many ids two lists begin with alike."""
    for at, (one, other) in enumerate(zip(ids, begin, strict=False)):
        if one != other:
            return at
    return min(len(ids), len(begin))
