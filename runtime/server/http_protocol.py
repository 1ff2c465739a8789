"""uvicorn's httptools protocol, with the bounds on time and size that it lacks.

uvicorn waits for ever for a request's headers and body, and middleware comes too late to help: it
runs once the headers are there. So the deadlines are here, absolute and per request: whoever
dribbles bytes keeps one connection busy for that long, and costs nobody else anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.mailbox import ClientLeftError

_CONNECTION = "furiosa.connection"


def connection_of(scope: Scope) -> HttpProtocol:
    """The connection that a request came by."""
    connection: HttpProtocol = scope[_CONNECTION]
    return connection


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        http_config: HttpConfig,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._http_config = http_config
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self.when_writable: Callable[[], None] | None = None
        self._running: RequestResponseCycle | None = None  # whose app runs; `cycle` may be a later
        self._num_header_bytes = 0
        self._is_in_headers = True  # before the first request, too: a silent client is a slow one

    # --- the connection ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._http_config.max_connections:
            self._refuse(
                HttpError(
                    503,
                    f"the server has {self._http_config.max_connections} connections, its limit: "
                    f"try again later",
                    type="server_error",
                    code="too_many_connections",
                    headers=((b"retry-after", b"1"),),
                )
            )
            return
        self._set_deadline(self._http_config.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_stalled()
        self._unset_keepalive_if_required()
        self._disconnect(self._running)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_headers:
            self._num_header_bytes += len(data)
        super().data_received(data)
        if self._deadline is None and self._is_idle:  # empty lines ended the keep-alive timer
            self._set_deadline(self._http_config.header_timeout_s)
        if self._is_in_headers and self._num_header_bytes > self._http_config.max_header_bytes:
            self._refuse(
                HttpError(
                    431,
                    f"the headers are longer than {self._http_config.max_header_bytes} bytes",
                    type="invalid_request_error",
                    code="headers_too_large",
                )
            )

    # --- for streams ------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether the peer keeps up; when that changes to True, `when_writable` is called."""
        return not self.flow.write_paused

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more. uvloop knows it before this protocol is told."""
        return self.transport.is_closing()

    def write_chunk(self, body: bytes) -> None:
        """Send a part of a chunked response that has begun. Raises: ClientLeftError."""
        if self.transport.is_closing():
            raise ClientLeftError
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def close_after_response(self) -> None:
        """Close the connection when the response that has begun is complete."""
        assert self._running is not None
        self._running.keep_alive = False

    def cut(self) -> None:
        """Close the connection at once, in the middle of what is being sent."""
        self._disconnect(self._running)
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(
            self._http_config.write_timeout_s, self.transport.abort
        )

    def resume_writing(self) -> None:
        super().resume_writing()
        self._clear_stalled()
        if self.when_writable is not None:
            self.when_writable()

    def _clear_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # --- the parser -------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: MutableMapping[str, Any] = self.scope  # type: ignore[assignment]
        scope[_CONNECTION] = self
        self._is_in_headers = True
        self._set_deadline(self._http_config.header_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers:  # trailers are dropped: nothing reads them, so nothing bounds them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._num_header_bytes = 0
        self._set_deadline(self._http_config.body_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._clear_deadline()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # --- refusals ---------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            HttpError(
                400,
                "what was sent is not valid HTTP/1.1",
                type="invalid_request_error",
                code="invalid_http",
            )
        )

    def _set_deadline(self, timeout_s: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(timeout_s, self._too_slow)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # by us, since an earlier request is still being answered
            self._set_deadline(self._http_config.body_timeout_s)
            return
        what = "headers" if self._is_in_headers else "body"
        self._refuse(
            HttpError(
                408,
                f"the request's {what} did not arrive in time",
                type="invalid_request_error",
                code="request_timeout",
            )
        )

    def _refuse(self, error: HttpError) -> None:
        """Answer, unless an answer is being sent, and close."""
        self._clear_deadline()
        running = self._running
        is_free = running is None or not running.response_started or running.response_complete
        if is_free and not self.is_closed:
            self.transport.write(_whole_response(error, self.server_state.default_headers))
        self._disconnect(running)
        self._disconnect(self.cycle)
        self.transport.close()

    def _disconnect(self, cycle: RequestResponseCycle | None) -> None:
        """Let the app of a request hear that its client has left."""
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()


def _whole_response(error: HttpError, headers: list[tuple[bytes, bytes]]) -> bytes:
    body = error.body("")
    lines = (
        *headers,
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *error.headers,
    )
    head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
    return STATUS_LINE[error.status] + head + b"\r\n" + body
