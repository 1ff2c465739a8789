"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and the chats they stand for."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from furiosa_llm.server.errors import HttpError, invalid, unsupported
from furiosa_llm.server.unsupported_fields import NO_REASONING, NO_TOOLS, NOT_HERE, Unsupported

UNSUPPORTED: Unsupported = {
    "tools": (([],), NO_TOOLS),
    "tool_choice": ((), NO_TOOLS),
    "thinking": (({"type": "disabled"},), NO_REASONING),
    "container": ((), NOT_HERE),
    "mcp_servers": (([],), NOT_HERE),
    "context_management": ((), NOT_HERE),
    "output_config": (({},), "the form of answers cannot be asked for: leave it out"),
    "output_format": ((), "the form of answers cannot be asked for: leave it out"),
    "speed": (("standard",), "there is one speed: leave it out"),
    "service_tier": (("auto", "standard_only"), "there is one tier: leave it out"),
    "stop": ((), "this endpoint calls it stop_sequences"),
    "n": ((1,), "a message has one answer: send several requests"),
    "max_completion_tokens": ((), "this endpoint calls it max_tokens"),
}

_TOOL_BLOCKS = ("tool_use", "tool_result", "server_tool_use")
_THINKING_BLOCKS = ("thinking", "redacted_thinking")


class ContentBlock(msgspec.Struct, kw_only=True):
    """A part of a message or of the system prompt; only text is supported.

    `cache_control` and `citations` are accepted and ask for nothing here.
    """

    type: str
    """text"""
    text: str | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    """A turn of the conversation."""

    role: Literal["user", "assistant"]
    """Turns of one role that follow each other are joined. If the last is the assistant's, the
    answer goes on with it."""
    content: str | list[ContentBlock]


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[InputMessage]
    system: str | list[ContentBlock] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    """Tokens of the answer at most; fewer where the model's context ends before."""
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    """Accepted, and not looked at."""


def chat_of(request: CountTokensRequest) -> tuple[list[dict[str, Any]], bool]:
    """The chat, and whether the answer goes on with its last message.

    Raises: HttpError (400) naming what is wrong.
    """
    chat: list[dict[str, Any]] = []
    if request.system is not None:
        chat.append({"role": "system", "content": _text("system", request.system)})
    if not request.messages:
        raise invalid("messages: the list is empty: give at least one message", "messages")
    last_role = ""
    for index, message in enumerate(request.messages):
        text = _text(f"messages[{index}].content", message.content)
        if message.role == last_role:
            chat[-1]["content"] += "\n" + text
        else:
            chat.append({"role": message.role, "content": text})
        last_role = message.role
    return chat, last_role == "assistant"


def _text(where: str, content: str | list[ContentBlock]) -> str:
    if isinstance(content, str):
        return content
    return "".join(_block_text(f"{where}[{i}]", block) for i, block in enumerate(content))


def _block_text(where: str, block: ContentBlock) -> str:
    if block.type != "text":
        raise _unsupported_block(where, block.type)
    if block.text is None:
        raise invalid(
            f"{where}.text: it is required", f"{where}.text", code="missing_required_parameter"
        )
    return block.text


def _unsupported_block(where: str, kind: str) -> HttpError:
    if kind in _TOOL_BLOCKS:
        reason = "tools are not supported in this version"
    elif kind in _THINKING_BLOCKS:
        reason = "thinking is not supported in this version"
    else:
        reason = "only blocks of type text are supported"
    return unsupported(f"{where}.type", f"{kind[:40]!r}: {reason}")
