"""Chat templates: the Jinja program that a model ships to turn messages into a prompt.

Templates come with checkpoints, from strangers: they run in Jinja's immutable sandbox and see only plain data.
Settings, filters and globals are those of Hugging Face transformers, so that the same template gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

__all__ = ["ChatTemplateError", "render_chat"]


class ChatTemplateError(ValueError):
    """The template is malformed, refused the messages, or did something that the sandbox forbids."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Args:
        template: Jinja source.
        messages: each with "role" and "content" (and what else the template reads).
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: further names the template sees: bos_token, eos_token, tools, ...
    Raises:
        ChatTemplateError: see the class.
    """
    import jinja2

    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"chat messages must be dicts with 'role' and 'content', got {message!r}")
    names = {"tools": None, "documents": None, **variables}
    try:
        return _compile(template).render(
            messages=_plain(list(messages)),
            add_generation_prompt=bool(add_generation_prompt),
            **{key: _plain(value) for key, value in names.items()},
        )
    except jinja2.exceptions.TemplateError as error:
        raise ChatTemplateError(f"the chat template failed: {error}") from error
    except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """A copy made of JSON types only: methods of richer objects are ways out of a sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise ValueError(f"chat messages may hold only strings, numbers, lists and dicts, got {type(value).__name__}")


@lru_cache(maxsize=16)
def _compile(template: str):
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's tokens for training; here it prints its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own convention)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML characters, which a prompt must not.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
