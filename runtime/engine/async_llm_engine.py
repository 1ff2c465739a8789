"""AsyncLLMEngine: requests as async generators."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from furiosa_llm.engine.core import EngineCore
from furiosa_llm.engine.settings import EngineSettings, resolve_settings
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs
    from furiosa_llm.engine.llm import LLM
    from furiosa_llm.workers.artifact.build import Progress

LONG_TEXT_CHARS = 2_000
"""Text from here on is tokenised on a thread: at about 0.5 µs a character (SmolLM2's tokeniser) it
would hold up the event loop for over 1 ms."""

Item = RequestOutput | FuriosaLLMError


class _LoopBridge:
    """Carries items from the engine's thread to queues of one event loop, a step's at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._is_scheduled = False  # only the engine's thread sets it, only the loop clears it

    def post(self, queue: asyncio.Queue[Item], item: Item) -> None:
        self._items.append((queue, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to read
                self._items.clear()
                self._is_scheduled = False  # so that the next item is cleared, too

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is posted from here on schedules anew
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


class _QueueSink:
    def __init__(self, bridge: _LoopBridge, queue: asyncio.Queue[Item]) -> None:
        self._bridge = bridge
        self._queue = queue

    def put(self, item: Item) -> None:
        self._bridge.post(self._queue, item)


class AsyncLLMEngine:
    """Runs requests on worker processes; use `from_engine_args` to make one.

    The workers start at once and are ready when the constructor returns. The engine belongs to no
    event loop: any may use it.
    """

    def __init__(self, settings: EngineSettings, core: EngineCore | None = None) -> None:
        self._settings = settings
        self._core = EngineCore(settings) if core is None else core
        self._bridge: _LoopBridge | None = None

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, progress: Progress | None = None) -> Self:
        """Find or build the model and start the workers.

        What fetching and building do is shown on standard error, or told to `progress`.

        Raises: DeviceError, ArtifactError, InvalidRequestError before anything is started;
            WorkerStartError, or the worker's own error, if a worker does not start.
        """
        return cls(resolve_settings(args, progress))

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """An engine over the workers of `llm`; shutting either down ends both."""
        return cls(llm.settings, llm.core)

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

    @property
    def worker_pids(self) -> list[int | None]:
        """The workers' process ids; None for one that is down."""
        return self._core.worker_pids

    @property
    def num_preemptions(self) -> int:
        """How often a running sequence had to make room, in the workers that are up."""
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
        queue: asyncio.Queue[Item] = asyncio.Queue()
        make_request = partial(
            self._settings.inputs.make_request,
            request_id,
            prompt,
            sampling_params,
            _QueueSink(self._bridge_to_running_loop(), queue),
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
                item = await queue.get()
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

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last output whose finish reason is "abort".

        An unknown id is no error: the request may just have ended.
        """
        self._core.abort([request_id])

    async def check_health(self) -> None:
        """Return if all workers that are up answer.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        await asyncio.to_thread(self._core.check_health)

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
