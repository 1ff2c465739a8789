"""What POST /v1/responses answers: the response object, and the events of a stream.

The order of events, which clients rely on: response.created, response.in_progress,
response.output_item.added, response.content_part.added, response.output_text.delta (any number),
response.output_text.done, response.content_part.done, response.output_item.done, and at last
response.completed, response.incomplete or response.failed. Each has the next sequence_number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from furiosa_llm.server.chunks import PING, FormatLogprobs, encode
from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.logprobs import ChatLogprobs, TokenLogprob
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.usage import Usage


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """How many tokens a response took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """The answer's text."""

    text: str
    annotations: list[str] = []
    """Always empty."""
    logprobs: list[TokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """The answer."""

    id: str
    status: str
    """in_progress, completed or incomplete."""
    content: list[OutputText]
    role: str = "assistant"


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response ended early."""

    reason: str
    """max_output_tokens."""


class PlainText(msgspec.Struct, tag_field="type", tag="text"):
    pass


class ResponseText(msgspec.Struct):
    format: PlainText
    verbosity: str = "medium"


class ResponseReasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, whole or so far."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str = "in_progress"
    """in_progress, completed, incomplete or failed."""
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning = msgspec.field(default_factory=ResponseReasoning)
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool = False
    """Always false: the server keeps no responses."""
    temperature: float
    text: ResponseText = msgspec.field(default_factory=lambda: ResponseText(PlainText()))
    tool_choice: str = "auto"
    tools: list[str] = []
    """Always empty."""
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class Answer:
    """The one answer of a response, as it grows."""

    def __init__(self, item_id: str, logprobs: FormatLogprobs | None) -> None:
        self.item_id = item_id
        self.finish_reason: str | None = None
        self._format = logprobs
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, delta: Delta) -> tuple[str, list[TokenLogprob]]:
        """Take what is new. Returns: that, as text and as log-probabilities if asked for."""
        text, logprobs = delta.text, []
        self._pieces.append(text)
        if self._format is not None:
            formatted = self._format(delta)
            assert isinstance(formatted, ChatLogprobs)
            logprobs = formatted.content
            self._logprobs += logprobs
        self.finish_reason = delta.finish_reason
        return text, logprobs

    @property
    def part(self) -> OutputText:
        return OutputText(self.text, logprobs=self._logprobs)

    def message(self, status: str) -> OutputMessage:
        return OutputMessage(self.item_id, status, [self.part])


def ended(response: ResponseObject, answer: Answer, usage: Usage) -> None:
    """Make `response` what it is at its end."""
    is_cut = answer.finish_reason == "length"
    response.status = "incomplete" if is_cut else "completed"
    if is_cut:
        response.incomplete_details = IncompleteDetails("max_output_tokens")
    else:
        response.completed_at = int(time.time())
    response.output = [answer.message(response.status)]
    response.usage = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=usage.total_tokens,
    )


class ResponseEvents:
    """Writes the events of one stream (see `furiosa_llm.server.sse.StreamWriter`)."""

    ping = PING

    def __init__(
        self, response: ResponseObject, answer: Answer, usage: Callable[[], Usage]
    ) -> None:
        self._response = response
        self._answer = answer
        self._usage = usage
        self._next_number = 0
        place = {"item_id": answer.item_id, "output_index": 0, "content_index": 0}
        self._place = place
        kind = "response.output_text.delta"
        # A delta's event is its number and its text between bytes that never change.
        self._delta_head = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":'.encode()
        self._delta_middle = b"," + encode(place)[1:-1] + b',"delta":'

    def opening(self) -> bytes:
        """What comes before all text."""
        item = OutputMessage(self._answer.item_id, "in_progress", [])
        return b"".join(
            (
                self._event("response.created", response=self._response),
                self._event("response.in_progress", response=self._response),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=OutputText("")),
            )
        )

    def delta(self, delta: Delta) -> bytes:
        """The event of what is new; none while a text is held back."""
        text, logprobs = self._answer.add(delta)
        if not text and not logprobs:
            return b""
        number = self._take_number()
        parts = (self._delta_head, b"%d" % number, self._delta_middle, encode(text))
        return b"".join((*parts, b',"logprobs":', encode(logprobs), b"}\n\n"))

    def closing(self, usage: Usage | None) -> bytes:
        """What comes after all text."""
        answer, response = self._answer, self._response
        ended(response, answer, self._usage())
        part = answer.part
        return b"".join(
            (
                self._event(
                    "response.output_text.done",
                    **self._place, text=part.text, logprobs=part.logprobs,
                ),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=response.output[0]),
                self._event(f"response.{response.status}", response=response),
            )
        )  # fmt: skip

    def error(self, error: HttpError, request_id: str) -> bytes:
        """The last event of a stream that failed; the answer so far is in it."""
        response, answer = self._response, self._answer
        response.status = "failed"
        response.output = [answer.message("incomplete")]
        # The codes that clients know are few; what is not the caller's fault is server_error.
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        message = error.content(request_id)["message"]
        response.error = ResponseError(code, f"{message} (request {request_id})")
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = encode({"type": kind, "sequence_number": self._take_number(), **fields})
        return b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"

    def _take_number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number
