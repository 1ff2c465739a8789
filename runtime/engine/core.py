"""The engine's thread: it moves messages between callers and workers, and obeys router and policy.

One thread owns the socket, the worker processes and every running request. Callers hand it commands
and are answered through their request's sink, so that asyncio and plain threads are served alike.
It sleeps until a message, a command, the end of a process or a due restart wakes it: an idle engine
costs nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.engine.attached_pool import AttachedPool
from furiosa_llm.engine.counts import EngineCounts
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.health import Health, HealthCheck
from furiosa_llm.engine.live_requests import LiveRequests
from furiosa_llm.engine.loads import LoadLedger
from furiosa_llm.engine.pool import (
    Event,
    NoWorkerLeft,
    Pool,
    WorkerDown,
    WorkerLost,
    WorkerUp,
)
from furiosa_llm.engine.request import Request
from furiosa_llm.engine.rolling_restart import RollingRestart
from furiosa_llm.engine.running import RunningSequences
from furiosa_llm.engine.settings import EngineSettings
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.engine.status import EngineStatus, WorkerStatus
from furiosa_llm.engine.worker_pool import WorkerPool
from furiosa_llm.errors import (
    EngineShutDownError,
    FuriosaLLMError,
    WorkerDiedError,
    WorkerStartError,
    from_wire,
    to_wire,
)
from furiosa_llm.wire.messages import (
    MAX_FRONT_ENDS,
    Added,
    Configure,
    Idle,
    Ping,
    Pong,
    Refused,
    Tokens,
)
from furiosa_llm.wire.sockets import new_endpoint

_log = logging.getLogger(__name__)


class EngineCore:
    """Worker processes and the requests they run. Its public methods may be called by any thread.

    Args:
        startup: told how far the start is.
        ticket: share the workers of the engine that gave it, instead of starting any.
        head_start: worker processes that were started already.
    Raises: WorkerStartError (or the worker's own ArtifactError, ...) if a worker does not start;
        none is left behind then.
    """

    def __init__(
        self,
        settings: EngineSettings,
        startup: StartupProgress | None = None,
        ticket: AttachTicket | None = None,
        head_start: HeadStart | None = None,
    ) -> None:
        self._settings = settings
        self._ticket = ticket
        self._head_start = head_start
        self._configures = settings.workers
        self._devices = settings.devices
        self._startup = startup or StartupProgress()
        self._live = LiveRequests(
            len(settings.workers) * settings.max_processing_samples + settings.max_waiting
        )
        self.counts = EngineCounts(len(settings.workers))
        self._running = RunningSequences(
            self._live,
            self.counts,
            front_end=0 if ticket is None else ticket.front_end,
            max_per_worker=settings.max_processing_samples,
            max_num_seqs=settings.workers[0].max_num_seqs,
        )
        self._health = Health()
        self._rolling: deque[RollingRestart] = deque()  # the first one is under way
        self._num_tickets = 0
        self.isa = ""
        self._loads = LoadLedger()

        self._lock = threading.Lock()  # guards what follows: callers and the thread share it
        self._commands: deque[Callable[[Pool], None]] = deque()

        # What only the thread uses from here on; it makes the pool, for sockets keep to a thread.
        self._pool: Pool | None = None
        self._is_stopping = False
        self._started = threading.Event()
        self._start_error: FuriosaLLMError | None = None
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_woken = False  # whether the thread will look at the commands once more
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
        pool, live, ended_by = self._pool, self._live, self._live.ended_by
        workers = () if pool is None else map(partial(self._worker_status, pool), self._configures)
        return EngineStatus(
            workers=tuple(workers),
            block_size=self._configures[0].block_size,
            num_requests=live.num_requests,
            num_sequences=live.num_sequences,
            num_waiting=self._running.num_waiting,
            max_sequences=live.max_sequences,
            ended_by=None if ended_by is None else str(ended_by),
            sequences_per_s=live.sequences_per_s,
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
            num_dispatched=self._running.num_dispatched(worker_id),
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
        self._live.add(request)
        self._call(lambda pool: self._running.begin(pool, request))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; their readers get a last output. Unknown ids are no error."""
        ids = list(request_ids)
        self._call(lambda pool: self._running.abort(pool, ids))

    def drop(self, request: Request) -> None:
        """End a request that nobody reads any more; nothing if it has ended."""
        if not request.is_over:
            self._live.forget(request)  # at once: its id is free when this returns
            self._call(lambda pool: self._running.end(pool, request))

    def check_health(self, timeout_s: float = 10.0) -> None:
        """Return if every worker that is up answers between two of its steps.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        self._live.refuse_if_ended()
        check = HealthCheck()
        self._call(lambda pool: self._ping(pool, check))
        if check.done.wait(timeout_s) and not check.problem:
            return
        self._live.refuse_if_ended()
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
        self._live.refuse_if_ended()
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
        self._live.refuse_if_ended()
        with self._lock:
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
        self._live.end(EngineShutDownError("the engine was shut down: make a new one to go on"))
        self._call(self._stop)
        self._thread.join()
        atexit.unregister(self.shutdown)
        if self._settings.model.temporary is not None:
            self._settings.model.temporary.cleanup()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have it called, by whichever thread, when no request is taken any more; now if so."""
        self._live.when_ended(callback)

    def _call(self, command: Callable[[Pool], None]) -> None:
        self._commands.append(command)
        if self._is_woken:  # it has yet to look: many requests at once wake it once
            return
        with self._lock:
            if self._wakeup_fd >= 0:  # else the thread has ended, and has failed all requests
                self._is_woken = True
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
                self._is_woken = False  # before it looks: what is added from here on wakes it anew
                while self._commands:
                    self._commands.popleft()(pool)
                self._running.reopen(pool)
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
        return WorkerPool(self._configures, self._wakeup_fd, self._head_start)

    def _show_startup(self, phase: str) -> None:
        for worker_id, devices in enumerate(self._devices):
            self._startup.worker(worker_id, devices, phase)

    def _handle(self, pool: Pool, event: Event) -> None:
        match event:
            case Tokens():
                self._loads.note(event.worker_id, event.load)
                self._running.take_tokens(pool, event)
            case Idle():
                self._loads.note(event.worker_id, event.load)
            case Added():
                pass  # the ledger has charged them since their dispatch
            case Refused():
                self._running.refused(pool, event)
            case Pong():
                self._health.pong(event.nonce, event.worker_id)
            case WorkerUp():
                self.isa = event.isa
                self._loads.up(event.worker_id, event.num_blocks)
                self._running.worker_up(pool, event.worker_id)
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

    def _fail(self, error: FuriosaLLMError) -> None:
        """Take no more requests, and fail those that run."""
        for request in self._live.end(error):
            self._live.forget(request)
            if not request.is_over:
                request.put_error(error)
        self._running.clear()
        self._health.fail(str(error))
        while self._rolling:
            self._rolling.popleft().fail(error)

    # --- workers ----------------------------------------------------------------------------------

    def _worker_down(self, pool: Pool, event: WorkerDown) -> None:
        self._loads.down(event.worker_id)
        if not pool.is_complete:
            self._startup.worker(event.worker_id, self._devices[event.worker_id], "failed")
            self._startup.enter("failed")
            self._start_error = event.start_error or WorkerStartError(event.cause)
            self._is_stopping = True
            return
        self._health.worker_down(event.worker_id, len(pool.up))
        self._running.worker_down(pool, event)

    def _ping(self, pool: Pool, check: HealthCheck) -> None:
        up = pool.up
        nonce = self._health.begin(check, up)
        for worker_id in up:
            pool.send(worker_id, Ping(nonce))

    def _attach(self, ticket: AttachTicket, pool: Pool) -> None:
        pool.attach(ticket.front_end, ticket.endpoint)

    def _begin_restart(self, pool: Pool, restart: RollingRestart) -> None:
        if (ended_by := self._live.ended_by) is not None:
            restart.fail(ended_by)
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
