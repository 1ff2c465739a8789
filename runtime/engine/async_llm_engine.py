"""AsyncLLMEngine: requests as async generators."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.engine.core import EngineCore
from furiosa_llm.engine.counts import EngineCounts
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.request import Request
from furiosa_llm.engine.settings import EngineSettings, resolve_settings, settings_of_ticket
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs
    from furiosa_llm.engine.llm import LLM
    from furiosa_llm.progress import Progress

LONG_TEXT_CHARS = 2_000
"""Text from here on is tokenised on a thread: at about 0.5 µs a character (SmolLM2's tokeniser) it
would hold up the event loop for over 1 ms."""

Item = RequestOutput | FuriosaLLMError


class _LoopBridge:
    """Carries items from the engine's thread to the streams of one event loop, a step's at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[_Stream, Item]] = deque()
        self._is_scheduled = False  # only the engine's thread sets it, only the loop clears it

    def post(self, stream: _Stream, item: Item) -> None:
        self._items.append((stream, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to read
                self._items.clear()
                self._is_scheduled = False  # so that the next item is cleared, too

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is posted from here on schedules anew
        items = self._items
        while items:
            stream, item = items.popleft()
            stream.deliver(item)


class _Stream:
    """A request's items on their way to its one reader; less than an asyncio.Queue, and faster.

    Args:
        is_cumulative: whether an output says all that the one before it says. Then a reader who is
            behind gets the newest alone, however long it was away.
    """

    def __init__(self, bridge: _LoopBridge, *, is_cumulative: bool) -> None:
        self._bridge = bridge
        self._is_cumulative = is_cumulative
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """On the engine's thread."""
        self._bridge.post(self, item)

    def deliver(self, item: Item) -> None:
        """On the loop."""
        if self._is_cumulative and self._items and isinstance(item, RequestOutput):
            self._items.pop()
        self._items.append(item)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():  # it was cancelled
                reader.set_result(None)

    async def next(self) -> Item:
        """The oldest item that was not taken yet, once there is one."""
        while not self._items:
            self._reader = self._bridge.loop.create_future()
            await self._reader
        return self._items.popleft()


class AsyncLLMEngine:
    """Runs requests on worker processes; use `from_engine_args` to make one.

    The workers start at once and are ready when the constructor returns. The engine belongs to no
    event loop: any may use it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        core: EngineCore | None = None,
        startup: StartupProgress | None = None,
        head_start: HeadStart | None = None,
    ) -> None:
        self._settings = settings
        if core is None:
            core = EngineCore(settings, startup, head_start=head_start)
        self._core = core
        self._bridge: _LoopBridge | None = None

    @classmethod
    def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        progress: Progress | None = None,
        startup: StartupProgress | None = None,
    ) -> Self:
        """Find or build the model and start the workers.

        What fetching and building do is shown on standard error, or told to `progress`; another
        thread may ask `startup` meanwhile how far the start is.

        Raises: DeviceError, ArtifactError, InvalidRequestError; WorkerStartError, or the worker's
            own error, if a worker does not start. Nothing is left behind then.
        """
        with HeadStart.of(args) as head_start:
            settings = resolve_settings(args, progress, startup)
            return cls(settings, startup=startup, head_start=head_start)

    @classmethod
    def attach(cls, ticket: AttachTicket) -> Self:
        """An engine over the workers of another process's engine, which has `share`d them.

        It may be shut down, or its process may die, without harm to the workers or to the others
        that share them. It ends when the owner's process does. Its status shows restarts of workers
        that it has seen, and of their sequences those that it sent.

        Raises: EngineShutDownError if the owner has ended; WorkerStartError if no worker comes.
        """
        settings = settings_of_ticket(ticket)
        return cls(settings, EngineCore(settings, ticket=ticket))

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """An engine over the workers of `llm`; shutting either down ends both."""
        return cls(llm.settings, llm.core)

    @property
    def settings(self) -> EngineSettings:
        """The model's facts, and how each worker is configured."""
        return self._settings

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._settings.inputs.tokenizer

    @property
    def weights(self) -> str:
        """The type of the weights: fp32, bf16, int8 or int4."""
        return self._settings.weights

    @property
    def isa(self) -> str:
        """The kernel family the workers run: tokens are bit-identical within one."""
        return self._core.isa

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._settings.inputs.max_model_len

    def status(self) -> EngineStatus:
        """What the engine and its workers are doing now; cheap, and any thread may ask."""
        return self._core.status()

    @property
    def counts(self) -> EngineCounts:
        """What it counts for whoever watches it: times of steps, waits in the queue."""
        return self._core.counts

    @property
    def worker_pids(self) -> list[int | None]:
        """The workers' process ids; None for one that is down."""
        return self._core.worker_pids

    @property
    def num_preemptions(self) -> int:
        """How often a running sequence had to make room for an older one, in all workers."""
        return self._core.num_preemptions

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as they are made (see `RequestOutputKind`).

        Args:
            prompt: a str, {"prompt": str}, or {"prompt_token_ids": [int, ...]}.
            sampling_params: None is `SamplingParams()`.
            request_id: any string that no running request has.
            add_special_tokens: to a prompt that is text, those the model wants around it.
        Raises: InvalidRequestError, ContextLengthError, DuplicateRequestError, OverloadedError,
            before anything is queued; WorkerDiedError, EngineShutDownError.
        Closing the generator early aborts the request and frees what it held.
        """
        is_cumulative = (
            sampling_params is None
            or getattr(sampling_params, "output_kind", None) is RequestOutputKind.CUMULATIVE
        )
        stream = _Stream(self._bridge_to_running_loop(), is_cumulative=is_cumulative)
        make_request = partial(
            self._settings.inputs.make_request,
            request_id,
            prompt,
            sampling_params,
            stream,
            add_special_tokens=add_special_tokens,
        )
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if isinstance(text, str) and len(text) >= LONG_TEXT_CHARS:
            request = await asyncio.to_thread(make_request)
        else:
            request = make_request()
        self._core.submit(request)
        try:
            while True:
                item = await stream.next()
                if isinstance(item, FuriosaLLMError):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._core.drop(request)

    def add_request(
        self, request_id: str, prompt: Any, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` with its arguments in another order."""
        return self.generate(prompt, sampling_params, request_id)

    def submit(self, request: Request) -> None:
        """Run a request that `settings.inputs` made; its own sink gets what `generate` yields.

        Raises: DuplicateRequestError, OverloadedError, WorkerDiedError, EngineShutDownError.
        """
        self._core.submit(request)

    def drop(self, request: Request) -> None:
        """End a submitted request that nobody reads any more; nothing if it has ended."""
        self._core.drop(request)

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last output whose finish reason is "abort".

        An unknown id is no error: the request may just have ended.
        """
        self._core.abort([request_id])

    async def check_health(self, timeout_s: float = 10.0) -> None:
        """Return if all workers that are up answer within the time.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        await asyncio.to_thread(self._core.check_health, timeout_s)

    async def ended(self) -> str:
        """Wait until the engine takes no more requests, for good. Returns: why that is."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        self._core.when_ended(tell)
        await ended.wait()
        ended_by = self._core.status().ended_by
        assert ended_by is not None
        return ended_by

    async def restart_workers(self) -> None:
        """Replace all worker processes, one at a time. No request fails of it, and none gets other
        tokens.

        Raises: WorkerStartError if a worker does not come up again (those after it are left as they
            are); EngineShutDownError; FuriosaLLMError where the workers are another engine's.
        """
        await asyncio.to_thread(self._core.restart_workers)

    def share(self, num_front_ends: int = 1) -> list[AttachTicket]:
        """A ticket for each of as many other processes to be front-ends of these workers, too.

        A ticket serves one process at a time (see `attach`), and the next when that has ended.
        """
        return self._core.share(num_front_ends)

    async def shutdown(self) -> None:
        """End all requests and workers, and wait for that; idempotent."""
        await asyncio.to_thread(self._core.shutdown)

    def _bridge_to_running_loop(self) -> _LoopBridge:
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = _LoopBridge(loop)
        return self._bridge

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._core.shutdown()
