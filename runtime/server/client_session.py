"""One connected client: its requests, and what it has to be sent.

A session lives on the event loop. Outputs join their stream's rows, and `flush` sends those rows
that the client has granted credits for, those of all its streams in one message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from functools import partial
from typing import Any

from furiosa_llm import __version__
from furiosa_llm.engine.async_llm_engine import LONG_TEXT_CHARS, AsyncLLMEngine
from furiosa_llm.engine.request import Request
from furiosa_llm.errors import (
    EngineShutDownError,
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    ServiceUnavailableError,
    WorkerDiedError,
    to_wire,
)
from furiosa_llm.server.client_limits import ClientLimits
from furiosa_llm.server.client_requests import make_request, wire_params
from furiosa_llm.server.live_stream import Inbox, Item, LiveStream
from furiosa_llm.server.outgoing import Row, outputs_of
from furiosa_llm.server.overview import Overview
from furiosa_llm.server.service import Service
from furiosa_llm.server.socket_status import model_id, plain_status
from furiosa_llm.wire.client_codec import encode_client
from furiosa_llm.wire.client_messages import (
    Abort,
    Accepted,
    Chat,
    Credit,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    Drop,
    Failed,
    FromClient,
    FromDaemon,
    Generate,
    GetStatus,
    Goodbye,
    Hello,
    Ping,
    Pong,
    StatusReport,
    Tokenize,
    Tokenized,
    Welcome,
)
from furiosa_llm.wire.codec import clip_text
from furiosa_llm.wire.errors import WireError

MAX_ROWS_PER_MESSAGE = 1024
MAX_TOKENS_PER_MESSAGE = 65536
RETRY_UNREAD_S = 0.02
"""ZeroMQ does not tell when one client's queue has room again, so it is tried."""

_log = logging.getLogger(__name__)


class Sent(Enum):
    """What became of a message that was given to the socket."""

    SENT = 0
    FULL = 1  # the client's queue is full: it does not read
    GONE = 2  # it is not connected any more


Transmit = Callable[[bytes, bytes], Sent]
"""(client identity, message) -> what became of it; does not block."""


Answer = Callable[[], Coroutine[Any, Any, FromDaemon]]


class ClientSession:
    """What the daemon knows of one connection, from its `Hello` on.

    Args:
        identity: of the connection, at the socket.
        transmit: gives the socket a message.
    """

    def __init__(
        self,
        identity: bytes,
        client_id: str,
        *,
        service: Service,
        overview: Overview,
        inbox: Inbox,
        limits: ClientLimits,
        transmit: Transmit,
    ) -> None:
        self.identity = identity
        self.client_id = client_id
        self.is_closed = False
        self.last_heard_s = self.last_sent_s = time.monotonic()
        self._service = service
        self._overview = overview
        self._inbox = inbox
        self._limits = limits
        self._transmit = transmit
        self._streams: dict[int, LiveStream] = {}
        self._unsent: dict[LiveStream, None] = {}  # those that may have rows to send, in order
        self._unread: deque[bytes] = deque()  # messages that the socket had no room for
        self._retry: asyncio.TimerHandle | None = None
        self._next_seq = 0
        self._num_request_bytes = 0
        self._num_calls = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_streams(self) -> int:
        """Requests that have not ended, or whose last rows have not left."""
        return len(self._streams)

    def welcome(self, server_id: str) -> None:
        """Answer its `Hello`."""
        self.send(Welcome(server_id, f"furiosa-serve {__version__}", self._limits.heartbeat_s))

    def handle(self, message: FromClient, num_bytes: int) -> None:
        """Do what the client asks for; `num_bytes` is the message's length."""
        match message:
            case Generate() | Chat():
                self._begin(message, num_bytes)
            case Credit():
                stream = self._streams.get(message.stream_id)
                if stream is not None:
                    stream.outgoing.grant(message.num_rows)
                    self._unsent[stream] = None
                    self.flush()
            case Abort():
                for stream in map(self._streams.get, message.stream_ids):
                    self._abort(stream)
            case Drop():
                for stream in map(self._streams.get, message.stream_ids):
                    self._drop(stream)
            case Ping():
                self.send(Pong(message.call_id))
            case Goodbye():
                self.close()
            case GetStatus():
                self._call(message.call_id, partial(self._status, message))
            case Tokenize():
                self._call(message.call_id, partial(self._tokenize, message))
            case Detokenize():
                self._call(message.call_id, partial(self._detokenize, message))
            case Drain():
                self._call(message.call_id, partial(self._drain, message))
            case Hello():
                pass  # the server makes a session of it

    def close(self) -> None:
        """End everything the client had running, and free what that held; idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        for task in self._tasks:
            task.cancel()
        for stream in list(self._streams.values()):
            self._drop(stream)
        self._unread.clear()

    # --- sending ----------------------------------------------------------------------------------

    def send(self, message: FromDaemon) -> None:
        """Send a message that needs no credit."""
        if not self.is_closed:
            self._send_packed(encode_client(message))

    def flush(self) -> None:
        """Send the rows that may leave, as far as the client's socket has room."""
        while self._unsent and not self._unread and not self.is_closed:
            rows = self._take_rows()
            if not rows:
                return
            try:
                packed = encode_client(
                    outputs_of(
                        self._next_seq, [(s.stream_id, index, row) for s, index, row in rows]
                    )
                )
            except WireError as error:  # of a text that is too long, say: only these streams end
                _log.error("client %s: an output cannot be sent: %s", self.client_id, error)
                failure = FuriosaLLMError(f"an output cannot be sent: {error}")
                for stream in dict.fromkeys(stream for stream, _, _ in rows):
                    self._fail(stream, failure)
                continue
            self._next_seq += 1
            self._send_packed(packed)
            for stream, _, _ in rows:
                if stream.outgoing.is_sent:
                    self._remove(stream)

    def _take_rows(self) -> list[tuple[LiveStream, int, Row]]:
        """(stream, choice, row) for one message."""
        rows: list[tuple[LiveStream, int, Row]] = []
        num_tokens = 0
        while self._unsent:
            stream = next(iter(self._unsent))
            for choice_index, row in stream.outgoing.take():
                rows.append((stream, choice_index, row))
                num_tokens += len(row.token_ids)
                if len(rows) == MAX_ROWS_PER_MESSAGE or num_tokens >= MAX_TOKENS_PER_MESSAGE:
                    return rows
            del self._unsent[stream]
        return rows

    def _send_packed(self, packed: bytes) -> None:
        self.last_sent_s = time.monotonic()
        if not self._unread:
            match self._transmit(self.identity, packed):
                case Sent.SENT:
                    return
                case Sent.GONE:
                    self.close()
                    return
                case Sent.FULL:
                    self._retry_soon()
        self._unread.append(packed)
        if len(self._unread) > self._limits.max_unread_messages:
            _log.warning("client %s reads nothing: its requests end", self.client_id)
            self.close()

    def _retry_soon(self) -> None:
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(RETRY_UNREAD_S, self._send_unread)

    def _send_unread(self) -> None:
        while self._unread:
            match self._transmit(self.identity, self._unread[0]):
                case Sent.SENT:
                    self._unread.popleft()
                case Sent.GONE:
                    self.close()
                    return
                case Sent.FULL:
                    self._retry_soon()
                    return
        self.flush()

    # --- requests ---------------------------------------------------------------------------------

    def _begin(self, message: Generate | Chat, num_bytes: int) -> None:
        stream_id = message.stream_id
        if stream_id in self._streams:
            _log.warning("client %s uses stream id %d twice", self.client_id, stream_id)
            return
        problem = ""
        if len(self._streams) >= self._limits.max_streams:
            problem = f"this client has {len(self._streams)} requests running, which is the limit"
        elif self._num_request_bytes + num_bytes > self._limits.max_request_bytes:
            problem = (
                f"this client's requests take {self._num_request_bytes} bytes, this one takes "
                f"{num_bytes}, and the limit is {self._limits.max_request_bytes}"
            )
        if problem:
            self._refuse(stream_id, OverloadedError(f"{problem}: wait for one to end"))
            return
        stream = LiveStream(
            self,
            self._inbox,
            stream_id,
            message.request_id,
            num_bytes=num_bytes,
            num_credits=message.credits,
        )
        self._streams[stream_id] = stream
        self._num_request_bytes += num_bytes
        self._spawn(self._start(stream, message))

    async def _start(self, stream: LiveStream, message: Generate | Chat) -> None:
        if stream.is_closed:  # dropped at once
            return
        try:
            request, engine = await self._submit(stream, message)
        except FuriosaLLMError as error:
            self._fail(stream, error)
            return
        except Exception as error:  # a defect that one request meets must not end the session
            _log.exception("request %r cannot be started", message.request_id)
            text = f"the request failed: {type(error).__name__}: {error}"
            self._fail(stream, FuriosaLLMError(text))
            return
        if stream.is_abort_asked and not stream.is_closed:
            await engine.abort(request.request_id)

    async def _submit(
        self, stream: LiveStream, message: Generate | Chat
    ) -> tuple[Request, AsyncLLMEngine]:
        """Check everything, and give the request to the engine."""
        params = wire_params(message)
        engine = stream.admission.enter_context(self._service.admit(message.request_id, params.n))
        request = await make_request(self._service, engine, message, params, stream)
        if stream.is_closed:  # dropped while its prompt was read
            return request, engine
        self._service.metrics.request_started(
            endpoint="socket", num_choices=params.n, max_tokens=params.max_tokens
        )
        try:
            engine.submit(request)
        except (WorkerDiedError, EngineShutDownError) as error:  # it takes no request ever again
            self._service.fail(error)
            raise self._service.unavailable() from error
        stream.request = request
        self.send(
            Accepted(
                stream_id=stream.stream_id,
                model_id=model_id(self._service.artifact_id, engine),
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                seed=request.sequence_params[0].seed,
                max_tokens=request.sequence_params[0].max_tokens,
            )
        )
        return request, engine

    def take(self, stream: LiveStream, item: Item) -> None:
        """An output, or the error, of a stream that is not closed; `flush` is to follow."""
        if isinstance(item, FuriosaLLMError):
            self._fail(stream, item)
            return
        stream.outgoing.add(item)
        stream.measure(item, self._service.metrics)
        self._unsent[stream] = None
        if item.finished:
            stream.admission.close()

    def _abort(self, stream: LiveStream | None) -> None:
        """End it as it stands; the engine makes its last output."""
        engine = self._service.engine_or_none
        if stream is None or engine is None:
            return
        stream.is_abort_asked = True  # for a request that the engine does not have yet
        if stream.request is not None:
            self._spawn(engine.abort(stream.request_id))

    def _drop(self, stream: LiveStream | None) -> None:
        """End it without another word."""
        if stream is None or stream.is_closed:
            return
        self._remove(stream)
        engine = self._service.engine_or_none
        if stream.request is not None and engine is not None and not stream.outgoing.is_complete:
            self._service.metrics.aborted(num_tokens=stream.num_tokens)
            engine.drop(stream.request)

    def _fail(self, stream: LiveStream, error: FuriosaLLMError) -> None:
        if not stream.is_closed:
            self._drop(stream)
            self._refuse(stream.stream_id, error)

    def _refuse(self, stream_or_call_id: int, error: FuriosaLLMError) -> None:
        code, text = to_wire(error)
        param = error.param if isinstance(error, InvalidRequestError) else None
        retry_after = 0.0
        if isinstance(error, OverloadedError | ServiceUnavailableError):
            retry_after = error.retry_after
        self.send(
            Failed(
                id=stream_or_call_id,
                error_code=code,
                message=clip_text(text),
                param=None if param is None else clip_text(param)[:500],
                retry_after=retry_after,
            )
        )

    def _remove(self, stream: LiveStream) -> None:
        if not stream.is_closed:
            stream.is_closed = True
            stream.admission.close()
            del self._streams[stream.stream_id]
            self._unsent.pop(stream, None)
            self._num_request_bytes -= stream.num_bytes

    # --- calls ------------------------------------------------------------------------------------

    def _call(self, call_id: int, answer: Answer) -> None:
        """Send what `answer` comes to."""
        if self._num_calls >= self._limits.max_calls:
            text = f"this client has {self._num_calls} calls unanswered, which is the limit"
            self._refuse(call_id, OverloadedError(f"{text}: wait for one to be answered"))
            return
        self._num_calls += 1
        self._spawn(self._answer(call_id, answer))

    async def _answer(self, call_id: int, answer: Answer) -> None:
        try:
            self.send(await answer())
        except FuriosaLLMError as error:
            self._refuse(call_id, error)
        except Exception as error:  # as in `_start`
            _log.exception("a call of client %s failed", self.client_id)
            text = f"the call failed: {type(error).__name__}: {error}"
            self._refuse(call_id, FuriosaLLMError(text))
        finally:
            self._num_calls -= 1

    async def _status(self, message: GetStatus) -> FromDaemon:
        status = await self._overview.status()
        return StatusReport(message.call_id, plain_status(status, self._service))

    async def _tokenize(self, message: Tokenize) -> FromDaemon:
        encode = partial(
            self._service.engine.tokenizer.encode, message.text, message.add_special_tokens
        )
        is_long = len(message.text) >= LONG_TEXT_CHARS
        token_ids = await self._service.in_text_thread(encode) if is_long else encode()
        return Tokenized(message.call_id, tuple(token_ids))

    async def _detokenize(self, message: Detokenize) -> FromDaemon:
        decode = partial(
            self._service.engine.tokenizer.decode, message.token_ids, message.skip_special_tokens
        )
        is_long = len(message.token_ids) >= LONG_TEXT_CHARS
        text = await self._service.in_text_thread(decode) if is_long else decode()
        return Detokenized(message.call_id, text)

    async def _drain(self, message: Drain) -> FromDaemon:
        self._service.begin_drain()
        await self._service.drained(message.timeout_s)
        return Drained(message.call_id, self._service.num_in_flight)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
