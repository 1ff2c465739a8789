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
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.engine.attached_pool import AttachedPool
from furiosa_llm.engine.health import Health, HealthCheck
from furiosa_llm.engine.loads import LoadLedger
from furiosa_llm.engine.pace import Pace
from furiosa_llm.engine.pool import (
    Event,
    NoWorkerLeft,
    Pool,
    WorkerDown,
    WorkerLost,
    WorkerUp,
)
from furiosa_llm.engine.request import Choice, Request
from furiosa_llm.engine.rolling_restart import RollingRestart
from furiosa_llm.engine.router import Dispatch, Router
from furiosa_llm.engine.settings import EngineSettings
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.engine.status import EngineStatus, WorkerStatus
from furiosa_llm.engine.supervisor import MAX_CRASHES_PER_REQUEST
from furiosa_llm.engine.worker_pool import WorkerPool
from furiosa_llm.errors import (
    DuplicateRequestError,
    EngineShutDownError,
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    WorkerDiedError,
    WorkerStartError,
    from_wire,
    to_wire,
)
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    MAX_FRONT_ENDS,
    Abort,
    Add,
    Added,
    Configure,
    Idle,
    Ping,
    Pong,
    Refused,
    Tokens,
    first_sequence_id,
)
from furiosa_llm.wire.sockets import new_endpoint

MAX_DISPATCHED = 4096
"""Sequences sent to one worker at most, however many it may hold: far more than fit in a step, and
few enough that all their messages fit in its socket's queue even while it is busy with a step."""

REOPEN_AFTER_S = 0.05
"""After so long a worker that other front-ends have filled is asked again."""

_log = logging.getLogger(__name__)


class EngineCore:
    """Worker processes and the requests they run. Its public methods may be called by any thread.

    Args:
        startup: told how far the start is.
        ticket: share the workers of the engine that gave it, instead of starting any.
    Raises: WorkerStartError (or the worker's own ArtifactError, ...) if a worker does not start;
        none is left behind then.
    """

    def __init__(
        self,
        settings: EngineSettings,
        startup: StartupProgress | None = None,
        ticket: AttachTicket | None = None,
    ) -> None:
        self._settings = settings
        self._ticket = ticket
        self._front_end = 0 if ticket is None else ticket.front_end
        self._configures = settings.workers
        self._devices = settings.devices
        self._startup = startup or StartupProgress()
        self._max_num_seqs = settings.workers[0].max_num_seqs
        self._max_sequences = (
            len(settings.workers) * settings.max_processing_samples + settings.max_waiting
        )
        self._router = Router(
            max_sequences_per_worker=min(settings.max_processing_samples, MAX_DISPATCHED)
        )
        self._choices: dict[int, Choice] = {}  # by sequence id, while unfinished
        self._sequence_ids = itertools.count(first_sequence_id(self._front_end) + 1)
        self._health = Health()
        self._rolling: deque[RollingRestart] = deque()  # the first one is under way
        self._num_tickets = 0
        self._reopen_s = math.inf  # when workers that refused for want of room are asked again
        self.isa = ""
        self._loads = LoadLedger()

        self._lock = threading.Lock()  # guards what follows: callers and the thread share it
        self._live: dict[str, Request] = {}
        self._num_live_sequences = 0
        self._pace = Pace()
        self._commands: deque[Callable[[Pool], None]] = deque()
        self._ended_by: FuriosaLLMError | None = None  # why no request is taken any more

        # What only the thread uses from here on; it makes the pool, for sockets keep to a thread.
        self._pool: Pool | None = None
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
        """Over all workers, since the engine was made."""
        ids = range(len(self._configures))
        return sum(self._loads.total(worker_id).num_preemptions for worker_id in ids)

    def status(self) -> EngineStatus:
        """What the engine and its workers are doing now."""
        pool, ended_by = self._pool, self._ended_by
        workers = () if pool is None else map(partial(self._worker_status, pool), self._configures)
        return EngineStatus(
            workers=tuple(workers),
            block_size=self._configures[0].block_size,
            num_requests=len(self._live),
            num_sequences=self._num_live_sequences,
            num_waiting=self._router.num_waiting,
            max_sequences=self._max_sequences,
            ended_by=None if ended_by is None else str(ended_by),
            sequences_per_s=self._pace.per_s(time.monotonic()),
        )

    def _worker_status(self, pool: Pool, configure: Configure) -> WorkerStatus:
        worker_id = configure.worker_id
        state, load = pool.state(worker_id), self._loads.total(worker_id)
        return WorkerStatus(
            worker_id=worker_id,
            devices=self._devices[worker_id],
            pid=state.pid,
            epoch=state.epoch,
            is_up=state.is_up,
            phase=state.phase,
            num_dispatched=self._router.num_dispatched(worker_id),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_blocks=configure.num_blocks,
            restarts=state.restarts,
            num_preemptions=load.num_preemptions,
            num_steps=load.num_steps,
            num_computed_tokens=load.num_computed_tokens,
            num_output_tokens=load.num_output_tokens,
            last_message_s=state.last_message_s,
        )

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
            num_over = self._num_live_sequences + num_sequences - self._max_sequences
            if num_over > 0:
                retry_after_s = self._pace.retry_after_s(num_over, time.monotonic())
                raise OverloadedError(
                    f"{self._num_live_sequences} sequences are running or waiting and the limit is "
                    f"{self._max_sequences}: try again in {retry_after_s:.0f} s",
                    retry_after=retry_after_s,
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
        check = HealthCheck()
        self._call(lambda pool: self._ping(pool, check))
        if check.done.wait(timeout_s) and not check.problem:
            return
        with self._lock:
            self._refuse_if_ended()
        raise WorkerDiedError(check.problem or f"a worker has not answered within {timeout_s:g} s")

    def restart_workers(self) -> None:
        """Replace all workers, one at a time, and wait for that. No request fails of it:

        what a worker held goes on elsewhere, or there when its successor is up, with the same
        tokens.

        Raises: WorkerStartError if one does not come up again; EngineShutDownError.
            FuriosaLLMError where the workers are another engine's.
        """
        if self._ticket is not None:
            raise FuriosaLLMError("these workers are restarted by the engine that owns them")
        with self._lock:
            self._refuse_if_ended()
        restart = RollingRestart(range(len(self._configures)))
        self._call(lambda pool: self._begin_restart(pool, restart))
        restart.done.wait()
        if restart.error is not None:
            raise from_wire(*to_wire(restart.error))

    def share(self, num_front_ends: int = 1) -> list[AttachTicket]:
        """Tickets for as many other processes to be front-ends of these workers.

        Raises: FuriosaLLMError where the workers are another engine's, or there are too many.
        """
        if self._ticket is not None:
            raise FuriosaLLMError("these workers are shared by the engine that owns them")
        with self._lock:
            self._refuse_if_ended()
            first = self._num_tickets + 1
            if first + num_front_ends > MAX_FRONT_ENDS:
                raise FuriosaLLMError(f"{MAX_FRONT_ENDS - 1} front-ends can share workers at most")
            self._num_tickets += num_front_ends
        settings = self._settings
        tickets = [
            AttachTicket(
                front_end=first + index,
                endpoint=new_endpoint(),
                owner_pid=os.getpid(),
                tokenizer_dir=settings.tokenizer_dir,
                tokenizer_mode=settings.tokenizer_mode,
                seed=settings.inputs.engine_seed,
                max_waiting=settings.max_waiting,
                workers=settings.workers,
                devices=settings.devices,
            )
            for index in range(num_front_ends)
        ]
        for ticket in tickets:
            self._call(partial(self._attach, ticket))
        return tickets

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
        if self._settings.model.temporary is not None:
            self._settings.model.temporary.cleanup()

    def _refuse_if_ended(self) -> None:
        if self._ended_by is not None:  # a new error each time: raising one adds to its traceback
            raise from_wire(*to_wire(self._ended_by))

    def _call(self, command: Callable[[Pool], None]) -> None:
        self._commands.append(command)
        with self._lock:
            if self._wakeup_fd >= 0:  # else the thread has ended, and has failed all requests
                os.eventfd_write(self._wakeup_fd, 1)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._pool = pool = self._make_pool()
            self._startup.enter("starting workers")
            self._show_startup("loading")
            pool.start()
            while not self._is_stopping:
                for event in pool.wait():
                    self._handle(pool, event)
                while self._commands:
                    self._commands.popleft()(pool)
                if self._reopen_s < math.inf:
                    self._reopen(pool)
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

    def _make_pool(self) -> Pool:
        if self._ticket is not None:
            return AttachedPool(self._ticket, self._wakeup_fd)
        return WorkerPool(self._configures, self._wakeup_fd)

    def _show_startup(self, phase: str) -> None:
        for worker_id, devices in enumerate(self._devices):
            self._startup.worker(worker_id, devices, phase)

    def _handle(self, pool: Pool, event: Event) -> None:
        match event:
            case Tokens():
                self._take_tokens(pool, event)
            case Idle():
                self._loads.note(event.worker_id, event.load)
            case Added():
                pass  # the ledger has charged them since their dispatch
            case Refused():
                self._refused(pool, event)
            case Pong():
                self._health.pong(event.nonce, event.worker_id)
            case WorkerUp():
                self.isa = event.isa
                self._loads.up(event.worker_id, event.num_blocks)
                self._dispatch(pool, self._router.worker_up(event.worker_id))
                self._startup.worker(event.worker_id, self._devices[event.worker_id], "ready")
                if pool.is_complete and not self._started.is_set():
                    self._startup.enter("ready")
                    self._started.set()
                if self._rolling:
                    self._restart_next(pool, self._rolling[0].worker_up(event.worker_id))
            case WorkerDown():
                self._worker_down(pool, event)
            case WorkerLost():
                if self._rolling:
                    self._rolling[0].worker_lost(event.worker_id, event.reason)
                    self._restart_next(pool, None)
            case NoWorkerLeft():
                self._fail(WorkerDiedError(f"no worker is left: {event.reason}"))

    # --- requests ---------------------------------------------------------------------------------

    def _begin(self, pool: Pool, request: Request) -> None:
        with self._lock:
            ended_by = self._ended_by
        if ended_by is not None:
            self._end(pool, request, ended_by)
            return
        for index in range(len(request.sequence_params)):
            choice = Choice(index, next(self._sequence_ids), request)
            request.choices.append(choice)
            if request.resume_token_ids:
                choice.resume(request.resume_token_ids[index])
        running = [choice for choice in request.choices if choice.finish_reason is None]
        if len(running) != request.num_unfinished:
            text = "resume_token_ids: a choice has one of its stop strings already, so it has ended"
            self._end(pool, request, InvalidRequestError(text, param="resume_token_ids"))
            return
        self._choices.update((choice.sequence_id, choice) for choice in running)
        num_prompt_tokens = len(request.prompt_token_ids)
        lengths = [(c.sequence_id, num_prompt_tokens + len(c.token_ids)) for c in running]
        self._dispatch(pool, self._router.submit(lengths))

    def _dispatch(self, pool: Pool, effects: list[Dispatch]) -> None:
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

    def _abort(self, pool: Pool, request_ids: list[str]) -> None:
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

    def _end(self, pool: Pool, request: Request, error: FuriosaLLMError | None = None) -> None:
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
                num_sequences = len(request.sequence_params)
                self._num_live_sequences -= num_sequences
                self._pace.ended(num_sequences, time.monotonic())

    def _release(self, pool: Pool, choices: list[Choice]) -> None:
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
        self._health.fail(str(error))
        while self._rolling:
            self._rolling.popleft().fail(error)

    def _refused(self, pool: Pool, refused: Refused) -> None:
        choice = self._choices.get(refused.sequence_id)
        if choice is None:
            return
        if refused.error_code == OverloadedError.code:
            # Other front-ends have filled the worker. It is asked again when something of ours has
            # ended there, and after a while, for nothing of ours may be there.
            self._dispatch(pool, self._router.refused(refused.sequence_id))
            self._reopen_s = time.monotonic() + REOPEN_AFTER_S
            return
        self._end(pool, choice.request, from_wire(refused.error_code, refused.message))

    def _reopen(self, pool: Pool) -> None:
        """Ask workers that were full again, when it is time to."""
        if time.monotonic() >= self._reopen_s:
            self._reopen_s = math.inf
            self._dispatch(pool, self._router.reopen())
        if self._reopen_s < math.inf:
            pool.wake_by(self._reopen_s)

    # --- workers ----------------------------------------------------------------------------------

    def _take_tokens(self, pool: Pool, message: Tokens) -> None:
        self._loads.note(message.worker_id, message.load)
        logprobs = dict(message.logprobs)
        # A request with several choices in one step yields one output for them all.
        changed: dict[Request, list[Choice]] = {}
        grown: list[int] = []
        freed: list[int] = []
        stopped: list[Choice] = []
        has_failed = False
        choice_of = self._choices.get
        rows = zip(message.sequence_ids, message.token_ids, message.finish_codes, strict=True)
        for index, (sequence_id, token_id, finish_code) in enumerate(rows):
            choice = choice_of(sequence_id)
            if choice is None:
                continue  # aborted, and the worker had not heard of it yet
            request = choice.request
            try:
                choice.append(token_id, FINISH_REASONS[finish_code], logprobs.get(index))
            except Exception as error:  # a defect that one request meets must not end the others
                _log.exception("request %r cannot go on", request.request_id)
                text = f"the request failed: {type(error).__name__}: {error}"
                self._end(pool, request, FuriosaLLMError(text))
                has_failed = True
                continue
            if request in changed:
                changed[request].append(choice)
            else:
                changed[request] = [choice]
            if finish_code:
                del self._choices[sequence_id]
                freed.append(sequence_id)
            elif choice.finish_reason is not None:  # by a stop string: the worker does not know
                stopped.append(choice)
            else:
                grown.append(sequence_id)
        # First the ledger: what a reader is about to send must find it as it is.
        if has_failed:  # and with that request, others of its choices
            grown = [sequence_id for sequence_id in grown if sequence_id in self._choices]
        self._router.progress(message.worker_id, grown)
        for request, choices in changed.items():
            if request.is_over:  # one of its other choices has failed
                continue
            if request.is_finished:
                self._forget(request)  # before its reader hears of it and uses its id again
            request.put_output(choices)
        self._release(pool, stopped)
        self._dispatch(pool, self._router.finish(*freed))

    def _worker_down(self, pool: Pool, event: WorkerDown) -> None:
        """Move what the worker held, but for what seems to have killed it."""
        self._loads.down(event.worker_id)
        if not pool.is_complete:
            self._startup.worker(event.worker_id, self._devices[event.worker_id], "failed")
            self._startup.enter("failed")
            self._start_error = event.start_error or WorkerStartError(event.cause)
            self._is_stopping = True
            return
        self._health.worker_down(event.worker_id, len(pool.up))
        lost = self._router.worker_down(event.worker_id)
        orphans = [choice for choice in map(self._choices.get, lost) if choice is not None]
        for index, choice in enumerate(() if event.was_asked else orphans):
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

    def _ping(self, pool: Pool, check: HealthCheck) -> None:
        up = pool.up
        nonce = self._health.begin(check, up)
        for worker_id in up:
            pool.send(worker_id, Ping(nonce))

    def _attach(self, ticket: AttachTicket, pool: Pool) -> None:
        pool.attach(ticket.front_end, ticket.endpoint)

    def _begin_restart(self, pool: Pool, restart: RollingRestart) -> None:
        if self._ended_by is not None:
            restart.fail(self._ended_by)
            return
        self._rolling.append(restart)
        if len(self._rolling) == 1:
            self._restart_next(pool, restart.begin())

    def _restart_next(self, pool: Pool, worker_id: int | None) -> None:
        """Restart this worker; with none, whatever the next rolling restart begins with."""
        if worker_id is None and self._rolling and self._rolling[0].done.is_set():
            self._rolling.popleft()
            if self._rolling:
                self._restart_next(pool, self._rolling[0].begin())
        if worker_id is not None:
            if pool.state(worker_id).phase == "lost":  # nothing to restart: it stays down
                self._restart_next(pool, self._rolling[0].worker_up(worker_id))
            else:
                pool.restart(worker_id)

    def _stop(self, pool: Pool) -> None:
        self._is_stopping = True
