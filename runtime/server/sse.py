"""A stream of server-sent events: when it begins, how it goes on in silence, how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope, Send

from furiosa_llm.server.errors import HttpError, http_error_of
from furiosa_llm.server.generation import Generation
from furiosa_llm.server.http_protocol import HttpProtocol, connection_of
from furiosa_llm.server.mailbox import ClientLeftError, Delta
from furiosa_llm.server.request_ids import request_id_of
from furiosa_llm.server.usage import Usage

Headers = list[tuple[bytes, bytes]]

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]

_log = logging.getLogger(__name__)


class StreamWriter(Protocol):
    """Writes the events of one stream."""

    ping: bytes
    """Asks for nothing, and shows that the connection lives."""

    def delta(self, delta: Delta) -> bytes:
        """What is new of a choice; b"" while there is nothing to show of it."""

    def closing(self, usage: Usage | None) -> bytes:
        """What comes after all choices have ended."""

    def error(self, error: HttpError, request_id: str) -> bytes:
        """The last event of a stream that failed."""


class KeepAlive:
    """Calls `when_quiet` after each interval in which `touch` was not called. One timer."""

    def __init__(self, interval_s: float, when_quiet: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._when_quiet = when_quiet
        self._is_quiet = True
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval_s, self._tick)

    def touch(self) -> None:
        """Something was sent."""
        self._is_quiet = False

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        if self._is_quiet:
            self._when_quiet()
        self._is_quiet = True
        self._timer = self._loop.call_later(self._interval_s, self._tick)


class LiveBody:
    """The middle of a stream: each output is written the moment it is delivered.

    No task is woken for it: that alone would double the cost of a token. While the connection
    takes no more, outputs gather in the generation's mailbox, merged, and are written as one when
    it does.
    """

    def __init__(
        self,
        generation: Generation,
        writer: StreamWriter,
        connection: HttpProtocol,
        keep_alive_s: float,
    ) -> None:
        self._generation = generation
        self._writer = writer
        self._connection = connection
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keep_alive = KeepAlive(keep_alive_s, self._ping)

    async def run(self) -> None:
        """Return when all choices have ended. Raises: what ended the generation early."""
        self._generation.listen(self._write)
        self._connection.when_writable = self._write
        try:
            self._write()  # what has come meanwhile
            await self._done
        finally:
            self._generation.listen(None)
            self._connection.when_writable = None
            self._keep_alive.stop()

    def _write(self) -> None:
        if self._done.done() or not self._connection.is_writable:
            return
        try:
            body = b"".join(map(self._writer.delta, self._generation.poll()))
            if body:
                self._keep_alive.touch()
                self._connection.write_chunk(body)
            if self._generation.is_finished:
                self._done.set_result(None)
        except Exception as error:  # for `run` to raise: this is called from the event loop
            self._done.set_exception(error)

    def _ping(self) -> None:
        connection = self._connection
        if not self._done.done() and connection.is_writable and not connection.is_closed:
            self._connection.write_chunk(self._writer.ping)


async def stream_reply(
    generation: Generation,
    writer: StreamWriter,
    scope: Scope,
    send: Send,
    *,
    opening: Callable[[], bytes],
    headers: Headers,
    keep_alive_s: float,
    with_usage: bool,
) -> None:
    """Send a generation that was started, token by token.

    Nothing is sent before its first output, so that an error until then is raised and can still be
    an answer with its own status. A later one is the last chunk, and the connection is closed.
    """
    first = await generation.take()
    await send(_start(headers))
    try:
        body = opening() + b"".join(map(writer.delta, first))
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if not generation.is_finished:
            await LiveBody(generation, writer, connection_of(scope), keep_alive_s).run()
        end = writer.closing(generation.usage if with_usage else None)
    except ClientLeftError:
        raise
    except Exception as error:
        _log.error("request %s failed in mid-stream", request_id_of(scope), exc_info=error)
        connection_of(scope).close_after_response()
        end = writer.error(http_error_of(error), request_id_of(scope))
    await send({"type": "http.response.body", "body": end, "more_body": False})


def _start(headers: Headers) -> dict[str, object]:
    return {"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *headers]}
