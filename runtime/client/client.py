"""Client: a daemon's requests as plain calls and iterators, for any number of threads."""

from __future__ import annotations

import time
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from furiosa_llm.client.address import CurveKeys
from furiosa_llm.client.connection import Call, Connection
from furiosa_llm.client.errors import ClientClosedError
from furiosa_llm.client.io_thread import IoThread
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
        self._items: SimpleQueue[Any] = SimpleQueue()

    def deliver(self, item: Any) -> None:
        self._items.put(item)

    def get(self, deadline_s: float | None) -> Any:
        """The next item. Raises: queue.Empty when the time is up."""
        if deadline_s is None:
            return self._items.get()
        return self._items.get(timeout=max(deadline_s - time.monotonic(), 0.0))


class Stream:
    """The outputs of one request, as they come: an iterator.

    Leaving it early (`close`, the end of a `with`, or letting go of it) aborts the request.

    Attributes:
        request_id: the one given, or the one that was made up.
    """

    def __init__(
        self,
        io: IoThread,
        connection: Connection,
        prepared: PreparedStream,
        timeout_s: float | None,
    ) -> None:
        self.request_id = prepared.request_id
        self._io = io
        self._connection = connection
        self._prepared = prepared
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._mailbox = _Mailbox()
        _post(io, partial(connection.begin, self._mailbox, prepared.progress))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RequestOutput:
        """The next output; waits for it.

        Raises: StopIteration after the last one; RequestTimeoutError; the request's own error.
        """
        while not self._prepared.is_over:
            try:
                item = self._mailbox.get(self._deadline_s)
            except Empty:
                self._drop()
                assert self._timeout_s is not None
                raise self._prepared.timed_out(self._timeout_s) from None
            output = self._prepared.take(item)
            num_read = self._prepared.num_read()
            if num_read:
                self._io.post(partial(self._connection.read, self._mailbox, num_read))
            if output is not None:
                return output
        raise StopIteration

    def close(self) -> None:
        """Abort the request, unless it has ended; idempotent."""
        if not self._prepared.is_over:
            self._prepared.is_over = True
            self._drop()

    def _drop(self) -> None:
        self._io.post(partial(self._connection.drop, self._mailbox))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_mailbox"):  # else the constructor has failed
            self.close()


class Client:
    """Talks to a daemon over its socket. Thread-safe; all requests share one connection.

    When the daemon is gone, what runs waits for it to come back and then goes on with exactly the
    tokens it would have had.

    Args:
        address: a daemon's name, ipc://PATH, or tcp://HOST:PORT with `curve`.
        curve: the keys for tcp://.
        timeout_s: for each call that states no own; None: no limit.
        connect_timeout_s: how long to wait for a daemon that does not answer.
        reconnect_timeout_s: how long what runs waits for a daemon that was lost.
    Raises: DaemonUnreachableError; FuriosaLLMError if no daemon of that name runs.
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
        self._connection, endpoint, keys = self._settings.resolve()
        self._io = IoThread(self._connection, endpoint, keys)
        try:
            self.ping()
        except BaseException:  # Ctrl-C, too: no thread is left behind
            self.close()
            raise

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """The finished output of one request.

        Args:
            prompt: a str, a list of token ids, {"prompt": str} or {"prompt_token_ids": [...]}.
            sampling_params: None is `SamplingParams()`; its output kind does not matter.
            request_id: None makes one up.
            add_special_tokens: to a text, those the model wants around it.
            timeout_s: when it is up, the request is aborted.
        Raises: RequestTimeoutError; what the engine raises; DaemonUnreachableError.
        """
        prepared = PreparedStream.generate(
            prompt,
            sampling_params,
            request_id,
            add_special_tokens=add_special_tokens,
            is_final=True,
        )
        return self._final(prepared, timeout_s)

    def stream_generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> Stream:
        """The outputs of one request as they come, of the parameters' output kind.

        The request runs from now on. Arguments and errors are those of `generate`; the errors of
        the daemon are raised by the iterator.
        """
        prepared = PreparedStream.generate(
            prompt,
            sampling_params,
            request_id,
            add_special_tokens=add_special_tokens,
            is_final=False,
        )
        return self._stream(prepared, timeout_s)

    def chat(
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
        """The finished answer to a chat.

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: end the prompt with the header of an answer; the default, but
                where the last message is to be continued.
            continue_final_message: go on with the last message instead of answering it.
            chat_template_kwargs: more variables for the chat template.
            The others, and the errors, are those of `generate`.
        """
        options = chat_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        prepared = PreparedStream.chat(
            messages, sampling_params, request_id, options, is_final=True
        )
        return self._final(prepared, timeout_s)

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
    ) -> Stream:
        """The answer to a chat as it comes; see `chat` and `stream_generate`."""
        options = chat_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        prepared = PreparedStream.chat(
            messages, sampling_params, request_id, options, is_final=False
        )
        return self._stream(prepared, timeout_s)

    def abort(self, request_id: str) -> None:
        """End a request of this client as it stands; its reader gets a last output whose finish
        reason is "abort". An unknown id is no error: the request may just have ended.
        """
        _post(self._io, partial(self._connection.abort, request_id))

    def embed(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported yet. Raises: InvalidRequestError."""
        raise embedding_refusal()

    def tokenize(
        self, text: str, *, add_special_tokens: bool = True, timeout_s: float | None = None
    ) -> list[int]:
        """The token ids of a text."""
        question = Tokenize(1, text, add_special_tokens)
        check_sendable(question, "text")
        return list(cast(Tokenized, self._call(question, timeout_s)).token_ids)

    def detokenize(
        self, token_ids: Any, *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """The text of token ids."""
        question = Detokenize(1, token_ids_of(token_ids, "token_ids"), skip_special_tokens)
        check_sendable(question, "token_ids")
        return cast(Detokenized, self._call(question, timeout_s)).text

    def status(self, *, timeout_s: float | None = None) -> DaemonStatus:
        """What the daemon is doing."""
        return DaemonStatus.of(cast(StatusReport, self._call(GetStatus(1), timeout_s)).status)

    def drain(self, *, timeout_s: float = 30.0) -> int:
        """Have the daemon take no new requests, for good, and wait for those that run.

        Returns: how many are left, 0 unless the time was up.
        """
        question = Drain(1, timeout_s)
        check_sendable(question, "timeout_s")
        return cast(Drained, self._call(question, None)).num_in_flight

    def ping(self, *, timeout_s: float | None = None) -> float:
        """Seconds to the daemon and back."""
        begin_s = time.monotonic()
        self._call(Ping(1), timeout_s)
        return time.monotonic() - begin_s

    def close(self) -> None:
        """End what runs, with ClientClosedError to those who wait for it; idempotent."""
        self._io.close()

    def _stream(self, prepared: PreparedStream, timeout_s: float | None) -> Stream:
        return Stream(self._io, self._connection, prepared, self._settings.timeout_of(timeout_s))

    def _final(self, prepared: PreparedStream, timeout_s: float | None) -> RequestOutput:
        with self._stream(prepared, timeout_s) as stream:
            return next(stream)

    def _call(self, question: Call, timeout_s: float | None) -> Any:
        timeout_s = self._settings.timeout_of(timeout_s)
        mailbox = _Mailbox()
        _post(self._io, partial(self._connection.call, mailbox, question))
        try:
            answer = mailbox.get(None if timeout_s is None else time.monotonic() + timeout_s)
        except BaseException as error:
            self._io.post(partial(self._connection.drop, mailbox))
            if not isinstance(error, Empty):
                raise
            assert timeout_s is not None
            raise call_timed_out(type(question).__name__, timeout_s) from None
        if isinstance(answer, FuriosaLLMError):
            raise answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _post(io: IoThread, command: Any) -> None:
    if not io.post(command):
        raise ClientClosedError("the client was closed: make a new one")
