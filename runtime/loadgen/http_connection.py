"""One client connection: a request goes out, its answer is timed as it comes in.

An HTTP client library costs 50 to 200 µs of processor time per streamed piece, more than a good
server does, and the client shares its machine with the server in most measurements. This one hands
what the socket gives to httptools and counts; `benchmarks/front_end_http.py` measures its cost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import cast

import httptools

from furiosa_llm.loadgen.event_stream import EventStream, error_text, note_usage
from furiosa_llm.loadgen.record import Record, clock

MAX_BODY_BYTES = 64 * 2**20


def request_bytes(
    method: str, path: str, body: bytes, *, authority: str, headers: Mapping[str, str]
) -> bytes:
    """The request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class HttpConnection(asyncio.Protocol):
    """At most one request at a time; reusable where the server keeps the connection open."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._record: Record | None = None  # of the request under way
        self._ended: asyncio.Future[None] | None = None
        self._events: EventStream | None = None  # when the answer is a stream
        self._body = bytearray()  # when it is not
        self._now_s = 0.0
        self._has_answer_begun = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_answer_begun(self) -> bool:
        """Something of the last request's answer has come."""
        return self._has_answer_begun

    @property
    def body(self) -> bytes:
        """The answer's body, if it was no event stream."""
        return bytes(self._body)

    def request(self, message: bytes, record: Record) -> asyncio.Future[None]:
        """Send a request; the future is done when its answer has ended, well or not."""
        assert self._transport is not None
        assert self._ended is None, "a request is under way"
        self._record = record
        self._events, self._body, self._has_answer_begun = None, bytearray(), False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return self._ended

    def close(self) -> None:
        """Close the connection after what was written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection; a request under way is left as it is, and its future too."""
        self._record = self._ended = None
        if self._transport is not None:
            self._transport.abort()

    # --- what asyncio calls ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have no such base

    def data_received(self, data: bytes) -> None:
        self._now_s = clock()
        self._has_answer_begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end("bad answer", str(error))
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        # A stream may end at "[DONE]", whatever becomes of the connection afterwards.
        if self._events is not None and self._events.is_done:
            self._end()
        else:
            self._end("connection lost", str(exc or "closed before the answer's end"))

    # --- what httptools calls --------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and b"event-stream" in value and self._record:
            self._events = EventStream(self._record)

    def on_body(self, body: bytes) -> None:
        if self._events is not None:
            self._events.feed(body, self._now_s)
        elif len(self._body) + len(body) <= MAX_BODY_BYTES:
            self._body += body
        else:
            self._end("bad answer", f"the body is longer than {MAX_BODY_BYTES} bytes")
            self.abort()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"http {status}", _error_of(self.body))
        elif self._events is None:
            self._whole_answer()
        elif not self._events.is_done:
            self._end("stream cut", "the stream ended without [DONE]")
        else:
            self._end()
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()

    def _whole_answer(self) -> None:
        """An answer that was not streamed: all its tokens came now."""
        try:
            answer = json.loads(self._body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._end("bad answer", "the body is not a JSON object")
            return
        if self._record is not None:
            self._record.token_s.append(self._now_s)
            note_usage(self._record, answer)
        self._end()

    def _end(self, error: str | None = None, detail: str = "") -> None:
        """The request is over; later calls of the same request change nothing."""
        record, ended = self._record, self._ended
        self._record = self._ended = None
        if record is None or ended is None:
            return
        if error is not None:
            record.fail(error, detail)
        record.end_s = self._now_s or clock()
        if not ended.done():
            ended.set_result(None)


def _error_of(body: bytes) -> str:
    """What an error body says, at most a line of it."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    text = error_text(answer) if isinstance(answer, dict) else body.decode(errors="replace")
    return " ".join(text.split())[:300]
