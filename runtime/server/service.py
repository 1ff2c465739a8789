"""What all ways into the server share: the engine, its state, and who is being served.

A service lives on one event loop and goes STARTING -> READY -> DRAINING, or FAILED from any state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from functools import partial
from hashlib import blake2b
from typing import TypeVar

from furiosa_llm.args import EngineArgs
from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.settings import resolve_settings
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.errors import FuriosaLLMError, OverloadedError, ServiceUnavailableError
from furiosa_llm.server.limits import Limits
from furiosa_llm.server.mailbox import Delivery
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.metrics_hooks import MetricsHooks

T = TypeVar("T")

Report = Callable[[str, int, int], None]
"""(phase, how much of it is done, of how much); any thread may call it."""

Build = Callable[[EngineArgs, Report], AsyncLLMEngine]

NUM_TEXT_THREADS = 2
"""For long prompts and templates: more would only take cores from the workers."""

STARTING_RETRY_AFTER_S = 2.0
DRAINING_RETRY_AFTER_S = 5.0

_log = logging.getLogger(__name__)


class ServiceState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


def build_engine(
    args: EngineArgs,
    report: Report,
    *,
    startup: StartupProgress | None = None,
    head_start: HeadStart | None = None,
) -> AsyncLLMEngine:
    """Find or build the model and start the workers, or configure those that have a head start."""
    with HeadStart.of(args) if head_start is None else head_start as workers:
        report("loading the model", 0, 0)
        settings = resolve_settings(args, report, startup)
        report("starting the workers", 0, len(settings.workers))
        return AsyncLLMEngine(settings, startup=startup, head_start=workers)


class Service:
    """The engine behind every way in. Make it on the event loop that it is to live on.

    Args:
        engine_args: of the engine that `start` builds.
        served_model_names: what clients call the model, the first of which answers carry by
            default; empty: the last part of the model's path or id.
        chat_template: Jinja source to use instead of the model's own.
        build: makes the engine, on a thread; None: `build_engine`.
        startup: what `build` tells how far it is.
    """

    def __init__(
        self,
        engine_args: EngineArgs,
        *,
        served_model_names: Sequence[str] = (),
        limits: Limits | None = None,
        chat_template: str | None = None,
        metrics: MetricsHooks | None = None,
        build: Build | None = None,
        startup: StartupProgress | None = None,
    ) -> None:
        names = tuple(dict.fromkeys(served_model_names))
        self.served_model_names = names or (_name_of(engine_args.model),)
        self.model_name = self.served_model_names[0]
        self.created = int(time.time())
        self.artifact_id = ""  # until it is ready
        self.fingerprint = ""
        self.limits = Limits() if limits is None else limits
        self.chat_template = chat_template
        self.metrics: MetricsHooks = Metrics() if metrics is None else metrics
        self.state = ServiceState.STARTING
        self.phase = "waiting"
        self.progress: tuple[int, int] = (0, 0)
        self.startup = StartupProgress() if startup is None else startup
        self.failure: FuriosaLLMError | None = None
        self.num_in_flight = 0
        self._num_sequences = 0
        self._capacity = 0  # sequences that can run at once
        self._args = engine_args
        self._build = partial(build_engine, startup=self.startup) if build is None else build
        self._engine: AsyncLLMEngine | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._text_threads = ThreadPoolExecutor(NUM_TEXT_THREADS, "furiosa-text")
        self.delivery = Delivery(asyncio.get_running_loop())

    @property
    def engine(self) -> AsyncLLMEngine:
        """The engine. Raises: ServiceUnavailableError unless the service is ready."""
        if self.state is not ServiceState.READY:
            raise self.unavailable()
        assert self._engine is not None
        return self._engine

    @property
    def engine_or_none(self) -> AsyncLLMEngine | None:
        """The engine in whatever state the service is, once there is one."""
        return self._engine

    async def start(self) -> None:
        """Build the engine and become ready.

        Raises: whatever kept it from starting, after `fail`.
        """
        try:
            engine, artifact_id = await asyncio.to_thread(self._build_engine)
        except FuriosaLLMError as error:
            self.fail(error)
            raise
        except Exception as error:
            _log.exception("the engine could not be built")
            failure = FuriosaLLMError(f"the engine could not be built: {error}")
            self.fail(failure)
            raise failure from error
        self._engine, self.artifact_id = engine, artifact_id
        self.fingerprint = _fingerprint(artifact_id, engine.isa)
        self._capacity = sum(worker.max_num_seqs for worker in engine.settings.workers)
        if self.state is ServiceState.STARTING:  # else somebody began to drain meanwhile
            self.state = ServiceState.READY
            self._report("ready", 1, 1)

    def fail(self, error: FuriosaLLMError) -> None:
        """Take no more requests, for good."""
        if self.state is not ServiceState.FAILED:
            self.state, self.failure, self.phase = ServiceState.FAILED, error, "failed"
            _log.error("the service has failed: %s", error)

    def begin_drain(self) -> None:
        """Take no more requests; those in flight go on."""
        if self.state is not ServiceState.FAILED:
            self.state, self.phase = ServiceState.DRAINING, "draining"

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight. Returns: whether that came within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the engine and what still runs in it; idempotent."""
        self.begin_drain()
        if self._engine is not None:
            await self._engine.shutdown()
        self._text_threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit(self, request_id: str, num_sequences: int = 1) -> Iterator[AsyncLLMEngine]:
        """Count a request as in flight. Yields: the engine.

        Raises: ServiceUnavailableError unless ready; OverloadedError if too much is waiting.
        """
        engine = self.engine
        most = self._capacity + self.limits.max_queue
        if self._num_sequences + num_sequences > most and self._num_sequences:
            raise OverloadedError(
                f"{self._num_sequences} sequences are running or waiting and the limit is {most}: "
                f"try again later"
            )
        self.num_in_flight += 1
        self._num_sequences += num_sequences
        self._idle.clear()
        try:
            yield engine
        finally:
            self.num_in_flight -= 1
            self._num_sequences -= num_sequences
            if self.num_in_flight == 0:
                self._idle.set()

    async def in_text_thread(self, call: Callable[[], T]) -> T:
        """Run slow text work (a long prompt, a long chat) without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, call)

    def _build_engine(self) -> tuple[AsyncLLMEngine, str]:
        engine = self._build(self._args, self._report)
        return engine, engine.settings.model.artifact.artifact_id

    def _report(self, phase: str, done: int, total: int) -> None:
        self.phase, self.progress = phase, (done, total)

    def unavailable(self) -> ServiceUnavailableError:
        """Why no request is taken, for one that comes nevertheless."""
        match self.state:
            case ServiceState.STARTING:
                return ServiceUnavailableError(
                    f"the server is starting ({self.phase}): try again soon",
                    retry_after=STARTING_RETRY_AFTER_S,
                )
            case ServiceState.DRAINING:
                return ServiceUnavailableError(
                    "the server is shutting down: try again later, or another server",
                    retry_after=DRAINING_RETRY_AFTER_S,
                )
        return ServiceUnavailableError(
            "the server has failed; its log says why", retry_after=DRAINING_RETRY_AFTER_S
        )


def _fingerprint(artifact_id: str, isa: str) -> str:
    """What an answer's bytes depend on besides the request: same fingerprint, same answer."""
    return "fp_" + blake2b(f"{artifact_id}/{isa}".encode(), digest_size=8).hexdigest()


def _name_of(model: str) -> str:
    """A model's name without its path: clients need not know where files lie."""
    return model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or model
