"""The chunks of a stream, as bytes.

A token's chunk is its text between bytes that are the same for all chunks of its choice; only the
text is encoded anew. That is what lets one core write tens of thousands of chunks a second.

The order, which clients rely on: per choice a first chunk (a chat's role), chunks with text and
`finish_reason` null, one without text that has the reason; then the usage, if it was asked for, and
[DONE].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.usage import Usage

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

FormatLogprobs = Callable[[Delta], msgspec.Struct | None]


@dataclass(frozen=True, slots=True)
class Shape:
    """How one endpoint's chunks differ from another's."""

    object: str
    """Of a chunk."""
    before_text: bytes
    after_text: bytes
    without_text: bytes
    first: bytes | None
    """The content of a choice's first chunk, before any text."""


CHAT = Shape(
    object="chat.completion.chunk",
    before_text=b'"delta":{"content":',
    after_text=b"}",
    without_text=b'"delta":{}',
    first=b'"delta":{"role":"assistant","content":""}',
)
COMPLETION = Shape(
    object="text_completion",
    before_text=b'"text":',
    after_text=b"",
    without_text=b'"text":""',
    first=None,
)


class ChunkWriter:
    """Writes the chunks of one stream.

    Args:
        reply: the fields that all chunks share: id, object, created, model, system_fingerprint.
        num_choices: of the whole stream.
        logprobs: what a delta's are, None if they were not asked for.
        has_token_ids: chunks carry their token ids.
        has_usage: chunks before the one with the usage say that theirs is null.
        running_usage: chunks carry the usage so far instead.
    """

    ping = PING

    def __init__(
        self,
        shape: Shape,
        reply: dict[str, object],
        num_choices: int,
        *,
        logprobs: FormatLogprobs | None = None,
        has_token_ids: bool = False,
        has_usage: bool = False,
        running_usage: Callable[[], Usage] | None = None,
    ) -> None:
        self._shape = shape
        self._head = b"data: " + encode(reply)[:-1] + b',"choices":['
        self._choice_heads = [self._head + b'{"index":%d,' % i for i in range(num_choices)]
        self._text_heads = [head + shape.before_text for head in self._choice_heads]
        self._end = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"
        self._text_end = shape.after_text + b',"logprobs":null,"finish_reason":null}' + self._end
        self._logprobs = logprobs
        self._has_token_ids = has_token_ids
        self._running_usage = running_usage
        self._is_plain = logprobs is None and not has_token_ids and running_usage is None

    def opening(self, choice: int, *, text: str = "", extra: bytes = b"") -> bytes:
        """A choice's first chunk, where its shape has one or there is `text` to begin with.

        Args:
            text: comes before all deltas, such as an echoed prompt.
            extra: more fields of the choice, each with a comma in front.
        """
        first = self._shape.first
        if first is None and not text and not extra:
            return b""
        content = (
            self._shape.before_text + encode(text) + self._shape.after_text
            if first is None
            else first
        )
        return self._chunk(choice, content, b"null", b"null", extra)

    def delta(self, delta: Delta) -> bytes:
        """The chunks of what is new of a choice."""
        text = delta.text
        if not self._is_plain:
            chunk = self._full_delta(delta, text)
        elif text:
            chunk = self._text_heads[delta.choice] + encode(text) + self._text_end
        else:
            chunk = b""  # its text is held back: half a character, or the start of a stop string
        if delta.finish_reason is None:
            return chunk
        reason = encode(delta.finish_reason)
        return chunk + self._chunk(delta.choice, self._shape.without_text, b"null", reason)

    def closing(self, usage: Usage | None) -> bytes:
        """What comes after all choices have ended."""
        if usage is None:
            return DONE
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n" + DONE

    def error(self, error: HttpError, request_id: str) -> bytes:
        """The last chunk of a stream that failed; nothing comes after it."""
        return b"data: " + error.body(request_id) + b"\n\n"

    def _full_delta(self, delta: Delta, text: str) -> bytes:
        logprobs = None if self._logprobs is None else self._logprobs(delta)
        token_ids = b',"token_ids":' + encode(delta.token_ids) if self._has_token_ids else b""
        if not text and logprobs is None and not token_ids:
            return b""
        content = self._shape.before_text + encode(text) + self._shape.after_text
        return self._chunk(delta.choice, content, encode(logprobs), b"null", token_ids)

    def _chunk(
        self, choice: int, content: bytes, logprobs: bytes, reason: bytes, extra: bytes = b""
    ) -> bytes:
        end = self._end
        if self._running_usage is not None:
            end = b'],"usage":' + encode(self._running_usage()) + b"}\n\n"
        fields = (content, b',"logprobs":', logprobs, b',"finish_reason":', reason, extra, b"}")
        return b"".join((self._choice_heads[choice], *fields, end))
