"""AsyncClient: a daemon's requests as coroutines and asynchronous iterators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from furiosa_llm.client.address import CurveKeys
from furiosa_llm.client.connection import Call, Connection
from furiosa_llm.client.driver import Command
from furiosa_llm.client.errors import ClientClosedError
from furiosa_llm.client.io_loop import IoLoop
from furiosa_llm.client.prepared import PreparedStream, call_timed_out, chat_options
from furiosa_llm.client.requests import check_sendable, embedding_refusal, token_ids_of
from furiosa_llm.client.settings import CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S, ClientSettings
from furiosa_llm.client.status import DaemonStatus
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.wire.client_messages import (
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    GetStatus,
    Ping,
    StatusReport,
    Tokenize,
    Tokenized,
)


class _Mailbox:
    """What the connection knows of a stream or a call: it must not keep an abandoned one alive."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def deliver(self, item: Any) -> None:
        self._items.put_nowait(item)

    async def get(self, deadline_s: float | None) -> Any:
        """The next item. Raises: TimeoutError when the loop's time is later than the deadline."""
        with suppress(asyncio.QueueEmpty):
            return self._items.get_nowait()
        if deadline_s is None:
            return await self._items.get()
        async with asyncio.timeout_at(deadline_s):
            return await self._items.get()


class AsyncStream:
    """The outputs of one request, as they come: an asynchronous iterator.

    Leaving it early (`aclose`, the end of an `async with`, or letting go of it, as a `break` out of
    `async for` does) aborts the request.

    Attributes:
        request_id: the one given, or the one that was made up.
    """

    def __init__(
        self,
        io: IoLoop,
        connection: Connection,
        prepared: PreparedStream,
        timeout_s: float | None,
    ) -> None:
        self.request_id = prepared.request_id
        self._io = io
        self._connection = connection
        self._prepared = prepared
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else io.loop.time() + timeout_s
        self._mailbox = _Mailbox()
        io.run(partial(connection.begin, self._mailbox, prepared.progress))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; waits for it.

        Raises: StopAsyncIteration after the last one; RequestTimeoutError; the request's own error.
        """
        while not self._prepared.is_over:
            try:
                item = await self._mailbox.get(self._deadline_s)
            except TimeoutError:
                self._io.run(partial(self._connection.drop, self._mailbox))
                assert self._timeout_s is not None
                raise self._prepared.timed_out(self._timeout_s) from None
            output = self._prepared.take(item)
            num_read = self._prepared.num_read()
            if num_read:
                self._io.run(partial(self._connection.read, self._mailbox, num_read))
            if output is not None:
                return output
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort the request, unless it has ended; idempotent."""
        self._close(self._io.run)

    def _close(self, run: Callable[[Command], None]) -> None:
        if not self._prepared.is_over:
            self._prepared.is_over = True
            run(partial(self._connection.drop, self._mailbox))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(self._io.run)

    def __del__(self) -> None:
        if hasattr(self, "_mailbox"):  # else the constructor has failed
            self._close(self._io.run_threadsafe)


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods, results and errors.

    It connects when it is first used, or by `async with`, and belongs to the event loop that runs
    then.
    """

    def __init__(
        self,
        address: str = "default",
        *,
        curve: CurveKeys | None = None,
        timeout_s: float | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> None:
        self._settings = ClientSettings(
            address, curve, timeout_s, connect_timeout_s, reconnect_timeout_s
        )
        self._connection, self._endpoint, self._keys = self._settings.resolve()
        self._made_io: IoLoop | None = None

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """See `Client.generate`. Cancelling it aborts the request."""
        prepared = PreparedStream.generate(
            prompt,
            sampling_params,
            request_id,
            add_special_tokens=add_special_tokens,
            is_final=True,
        )
        return await self._final(prepared, timeout_s)

    def stream_generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """See `Client.stream_generate`. To be called on the event loop."""
        prepared = PreparedStream.generate(
            prompt,
            sampling_params,
            request_id,
            add_special_tokens=add_special_tokens,
            is_final=False,
        )
        return self._stream(prepared, timeout_s)

    async def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """See `Client.chat`. Cancelling it aborts the request."""
        options = chat_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        prepared = PreparedStream.chat(
            messages, sampling_params, request_id, options, is_final=True
        )
        return await self._final(prepared, timeout_s)

    def stream_chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """See `Client.stream_chat`. To be called on the event loop."""
        options = chat_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        prepared = PreparedStream.chat(
            messages, sampling_params, request_id, options, is_final=False
        )
        return self._stream(prepared, timeout_s)

    async def abort(self, request_id: str) -> None:
        """See `Client.abort`."""
        self._io().run(partial(self._connection.abort, request_id))

    async def embed(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported yet. Raises: InvalidRequestError."""
        raise embedding_refusal()

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[int]:
        """The token ids of a text."""
        question = Tokenize(1, text, add_special_tokens)
        check_sendable(question, "text")
        return list(cast(Tokenized, await self._call(question, timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Any, *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """The text of token ids."""
        question = Detokenize(1, token_ids_of(token_ids, "token_ids"), skip_special_tokens)
        check_sendable(question, "token_ids")
        return cast(Detokenized, await self._call(question, timeout_s)).text

    async def status(self, *, timeout_s: float | None = None) -> DaemonStatus:
        """What the daemon is doing."""
        report = cast(StatusReport, await self._call(GetStatus(1), timeout_s))
        return DaemonStatus.of(report.status)

    async def drain(self, *, timeout_s: float = 30.0) -> int:
        """See `Client.drain`."""
        question = Drain(1, timeout_s)
        check_sendable(question, "timeout_s")
        return cast(Drained, await self._call(question, None)).num_in_flight

    async def ping(self, *, timeout_s: float | None = None) -> float:
        """Seconds to the daemon and back."""
        begin_s = time.monotonic()
        await self._call(Ping(1), timeout_s)
        return time.monotonic() - begin_s

    async def close(self) -> None:
        """See `Client.close`."""
        if self._made_io is None:
            self._made_io = IoLoop(self._connection, self._endpoint, self._keys)
        await self._made_io.close()

    def _io(self) -> IoLoop:
        if self._made_io is None:
            self._made_io = IoLoop(self._connection, self._endpoint, self._keys)
        if self._made_io.is_closed:
            raise ClientClosedError("the client was closed: make a new one")
        if self._made_io.loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncClient belongs to the event loop that first used it")
        return self._made_io

    def _stream(self, prepared: PreparedStream, timeout_s: float | None) -> AsyncStream:
        timeout_s = self._settings.timeout_of(timeout_s)
        return AsyncStream(self._io(), self._connection, prepared, timeout_s)

    async def _final(self, prepared: PreparedStream, timeout_s: float | None) -> RequestOutput:
        async with self._stream(prepared, timeout_s) as stream:
            return await anext(stream)

    async def _call(self, question: Call, timeout_s: float | None) -> Any:
        io = self._io()
        timeout_s = self._settings.timeout_of(timeout_s)
        mailbox = _Mailbox()
        io.run(partial(self._connection.call, mailbox, question))
        try:
            answer = await mailbox.get(None if timeout_s is None else io.loop.time() + timeout_s)
        except BaseException as error:
            io.run(partial(self._connection.drop, mailbox))
            if not isinstance(error, TimeoutError):
                raise
            assert timeout_s is not None
            raise call_timed_out(type(question).__name__, timeout_s) from None
        if isinstance(answer, FuriosaLLMError):
            raise answer
        return answer

    async def __aenter__(self) -> Self:
        """Connect. Raises: DaemonUnreachableError."""
        try:
            await self.ping()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
