"""Tokens counted in a server-sent event stream, at little cost.

Decoding each event's JSON would take longer than everything else that the client does for a token.
An event is therefore searched for a non-empty piece of text, which can be told by one pattern:
within a JSON string a quote is escaped, so `"text":"` never occurs in one. Only events with usage
or an error, of which there is one a stream, are decoded.
"""

from __future__ import annotations

import json
import re
from typing import Any

from furiosa_llm.loadgen.record import Record

# A piece of an answer that is not empty, in completions, chat, and their reasoning.
_TEXT = re.compile(rb'"(?:text|content|reasoning|reasoning_content)": ?"(?!")')
_USAGE = re.compile(rb'"usage": ?\{')
_ERROR = re.compile(rb'"error": ?[{"]')

MAX_EVENT_BYTES = 4 * 2**20


class EventStream:
    """Feeds what an event stream says of one answer into its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._pending = b""
        self.is_done = False  # the stream's own end has come, "[DONE]"

    def feed(self, received: bytes, now_s: float) -> None:
        """Take the next bytes, which came at `now_s`; they may end anywhere."""
        if self._pending:
            received = self._pending + received
        if b"\r" in received:
            received = received.replace(b"\r\n", b"\n")
        *events, self._pending = received.split(b"\n\n")
        if len(self._pending) > MAX_EVENT_BYTES:
            self._record.fail("bad stream", f"an event is longer than {MAX_EVENT_BYTES} bytes")
            self._pending = b""
        for event in events:
            if _TEXT.search(event):
                self._record.token_s.append(now_s)
            if b'"usage"' in event and _USAGE.search(event):
                self._count(event)
            elif b'"error"' in event and _ERROR.search(event):
                self._fail(event)
            elif event.endswith(b"[DONE]"):
                self.is_done = True

    def _count(self, event: bytes) -> None:
        answer = _decode(event)
        if answer is not None:
            note_usage(self._record, answer)

    def _fail(self, event: bytes) -> None:
        answer = _decode(event)
        # Without one that is an object, the word stood in the answer's text.
        if answer is not None and answer.get("error"):
            self._record.fail("stream error", error_text(answer))


def _decode(event: bytes) -> dict[str, Any] | None:
    """The JSON object that the event's data lines hold, or None."""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    try:
        answer = json.loads(b"\n".join(lines))
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def note_usage(record: Record, answer: dict[str, Any]) -> None:
    """Put the token counts of an answer or chunk into the record."""
    usage = answer.get("usage")
    if isinstance(usage, dict):
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        record.num_prompt_tokens = prompt if isinstance(prompt, int) else None
        record.num_counted_tokens = completion if isinstance(completion, int) else None


def error_text(answer: dict[str, Any]) -> str:
    """What an error body says."""
    error = answer.get("error", answer)
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error)
