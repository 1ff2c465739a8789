"""What POST /v1/messages answers: the message, and the events of a stream.

The order of events: message_start, content_block_start, ping, content_block_delta (any number),
content_block_stop, message_delta (with the stop reason and the usage), message_stop; a ping may
stand anywhere between. A stream that fails ends by an error event instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from furiosa_llm.server.anthropic_errors import anthropic_error
from furiosa_llm.server.chunks import encode
from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.usage import Usage


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class MessageUsage(msgspec.Struct):
    """How many tokens a message took: the input's is the sum of the first three."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, tag_field="type", tag="message", kw_only=True):
    """The answer."""

    id: str
    role: str = "assistant"
    model: str
    content: list[TextBlock]
    stop_reason: str | None = None
    """end_turn, max_tokens, stop_sequence, or model_context_window_exceeded."""
    stop_sequence: str | None = None
    """The one that was met."""
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class Stop:
    """Why the answer ends.

    Args:
        at_context: whether `max_tokens` was lowered to what the context has room for, so that to
            reach it is to reach the context's end.
    """

    def __init__(self, *, at_context: bool) -> None:
        self._at_context = at_context
        self.reason: str | None = None
        self.sequence: str | None = None

    def note(self, delta: Delta) -> None:
        """Look at what is new."""
        if delta.finish_reason == "length":
            self.reason = "model_context_window_exceeded" if self._at_context else "max_tokens"
        elif delta.finish_reason is not None:
            self.sequence = delta.stop_reason
            self.reason = "end_turn" if self.sequence is None else "stop_sequence"


def message_usage(usage: Usage) -> MessageUsage:
    """OpenAI's counts as Anthropic's, which do not count cached tokens twice."""
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )


class MessageEvents:
    """Writes the events of one stream (see `furiosa_llm.server.sse.StreamWriter`)."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    _DELTA_HEAD = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
    )

    def __init__(self, message_id: str, model: str, stop: Stop, usage: Callable[[], Usage]) -> None:
        self._id = message_id
        self._model = model
        self._stop = stop
        self._usage = usage

    def opening(self) -> bytes:
        """What comes before all text."""
        message = Message(
            id=self._id, model=self._model, content=[], usage=message_usage(self._usage())
        )
        return (
            _event("message_start", message=message)
            + _event("content_block_start", index=0, content_block=TextBlock(""))
            + self.ping
        )

    def delta(self, delta: Delta) -> bytes:
        """The event of what is new; none while a text is held back."""
        self._stop.note(delta)
        text = delta.text
        return self._DELTA_HEAD + encode(text) + b"}}\n\n" if text else b""

    def closing(self, usage: Usage | None) -> bytes:
        """What comes after all text."""
        stop = {"stop_reason": self._stop.reason, "stop_sequence": self._stop.sequence}
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta=stop, usage=message_usage(self._usage()))
            + _event("message_stop")
        )

    def error(self, error: HttpError, request_id: str) -> bytes:
        """The last event of a stream that failed."""
        return b"event: error\ndata: " + anthropic_error(error, request_id) + b"\n\n"


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"
