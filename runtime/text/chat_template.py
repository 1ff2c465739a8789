"""Chat templates: messages to prompt text, as transformers renders them, in a sandbox.

A template comes from the model's files or its operator. The sandbox keeps it from Python's
internals and from changing what it is given, and its output is bounded; its running time is not,
so that a template sent by an unknown caller must not be rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from furiosa_llm.errors import InvalidRequestError

MAX_RENDERED_CHARS = 8 << 20
MAX_NUM_MESSAGES = 4096

# Marks where the last message ends in a rendered chat. The space at its end tells whether the
# template trims its messages.
_END_MARK = "END-OF-THE-MESSAGE-TO-CONTINUE "

Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a chat; it holds the special tokens, so encode it without adding any.

    Args:
        template: Jinja source.
        messages: dicts with a `role` and usually a `content`: a string, or parts
            `{"type": "text", "text": …}`, which are joined. Other keys reach the template as given.
        add_generation_prompt: end with the header of the answer.
        continue_final_message: end inside the last message, so that the model goes on with it.
        tools: JSON schemas of functions that the model may call.
        variables: more names for the template to see, such as `bos_token`.
    Raises: InvalidRequestError if the messages are malformed, the two flags are both set, or the
        template refuses the messages, is faulty or writes more than MAX_RENDERED_CHARS.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: the first goes "
            "on with the last message, the second begins a new one",
            param="continue_final_message",
        )
    chat = [_plain_message(index, message) for index, message in enumerate(_listed(messages))]
    final = _mark_final_message(chat) if continue_final_message else ""
    names = {
        **(variables or {}),
        "messages": chat,
        "tools": None if tools is None else _plain(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    rendered = _render(_compile(template), names)
    return _cut_at_mark(rendered, final) if continue_final_message else rendered


# --- messages ------------------------------------------------------------------------------------


def _listed(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages is {type(messages).__name__}, not a list of dicts with role and content",
            param="messages",
        )
    if not 0 < len(messages) <= MAX_NUM_MESSAGES:
        raise InvalidRequestError(
            f"there are {len(messages)} messages; from 1 to {MAX_NUM_MESSAGES} are allowed",
            param="messages",
        )
    return messages


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    """A copy of one message; keys without a value are left out, since templates test for keys."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"message {index} is {type(message).__name__}, not a dict with role and content",
            param="messages",
        )
    plain = {str(key): _plain(value) for key, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InvalidRequestError(f"message {index} has no role", param="messages")
    if "content" in plain:
        plain["content"] = _joined(index, plain["content"])
    elif "tool_calls" not in plain:
        raise InvalidRequestError(f"message {index} has no content", param="messages")
    return plain


def _joined(index: int, content: Any) -> str:
    """A message's content as one string."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise InvalidRequestError(
                    f"message {index} has a part of type {kind[:40]!r}; only text is supported",
                    param="messages",
                )
            case _:
                raise InvalidRequestError(
                    f"the content of message {index} is neither a string nor a list of "
                    'parts {"type": "text", "text": "…"}',
                    param="messages",
                )
    return "".join(texts)


def _plain(value: Any, *, depth: int = 0) -> Any:
    """`value` rebuilt of JSON's types, so that a template never meets an object with methods."""
    if depth > 64:
        raise InvalidRequestError("messages or tools are nested too deeply", param="messages")
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(key): _plain(item, depth=depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, depth=depth + 1) for item in value]
    raise InvalidRequestError(
        f"a message or tool holds a {type(value).__name__}; only what JSON can hold is allowed",
        param="messages",
    )


# --- continuing the last message -----------------------------------------------------------------


def _mark_final_message(chat: list[dict[str, Any]]) -> str:
    """Put the mark behind the last message. Returns: that message's text without it."""
    final = chat[-1].get("content")
    if final is None:
        raise InvalidRequestError(
            "continue_final_message is set but the last message has no content to go on with",
            param="continue_final_message",
        )
    chat[-1]["content"] = final + _END_MARK
    assert isinstance(final, str)
    return final


def _cut_at_mark(rendered: str, final: str) -> str:
    """The chat up to the end of its last message, whose own trailing space survives if it may."""
    end = rendered.rfind(_END_MARK.strip())
    if end < 0 or final.strip() not in rendered:
        raise InvalidRequestError(
            "continue_final_message is set but the chat template leaves out or alters the last "
            "message, so that there is nothing to go on with",
            param="continue_final_message",
        )
    is_trimmed = rendered[end : end + len(_END_MARK)] != _END_MARK
    return rendered[:end].rstrip() if is_trimmed else rendered[:end]


# --- rendering -----------------------------------------------------------------------------------


def _render(template: Template, names: Mapping[str, Any]) -> str:
    pieces, num_chars = [], 0
    try:
        for piece in template.generate(names):
            num_chars += len(piece)
            if num_chars > MAX_RENDERED_CHARS:
                raise InvalidRequestError(
                    f"the chat takes more than {MAX_RENDERED_CHARS} characters", param="messages"
                )
            pieces.append(piece)
    except InvalidRequestError:
        raise
    except TemplateError as error:  # raise_exception(…) among them: the template's own words
        raise InvalidRequestError(
            f"the chat template refuses: {error}", param="messages"
        ) from error
    except Exception as error:  # a template is a program; whatever it does wrong ends here
        raise InvalidRequestError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}",
            param="messages",
        ) from error
    return "".join(pieces)


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    try:
        return _environment().from_string(source)
    except (TemplateError, RecursionError) as error:
        raise InvalidRequestError(
            f"the chat template is faulty: {error}", param="chat_template"
        ) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes what HTML would trip over."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
