"""How outputs come from the engine's thread to a reader on the event loop.

A reader that keeps up gets each output as it is made. One that does not gets what has come
meanwhile merged into one piece per choice, so that what is kept for it is bounded by its answer's
length and costs nobody else anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import CompletionOutput, RequestOutput, SampleLogprobs

Item = RequestOutput | FuriosaLLMError

MAX_PIECES = 256
"""Texts that wait one by one; beyond it they are joined, since each has an object's overhead."""


class ClientLeftError(Exception):
    """Nobody reads this mailbox any more."""


class Delta:
    """What is new of one choice."""

    __slots__ = ("_pieces", "choice", "finish_reason", "logprobs", "stop_reason", "token_ids")

    def __init__(self, choice: int, output: CompletionOutput) -> None:
        self.choice = choice
        self.token_ids = output.token_ids
        self.logprobs: SampleLogprobs | None = output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self._pieces = [output.text]

    @property
    def text(self) -> str:
        return self._pieces[0] if len(self._pieces) == 1 else "".join(self._pieces)

    def add(self, output: CompletionOutput) -> None:
        """Take what came after it."""
        self.token_ids += output.token_ids
        if self.logprobs is not None and output.logprobs is not None:
            self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self._pieces.append(output.text)
        if len(self._pieces) > MAX_PIECES:
            self._pieces = ["".join(self._pieces)]


class Delivery:
    """Carries outputs to the mailboxes of one event loop, which is woken once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Mailbox, int, Item]] = deque()
        self._is_scheduled = False  # the engine's thread alone sets it, the loop alone clears it

    def post(self, mailbox: Mailbox, first_choice: int, item: Item) -> None:
        """Put an output into a mailbox, on the loop. For the engine's thread."""
        self._items.append((mailbox, first_choice, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to read
                self._items.clear()
                self._is_scheduled = False

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is posted from here on schedules anew
        items = self._items
        touched: dict[Mailbox, None] = {}
        while items:
            mailbox, first_choice, item = items.popleft()
            mailbox.put(first_choice, item)
            touched[mailbox] = None
        for mailbox in touched:  # last: of several steps' outputs each reader is told once
            mailbox.tell()


class Sink:
    """Where one engine request puts its outputs (see `furiosa_llm.engine.request.Sink`)."""

    def __init__(self, mailbox: Mailbox, first_choice: int) -> None:
        self._post = mailbox.delivery.post
        self._mailbox = mailbox
        self._first_choice = first_choice

    def put(self, item: Item) -> None:
        self._post(self._mailbox, self._first_choice, item)


class Mailbox:
    """What has come for one reader, of one or several engine requests. It belongs to the loop.

    The choices of all its requests share one numbering: a request's first choice is given to its
    sink. There is one reader: it awaits `take`, or sets `listener`.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.num_cached_tokens = 0
        """Of the prompts that have put something, as far as it is known."""
        self.listener: Callable[[], None] | None = None
        """Called when there is something to `poll`; must not raise."""
        self._pending: dict[int, Delta] = {}
        self._cached: dict[int, int] = {}
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def sink(self, first_choice: int) -> Sink:
        """A sink for the request whose choices are numbered from `first_choice` on."""
        return Sink(self, first_choice)

    async def take(self) -> list[Delta]:
        """Wait for something new, then `poll`."""
        while not self._pending and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.poll()

    def poll(self) -> list[Delta]:
        """What is new, by choice.

        Raises: what ended a request, once all that came before it was polled; ClientLeftError.
        """
        if self._pending:
            pending, self._pending = self._pending, {}
            deltas = list(pending.values())
            if len(deltas) > 1:
                deltas.sort(key=lambda delta: delta.choice)
            return deltas
        if self._error is not None:
            raise self._error
        return []

    def put(self, first_choice: int, item: Item) -> None:
        """Take an output or what ended a request; `tell` is to follow. `sink` is for threads."""
        if isinstance(item, FuriosaLLMError):
            if self._error is None:
                self._error = item
            return
        pending = self._pending
        for output in item.outputs:
            choice = first_choice + output.index
            delta = pending.get(choice)
            if delta is None:
                pending[choice] = Delta(choice, output)
            else:
                delta.add(output)
        if item.num_cached_tokens and first_choice not in self._cached:
            self._cached[first_choice] = item.num_cached_tokens
            self.num_cached_tokens += item.num_cached_tokens

    def leave(self) -> None:
        """Its reader's client has gone: `poll` raises ClientLeftError from now on."""
        self._pending.clear()
        self._error = ClientLeftError()
        self.tell()

    def tell(self) -> None:
        """Let the reader look."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        elif self.listener is not None:
            self.listener()
