"""LLMEngine: requests are added, and `step` collects what they produce."""

from __future__ import annotations

from collections.abc import Iterable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from furiosa_llm.engine.core import EngineCore
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.request import Request
from furiosa_llm.engine.settings import EngineSettings, resolve_settings
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs
    from furiosa_llm.engine.llm import LLM
    from furiosa_llm.progress import Progress

Item = RequestOutput | FuriosaLLMError


class _SharedSink:
    """Puts one request's items, with its id, into the queue of all."""

    def __init__(self, request_id: str, queue: SimpleQueue[tuple[str, Item]]) -> None:
        self._request_id = request_id
        self._queue = queue

    def put(self, item: Item) -> None:
        self._queue.put((self._request_id, item))


class LLMEngine:
    """Runs requests on worker processes; use `from_engine_args` to make one.

    Work goes on between calls of `step`. For one thread; a request's id may be used again when its
    last output has been returned.
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
        self._items: SimpleQueue[tuple[str, Item]] = SimpleQueue()
        self._unfinished: dict[str, Request] = {}
        self._held_error: FuriosaLLMError | None = None  # raised by the next step

    @classmethod
    def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        progress: Progress | None = None,
        startup: StartupProgress | None = None,
    ) -> Self:
        """See `AsyncLLMEngine.from_engine_args`."""
        with HeadStart.of(args) as head_start:
            settings = resolve_settings(args, progress, startup)
            return cls(settings, startup=startup, head_start=head_start)

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """An engine over the workers of `llm`; shutting either down ends both."""
        return cls(llm.settings, llm.core)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._settings.inputs.tokenizer

    @property
    def isa(self) -> str:
        """The kernel family the workers run."""
        return self._core.isa

    @property
    def weights(self) -> str:
        """The type of the weights: fp32, bf16, int8 or int4."""
        return self._settings.weights

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """The sampling defaults that came with the checkpoint."""
        return self._settings.generation

    def status(self) -> EngineStatus:
        """What the engine and its workers are doing now; cheap, and any thread may ask."""
        return self._core.status()

    @property
    def worker_pids(self) -> list[int | None]:
        """The workers' process ids; None for one that is down."""
        return self._core.worker_pids

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> None:
        """Queue a request; see `AsyncLLMEngine.generate` for its parts and errors."""
        self.add_requests(
            [(request_id, prompt, sampling_params)], add_special_tokens=add_special_tokens
        )

    def add_requests(
        self,
        requests: Iterable[tuple[str, Any, SamplingParams | None]],
        *,
        add_special_tokens: bool = True,
    ) -> None:
        """Queue (request_id, prompt, sampling_params) triples; all are checked before any runs."""
        checked = [
            self._settings.inputs.make_request(
                request_id,
                prompt,
                params,
                _SharedSink(request_id, self._items),
                add_special_tokens=add_special_tokens,
            )
            for request_id, prompt, params in requests
        ]
        for request in checked:
            self._core.submit(request)
            self._unfinished[request.request_id] = request

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End these requests; `step` returns a last output with the finish reason "abort"."""
        self._core.abort([request_id] if isinstance(request_id, str) else request_id)

    def drop_requests(self) -> None:
        """End everything unfinished and return none of it."""
        for request in self._unfinished.values():
            self._core.drop(request)
        self._unfinished.clear()
        self._items = SimpleQueue()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to return or to wait for."""
        return bool(self._unfinished) or self._held_error is not None

    def step(self) -> list[RequestOutput]:
        """Everything new, at least one output; waits for it. [] when no request is unfinished.

        Raises: a request's own error, after the outputs that came before it were returned.
        """
        outputs: list[RequestOutput] = []
        if self._held_error is not None:
            error, self._held_error = self._held_error, None
            raise error
        while self._unfinished:
            try:
                request_id, item = self._items.get(block=not outputs)
            except Empty:
                break
            if isinstance(item, FuriosaLLMError):
                self._unfinished.pop(request_id, None)
                if not outputs:
                    raise item
                self._held_error = item
                break
            if item.finished:
                self._unfinished.pop(request_id, None)
            outputs.append(item)
        return outputs

    def check_health(self) -> None:
        """Return if all workers that are up answer.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        self._core.check_health()

    def restart_workers(self) -> None:
        """See `AsyncLLMEngine.restart_workers`."""
        self._core.restart_workers()

    def shutdown(self) -> None:
        """End all requests and workers, and wait for that; idempotent."""
        self._core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()
