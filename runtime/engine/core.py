"""The engine's thread: it moves messages between callers and workers, and obeys router and policy.

One thread owns the socket, the worker processes and every running request. Callers hand it commands
and are answered through their request's sink, so that asyncio and plain threads are served alike.
It sleeps until a message, a command, the end of a process or a due restart wakes it: an idle engine
costs nothing.

Recovery is one rule: a sequence is its prompt, its tokens so far, its parameters and its seed. When
a worker dies, what it held is added to another one with the tokens that have arrived; a message of
the dead epoch that comes later is dropped, so no token is lost, repeated or changed.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable

from furiosa_llm.engine.request import Choice, Request
from furiosa_llm.engine.router import Dispatch, Router
from furiosa_llm.engine.settings import EngineSettings
from furiosa_llm.engine.supervisor import MAX_CRASHES_PER_REQUEST
from furiosa_llm.engine.worker_pool import Event, NoWorkerLeft, WorkerDown, WorkerPool, WorkerUp
from furiosa_llm.errors import (
    DuplicateRequestError,
    EngineShutDownError,
    FuriosaLLMError,
    OverloadedError,
    WorkerDiedError,
    WorkerStartError,
    from_wire,
    to_wire,
)
from furiosa_llm.wire.messages import FINISH_REASONS, Abort, Add, Added, Ping, Pong, Refused, Tokens

MAX_DISPATCHED = 4096
"""Sequences sent to one worker at most, however many it may hold: far more than fit in a step, and
few enough that all their messages fit in its socket's queue even while it is busy with a step."""

_log = logging.getLogger(__name__)


class EngineCore:
    """Worker processes and the requests they run. Its public methods may be called by any thread.

    Raises: WorkerStartError (or the worker's own ArtifactError, ...) if a worker does not start;
        none is left behind then.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._model = settings.model
        self._configures = settings.workers
        self._max_num_seqs = settings.workers[0].max_num_seqs
        self._max_sequences = (
            len(settings.workers) * settings.max_processing_samples + settings.max_waiting
        )
        self._router = Router(
            max_sequences_per_worker=min(settings.max_processing_samples, MAX_DISPATCHED)
        )
        self._choices: dict[int, Choice] = {}  # by sequence id, while unfinished
        self._sequence_ids = itertools.count(1)
        self._nonces = itertools.count(1)
        self._pings: dict[int, tuple[set[int], threading.Event]] = {}  # who still has to answer
        self.isa = ""
        self._last_step: dict[int, Tokens] = {}  # what each worker that is up said last

        self._lock = threading.Lock()  # guards what follows: callers and the thread share it
        self._live: dict[str, Request] = {}
        self._num_live_sequences = 0
        self._commands: deque[Callable[[WorkerPool], None]] = deque()
        self._ended_by: FuriosaLLMError | None = None  # why no request is taken any more

        # What only the thread uses from here on; it makes the pool, for sockets keep to a thread.
        self._pool: WorkerPool | None = None
        self._is_stopping = False
        self._started = threading.Event()
        self._start_error: FuriosaLLMError | None = None
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="furiosa-engine", daemon=True)
        self._thread.start()
        try:
            self._started.wait()
            if self._start_error is not None:
                raise self._start_error
        except BaseException:  # Ctrl-C, too: nothing is left behind
            self.shutdown()
            raise
        atexit.register(self.shutdown)

    # --- for callers ------------------------------------------------------------------------------

    @property
    def worker_pids(self) -> list[int | None]:
        """Process ids by worker id; None for one that is down."""
        return [] if self._pool is None else self._pool.pids

    @property
    def num_preemptions(self) -> int:
        """Over all workers that are up, since each of them started."""
        return sum(stats.num_preemptions for stats in list(self._last_step.values()))

    def submit(self, request: Request) -> None:
        """Queue a request; its sink gets all that follows.

        Raises: DuplicateRequestError, OverloadedError, EngineShutDownError, WorkerDiedError.
        """
        num_sequences = len(request.sequence_params)
        with self._lock:
            self._refuse_if_ended()
            if request.request_id in self._live:
                raise DuplicateRequestError(
                    f"request_id {request.request_id!r} already exist in the engine: use another, "
                    f"or wait for that request to end",
                    param="request_id",
                )
            if self._num_live_sequences + num_sequences > self._max_sequences:
                raise OverloadedError(
                    f"{self._num_live_sequences} sequences are running or waiting and the limit is "
                    f"{self._max_sequences}: try again later"
                )
            self._live[request.request_id] = request
            self._num_live_sequences += num_sequences
        self._call(lambda pool: self._begin(pool, request))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; their readers get a last output. Unknown ids are no error."""
        ids = list(request_ids)
        self._call(lambda pool: self._abort(pool, ids))

    def drop(self, request: Request) -> None:
        """End a request that nobody reads any more; nothing if it has ended."""
        if not request.is_over:
            self._forget(request)  # at once: its id is free when this returns
            self._call(lambda pool: self._end(pool, request))

    def check_health(self, timeout_s: float = 10.0) -> None:
        """Return if every worker that is up answers between two of its steps.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        with self._lock:
            self._refuse_if_ended()
        answered = threading.Event()
        self._call(lambda pool: self._ping(pool, answered))
        if not answered.wait(timeout_s):
            with self._lock:
                self._refuse_if_ended()
            raise WorkerDiedError(f"a worker has not answered within {timeout_s:g} s")

    def shutdown(self) -> None:
        """End all requests and workers and wait for that; idempotent."""
        with self._lock:
            if self._ended_by is None:
                self._ended_by = EngineShutDownError(
                    "the engine was shut down: make a new one to go on"
                )
        self._call(self._stop)
        self._thread.join()
        atexit.unregister(self.shutdown)
        if self._model.temporary is not None:
            self._model.temporary.cleanup()

    def _refuse_if_ended(self) -> None:
        if self._ended_by is not None:  # a new error each time: raising one adds to its traceback
            raise from_wire(*to_wire(self._ended_by))

    def _call(self, command: Callable[[WorkerPool], None]) -> None:
        self._commands.append(command)
        with self._lock:
            if self._wakeup_fd >= 0:  # else the thread has ended, and has failed all requests
                os.eventfd_write(self._wakeup_fd, 1)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._pool = pool = WorkerPool(self._configures, self._wakeup_fd)
            pool.start()
            while not self._is_stopping:
                for event in pool.wait():
                    self._handle(pool, event)
                while self._commands:
                    self._commands.popleft()(pool)
        except Exception as error:
            if isinstance(error, FuriosaLLMError):
                failure = error
            else:
                _log.exception("the engine cannot go on")
                failure = FuriosaLLMError(f"the engine failed: {type(error).__name__}: {error}")
            self._fail(failure)
            if not self._started.is_set():
                self._start_error = failure
        finally:
            if self._pool is not None:
                self._pool.close()
            self._fail(EngineShutDownError("the engine was shut down while this request ran"))
            with self._lock:
                os.close(self._wakeup_fd)
                self._wakeup_fd = -1
            self._started.set()

    def _handle(self, pool: WorkerPool, event: Event) -> None:
        match event:
            case Tokens():
                self._take_tokens(pool, event)
            case Added():
                pass  # the ledger has charged them since their dispatch
            case Refused():
                choice = self._choices.get(event.sequence_id)
                if choice is not None:
                    error = from_wire(event.error_code, event.message)
                    self._end(pool, choice.request, error)
            case Pong():
                self._pong(event)
            case WorkerUp():
                self.isa = event.isa
                self._dispatch(pool, self._router.worker_up(event.worker_id))
                if pool.is_complete:
                    self._started.set()
            case WorkerDown():
                self._worker_down(pool, event)
            case NoWorkerLeft():
                self._fail(WorkerDiedError(f"no worker is left: {event.reason}"))

    # --- requests ---------------------------------------------------------------------------------

    def _begin(self, pool: WorkerPool, request: Request) -> None:
        with self._lock:
            ended_by = self._ended_by
        if ended_by is not None:
            self._end(pool, request, ended_by)
            return
        for index in range(len(request.sequence_params)):
            choice = Choice(index, next(self._sequence_ids), request)
            request.choices.append(choice)
            self._choices[choice.sequence_id] = choice
        num_tokens = len(request.prompt_token_ids)
        self._dispatch(
            pool, self._router.submit([(c.sequence_id, num_tokens) for c in request.choices])
        )

    def _dispatch(self, pool: WorkerPool, effects: list[Dispatch]) -> None:
        for effect in effects:
            choice = self._choices[effect.sequence_id]
            request = choice.request
            add = Add(
                sequence_id=choice.sequence_id,
                token_ids=(*request.prompt_token_ids, *choice.token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                params=request.sequence_params[choice.index],
            )
            choice.num_resumed_tokens = len(choice.token_ids)
            pool.send(effect.worker_id, add)

    def _abort(self, pool: WorkerPool, request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = self._live.get(request_id)
            if request is None or request.is_over:
                continue
            unfinished = [c for c in request.choices if c.finish_reason is None]
            self._release(pool, unfinished)
            for choice in unfinished:
                choice.abort()
            self._forget(request)
            request.put_output(unfinished)

    def _end(
        self, pool: WorkerPool, request: Request, error: FuriosaLLMError | None = None
    ) -> None:
        """Stop what still runs of a request, and forget it; its reader gets the error, if any."""
        if request.is_over:
            return
        self._release(pool, request.choices)
        request.is_over = True
        self._forget(request)
        if error is not None:
            request.put_error(error)

    def _forget(self, request: Request) -> None:
        with self._lock:
            if self._live.get(request.request_id) is request:
                del self._live[request.request_id]
                self._num_live_sequences -= len(request.sequence_params)

    def _release(self, pool: WorkerPool, choices: list[Choice]) -> None:
        """Free these sequences wherever they are: in a worker, or waiting."""
        by_worker: dict[int, list[int]] = {}
        for choice in choices:
            if self._choices.pop(choice.sequence_id, None) is None:
                continue
            worker_id = self._router.worker_of(choice.sequence_id)
            if worker_id is not None:
                by_worker.setdefault(worker_id, []).append(choice.sequence_id)
        # First the aborts, so that what is dispatched into the freed room finds it free.
        for worker_id, sequence_ids in by_worker.items():
            pool.send(worker_id, Abort(tuple(sequence_ids)))
        self._dispatch(pool, self._router.finish(*(choice.sequence_id for choice in choices)))

    def _fail(self, error: FuriosaLLMError) -> None:
        """Take no more requests, and fail those that run."""
        with self._lock:
            if self._ended_by is None:
                self._ended_by = error
            live = list(self._live.values())
        for request in live:
            self._forget(request)
            if not request.is_over:
                request.put_error(error)
        self._choices.clear()

    # --- workers ----------------------------------------------------------------------------------

    def _take_tokens(self, pool: WorkerPool, message: Tokens) -> None:
        self._last_step[message.worker_id] = message
        logprobs = dict(message.logprobs)
        # A request with several choices in one step yields one output for them all.
        changed: dict[Request, list[Choice]] = {}
        freed: list[int] = []
        stopped: list[Choice] = []
        rows = zip(message.sequence_ids, message.token_ids, message.finish_codes, strict=True)
        for index, (sequence_id, token_id, finish_code) in enumerate(rows):
            choice = self._choices.get(sequence_id)
            if choice is None:
                continue  # aborted, and the worker had not heard of it yet
            try:
                choice.append(token_id, FINISH_REASONS[finish_code], logprobs.get(index))
            except Exception as error:  # a defect that one request meets must not end the others
                _log.exception("request %r cannot go on", choice.request.request_id)
                text = f"the request failed: {type(error).__name__}: {error}"
                self._end(pool, choice.request, FuriosaLLMError(text))
                continue
            changed.setdefault(choice.request, []).append(choice)
            if finish_code:
                del self._choices[sequence_id]
                freed.append(sequence_id)
            elif choice.finish_reason is not None:  # by a stop string: the worker does not know
                stopped.append(choice)
            else:
                self._router.progress(sequence_id, 1)
        for request, choices in changed.items():
            if request.is_over:  # one of its other choices has failed
                continue
            if request.is_finished:
                self._forget(request)  # before its reader hears of it and uses its id again
            request.put_output(choices)
        self._release(pool, stopped)
        self._dispatch(pool, self._router.finish(*freed))

    def _worker_down(self, pool: WorkerPool, event: WorkerDown) -> None:
        """Move what the worker held, but for what seems to have killed it."""
        self._last_step.pop(event.worker_id, None)
        if not pool.is_complete:
            self._start_error = event.start_error or WorkerStartError(event.cause)
            self._is_stopping = True
            return
        for nonce, (waiting, _) in list(self._pings.items()):
            if event.worker_id in waiting:
                del self._pings[nonce]
        lost = self._router.worker_down(event.worker_id)
        orphans = [choice for choice in map(self._choices.get, lost) if choice is not None]
        for index, choice in enumerate(orphans):
            # Only what ran can have killed it: it got tokens there, or was among the first in line.
            if index < self._max_num_seqs or len(choice.token_ids) > choice.num_resumed_tokens:
                choice.num_crashes += 1
            if choice.num_crashes >= MAX_CRASHES_PER_REQUEST:
                request_id = choice.request.request_id
                error = WorkerDiedError(
                    f"request {request_id!r} was running in {choice.num_crashes} workers that "
                    f"died, so it is not tried again; the last: {event.cause}"
                )
                self._end(pool, choice.request, error)
        to_move = [
            (choice.sequence_id, len(choice.request.prompt_token_ids) + len(choice.token_ids))
            for choice in orphans
            if choice.sequence_id in self._choices
        ]
        self._dispatch(pool, self._router.submit(to_move, first=True))

    def _ping(self, pool: WorkerPool, answered: threading.Event) -> None:
        nonce, up = next(self._nonces), set(pool.up)
        if not up:
            return  # all are down: the caller's wait ends by its timeout
        self._pings[nonce] = (up, answered)
        for worker_id in sorted(up):
            pool.send(worker_id, Ping(nonce))

    def _pong(self, pong: Pong) -> None:
        if pong.nonce not in self._pings:
            return
        waiting, answered = self._pings[pong.nonce]
        waiting.discard(pong.worker_id)
        if not waiting:
            del self._pings[pong.nonce]
            answered.set()

    def _stop(self, pool: WorkerPool) -> None:
        self._is_stopping = True
