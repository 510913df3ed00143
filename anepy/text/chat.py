"""Conversations as text: the chat template of a model, run in jinja2's sandbox (extra `chat`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import ConfigError, TokenizerError
from .tokenizer import Tokenizer

Message = Mapping[str, Any]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], answer: bool = True
) -> list[int]:
    """Return the ids of a conversation, special tokens taken for what they are.

    Args:
        tokenizer: with a chat template.
        messages: each with `role` and `content`.
        answer: end where the model is to answer.

    Raises:
        TokenizerError: there is no template, or jinja2 is not installed.
        ConfigError: the template refuses the conversation.
    """
    return tokenizer.encode(render(tokenizer, messages, answer), bos=False, special=True)


def render(tokenizer: Tokenizer, messages: Sequence[Message], answer: bool) -> str:
    """Return the text that the chat template makes of a conversation.

    Arguments and errors are those of `encode_chat`.
    """
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"{tokenizer.name} has no chat template; take a model that was made for conversations,"
            " or leave --chat out"
        )
    try:
        import jinja2
    except ImportError:
        raise TokenizerError(
            "chat templates need the package jinja2; pip install 'anepy[chat]'"
        ) from None
    try:
        template = _compiled(tokenizer.chat_template)
        text: str = template.render(
            messages=list(messages),
            add_generation_prompt=answer,
            tools=None,
            documents=None,
            **tokenizer.template_words(),
        )
        return text
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the chat template of {tokenizer.name} fails: {reason}") from None


_TEMPLATES: dict[str, Any] = {}


def _compiled(source: str) -> Any:
    """Return a template with the tags, filters and functions that transformers gives them."""
    known = _TEMPLATES.get(source)
    if known is not None:
        return known
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}`, which marks answers and adds nothing to the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # Nothing of Python is within reach of a template, and it can change nothing it is given.
    room = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    room.filters["tojson"] = as_json
    room.globals["raise_exception"] = refuse
    room.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled = _TEMPLATES[source] = room.from_string(source)
    return compiled
