"""The body of POST /v1/responses, and the messages that its input stands for."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from furiosa_llm.server.errors import HttpError, invalid, unsupported
from furiosa_llm.server.sampling_fields import SamplingFields
from furiosa_llm.server.unsupported_fields import NO_REASONING, NO_TOOLS, NOT_HERE, Unsupported

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
INCLUDABLE = (LOGPROBS, ENCRYPTED_REASONING)
"""What `include` may ask for; of reasoning there is nothing to include, which is no error."""

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512

_STATELESS = "the server keeps no responses: leave it out and send the whole conversation as input"

UNSUPPORTED: Unsupported = {
    "store": ((False,), "the server keeps no responses: leave it out, or set it to false"),
    "previous_response_id": ((), _STATELESS),
    "conversation": ((), _STATELESS),
    "prompt": ((), "there are no stored prompts: send it as input"),
    "background": ((False,), "responses are made while the caller waits: leave it out"),
    "reasoning": (
        ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        NO_REASONING,
    ),
    "max_tool_calls": ((), NO_TOOLS),
    "context_management": (([],), NOT_HERE),
    "moderation": ((), NOT_HERE),
    "max_tokens": ((), "this endpoint calls it max_output_tokens"),
    "max_completion_tokens": ((), "this endpoint calls it max_output_tokens"),
    "messages": ((), "this endpoint calls it input"),
    "response_format": ((), "this endpoint calls it text.format"),
    "n": ((1,), "a response has one answer: send several requests"),
    "best_of": ((1,), "a response has one answer: send several requests"),
}

_WORDS_OF_ROLES = {
    "user": ("input_text", "text"),
    "system": ("input_text", "text"),
    "developer": ("input_text", "text"),
    "assistant": ("output_text", "input_text", "text"),
}
"""By role, the types that a part of text may have; the first is what the role's own are called."""


class InputPart(msgspec.Struct, kw_only=True):
    """A part of a message's content; only text is supported."""

    type: str
    """input_text, or output_text in an answer of the assistant."""
    text: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """An item of the conversation so far; only messages are supported."""

    type: str | None = None
    """message, or nothing."""
    role: str | None = None
    """user, assistant, system or developer."""
    content: str | list[InputPart] | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    """How the answer is written; only text is supported."""

    type: str


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True):
    include_obfuscation: bool | None = None
    """Accepted; events are never padded."""


class ResponsesRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/responses."""

    input: str | list[InputItem]
    """A user's message, or the conversation so far."""
    model: str | None = None
    """By default the one that is served."""
    instructions: str | None = None
    """Comes before the input, as a system message."""
    max_output_tokens: int | None = None
    """By default as many as fit."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[str] | None = None
    """message.output_text.logprobs asks for log-probabilities."""
    top_logprobs: int | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto: messages are dropped from the beginning where the conversation is too long."""
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None


def check(request: ResponsesRequest) -> None:
    """What the types alone do not say. Raises: HttpError (400)."""
    if request.stream_options is not None and not request.stream:
        raise invalid(
            "stream_options: it is given but stream is not true: set stream, or leave it out",
            "stream_options",
        )
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            raise unsupported(
                f"include[{index}]", f"{name[:80]!r} is not one of {', '.join(INCLUDABLE)}"
            )
    if request.top_logprobs and num_logprobs(request) is None:
        raise invalid(
            f"top_logprobs: it is {request.top_logprobs} but include does not name {LOGPROBS}: "
            f"add it there",
            "top_logprobs",
        )
    _check_text(request.text)
    _check_metadata(request.metadata)


def num_logprobs(request: ResponsesRequest) -> int | None:
    """How many log-probabilities a token gets besides its own; None: not even that."""
    return (request.top_logprobs or 0) if LOGPROBS in (request.include or ()) else None


def messages_of(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The chat that the request stands for. Raises: HttpError (400) naming the wrong item."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not request.input:
        raise invalid("input: the list is empty: give at least one message", "input")
    messages += [_message(f"input[{i}]", item) for i, item in enumerate(request.input)]
    return messages


def _message(where: str, item: InputItem) -> dict[str, Any]:
    if item.type not in (None, "message"):
        raise _unsupported_item(where, item.type)
    if item.role not in _WORDS_OF_ROLES:
        names = ", ".join(_WORDS_OF_ROLES)
        raise invalid(f"{where}.role: it is not one of {names}", f"{where}.role")
    if item.content is None:
        raise invalid(
            f"{where}.content: it is required", f"{where}.content",
            code="missing_required_parameter",
        )  # fmt: skip
    if isinstance(item.content, str):
        return {"role": item.role, "content": item.content}
    words = _WORDS_OF_ROLES[item.role]
    parts = [_text(f"{where}.content[{i}]", part, words) for i, part in enumerate(item.content)]
    return {"role": item.role, "content": "".join(parts)}


def _unsupported_item(where: str, kind: str) -> HttpError:
    if "call" in kind:  # function_call, function_call_output, web_search_call, …
        reason = "tools are not supported in this version: send messages only"
    elif kind == "item_reference":
        reason = "the server keeps no responses: send the item itself"
    else:
        reason = "only items of type message are supported: leave it out"
    return unsupported(f"{where}.type", f"{kind[:40]!r}: {reason}")


def _text(where: str, part: InputPart, words: tuple[str, ...]) -> str:
    if part.type not in words:
        raise unsupported(
            f"{where}.type", f"{part.type[:40]!r} is not supported: only {words[0]} is here"
        )
    if part.text is None:
        raise invalid(
            f"{where}.text: it is required", f"{where}.text", code="missing_required_parameter"
        )
    return part.text


def _check_text(text: TextOptions | None) -> None:
    if text is None:
        return
    if text.format is not None and text.format.type != "text":
        raise unsupported(
            "text.format",
            f"{text.format.type[:40]!r} is not supported in this version: only text is",
        )
    if text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity", NOT_HERE)


def _check_metadata(metadata: dict[str, str] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA:
        raise invalid(f"metadata: {len(metadata)} pairs are more than {MAX_METADATA}", "metadata")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise invalid(
                f"metadata: a key of {len(key)} characters is longer than {MAX_METADATA_KEY_CHARS}",
                "metadata",
            )
        if len(value) > MAX_METADATA_VALUE_CHARS:
            param = f"metadata.{key}"
            raise invalid(
                f"{param}: {len(value)} characters are more than {MAX_METADATA_VALUE_CHARS}", param
            )
