"""A client's request while it runs, and the way of its outputs from the engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import ExitStack
from typing import Protocol

from furiosa_llm.engine.request import Request
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.server.metrics_hooks import MetricsHooks
from furiosa_llm.server.outgoing import OutgoingStream

Item = RequestOutput | FuriosaLLMError


class Session(Protocol):
    """Whose request it is."""

    def take(self, stream: LiveStream, item: Item) -> None: ...
    def flush(self) -> None: ...


class Inbox:
    """Carries the outputs of all clients' requests to the event loop, those of a step at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[LiveStream, Item]] = deque()
        self._is_scheduled = False  # only the engine's thread sets it, only the loop clears it

    def put(self, stream: LiveStream, item: Item) -> None:
        """Called by the engine's thread."""
        self._items.append((stream, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to read
                self._items.clear()
                self._is_scheduled = False

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is put from here on schedules anew
        sessions: dict[Session, None] = {}
        while self._items:
            stream, item = self._items.popleft()
            if not stream.is_closed:
                stream.session.take(stream, item)
                sessions[stream.session] = None
        for session in sessions:  # once each, so that a step's rows leave in one message
            session.flush()


class LiveStream:
    """One request, from its message until its last row has left; the sink of its outputs."""

    def __init__(
        self,
        session: Session,
        inbox: Inbox,
        stream_id: int,
        request_id: str,
        *,
        num_bytes: int,
        num_credits: int,
    ) -> None:
        self.session = session
        self.stream_id = stream_id
        self.request_id = request_id
        self.num_bytes = num_bytes  # of the message
        self.outgoing = OutgoingStream(stream_id, num_credits)
        self.request: Request | None = None  # once the engine has it
        self.is_closed = False  # nothing more is sent of it
        self.is_abort_asked = False
        self.admission = ExitStack()  # closing it takes the request off the service's count
        self.num_tokens = 0
        self._inbox = inbox
        self._started_s = self._last_s = time.monotonic()
        self._finish_reasons: list[str] = []

    def put(self, item: Item) -> None:
        """See `Sink`."""
        self._inbox.put(self, item)

    def measure(self, output: RequestOutput, metrics: MetricsHooks) -> None:
        """Tell the metrics what came."""
        now_s, num_new = time.monotonic(), output.num_output_tokens
        if num_new and not self.num_tokens:
            num_prompt_tokens = output.num_prompt_tokens
            metrics.first_token(
                seconds=now_s - self._started_s, num_prompt_tokens=num_prompt_tokens
            )
        num_further = num_new if self.num_tokens else num_new - 1
        if num_further > 0:
            metrics.tokens(count=num_further, seconds=now_s - self._last_s)
        self.num_tokens += num_new
        self._last_s = now_s
        self._finish_reasons += [p.finish_reason for p in output.outputs if p.finish_reason]
        if output.finished:
            metrics.finished(
                reasons=self._finish_reasons,
                num_prompt_tokens=output.num_prompt_tokens,
                num_tokens=self.num_tokens,
                seconds=now_s - self._started_s,
            )
