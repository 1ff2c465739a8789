"""The engine's thread: it moves messages between callers and workers, and obeys router and policy.

One thread owns the socket, the worker processes and every running request. Callers hand it commands
and are answered through their request's sink, so that asyncio and plain threads are served alike.
It sleeps in `poll` until a message, a command, the end of a process (pidfd) or a due restart wakes
it: an idle engine costs nothing.

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
from contextlib import suppress
from dataclasses import replace
from typing import Any

import zmq

from furiosa_llm.engine.request import Choice, Request
from furiosa_llm.engine.router import Dispatch, Router
from furiosa_llm.engine.settings import EngineSettings
from furiosa_llm.engine.supervisor import MAX_CRASHES_PER_REQUEST, GiveUp, RestartPolicy, Start
from furiosa_llm.engine.worker_process import WorkerProcess
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
from furiosa_llm.wire.codec import decode_from_worker, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    Abort,
    Add,
    Added,
    Configure,
    FromWorker,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    StartFailed,
    Tokens,
    ToWorker,
)
from furiosa_llm.wire.sockets import bind_router, new_endpoint, remove_endpoint

MAX_DISPATCHED = 4096
"""Sequences sent to one worker at most, however many it may hold: far more than fit in a step, and
few enough that all their messages fit in its socket's queue even while it is busy with a step."""

START_TIMEOUT_S = 600.0
"""A worker that says nothing for so long is taken for stuck: mapping a model takes far less."""

LAST_WORDS_TIMEOUT_S = 0.5
"""How long to wait for the message in which a worker that has left said why it could not start."""

SEND_TIMEOUT_S = 5.0
"""A worker whose queue of thousands of messages stays full for so long is killed."""

SHUTDOWN_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class EngineCore:
    """Worker processes and the requests they run. Its public methods may be called by any thread.

    Raises: WorkerStartError (or the worker's own ArtifactError, ...) if a worker does not start;
        none is left behind then.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._model = settings.model
        self._configures = settings.workers
        self._max_sequences = (
            len(settings.workers) * settings.max_processing_samples + settings.max_waiting
        )
        self._router = Router(
            max_sequences_per_worker=min(settings.max_processing_samples, MAX_DISPATCHED)
        )
        self._policies = [RestartPolicy() for _ in settings.workers]
        self._workers: list[WorkerProcess | None] = [None] * len(settings.workers)
        self._choices: dict[int, Choice] = {}  # by sequence id, while unfinished
        self._sequence_ids = itertools.count(1)
        self._nonces = itertools.count(1)
        self._pings: dict[int, tuple[set[int], threading.Event]] = {}  # who still has to answer
        self.isa = ""
        self._last_step: dict[int, Tokens] = {}  # what each worker that is up said last

        self._lock = threading.Lock()  # guards what follows: callers and the thread share it
        self._live: dict[str, Request] = {}
        self._num_live_sequences = 0
        self._commands: deque[Callable[[], None]] = deque()
        self._ended_by: FuriosaLLMError | None = None  # why no request is taken any more

        # What only the thread uses from here on; it makes the socket, for sockets keep to a thread.
        self._router_socket: zmq.Socket[Any]
        self._poller = zmq.Poller()
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
        return [None if worker is None else worker.pid for worker in self._workers]

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
        self._call(lambda: self._begin(request))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; their readers get a last output. Unknown ids are no error."""
        ids = list(request_ids)
        self._call(lambda: self._abort(ids))

    def drop(self, request: Request) -> None:
        """End a request that nobody reads any more; nothing if it has ended."""
        if not request.is_over:
            self._forget(request)  # at once: its id is free when this returns
            self._call(lambda: self._end(request))

    def check_health(self, timeout_s: float = 10.0) -> None:
        """Return if every worker that is up answers between two of its steps.

        Raises: EngineShutDownError, WorkerDiedError.
        """
        with self._lock:
            self._refuse_if_ended()
        answered = threading.Event()
        self._call(lambda: self._ping(answered))
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

    def _call(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        with self._lock:
            if self._wakeup_fd >= 0:  # else the thread has ended, and has failed all requests
                os.eventfd_write(self._wakeup_fd, 1)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        endpoint = ""
        try:
            endpoint = new_endpoint()
            self._router_socket = bind_router(context, endpoint)
            self._router_socket.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))
            self._poller.register(self._router_socket, zmq.POLLIN)
            self._poller.register(self._wakeup_fd, zmq.POLLIN)
            self._configures = tuple(replace(c, endpoint=endpoint) for c in self._configures)
            for configure in self._configures:
                self._start_worker(configure)
            while not self._is_stopping:
                self._round()
        except Exception as error:
            _log.exception("the engine cannot go on")
            failure = FuriosaLLMError(f"the engine failed: {type(error).__name__}: {error}")
            self._fail(failure)
            if not self._started.is_set():
                self._start_error = failure
        finally:
            self._close_workers()
            self._fail(EngineShutDownError("the engine was shut down while this request ran"))
            context.destroy(linger=0)
            remove_endpoint(endpoint)
            with self._lock:
                os.close(self._wakeup_fd)
                self._wakeup_fd = -1
            self._started.set()

    def _round(self) -> None:
        """Sleep until something happens, and handle it."""
        events = dict(self._poller.poll(self._sleep_ms()))
        if self._wakeup_fd in events:
            os.eventfd_read(self._wakeup_fd)
            while self._commands:
                self._commands.popleft()()
        # Messages before deaths: what a worker still said is then counted before it is replaced.
        if self._router_socket in events:
            self._receive()
        for worker in self._workers:
            if worker is not None and worker.pid_fd in events:
                self._worker_exited(worker)
        now_s = time.monotonic()
        for worker_id, policy in enumerate(self._policies):
            self._obey(worker_id, policy.tick(now_s))
        for worker in self._workers:
            if worker is not None and not worker.is_ready and now_s > worker.start_deadline_s:
                worker.start_error = WorkerStartError(
                    f"worker {worker.configure.worker_id} was not ready within {START_TIMEOUT_S:g} s"
                )
                worker.start_deadline_s = math.inf
                worker.kill()

    def _sleep_ms(self) -> int | None:
        due_s = min(policy.due_s for policy in self._policies)
        for worker in self._workers:
            if worker is not None and not worker.is_ready:
                due_s = min(due_s, worker.start_deadline_s)
        if math.isinf(due_s):
            return None
        return math.ceil(max(0.0, due_s - time.monotonic()) * 1000)

    # --- requests ---------------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        with self._lock:
            ended_by = self._ended_by
        if ended_by is not None:
            self._end(request, ended_by)
            return
        for index in range(len(request.sequence_params)):
            choice = Choice(index, next(self._sequence_ids), request)
            request.choices.append(choice)
            self._choices[choice.sequence_id] = choice
        num_tokens = len(request.prompt_token_ids)
        self._dispatch(self._router.submit([(c.sequence_id, num_tokens) for c in request.choices]))

    def _dispatch(self, effects: list[Dispatch]) -> None:
        for effect in effects:
            choice = self._choices[effect.sequence_id]
            request = choice.request
            add = Add(
                sequence_id=choice.sequence_id,
                token_ids=(*request.prompt_token_ids, *choice.token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                params=request.sequence_params[choice.index],
            )
            worker = self._workers[effect.worker_id]
            assert worker is not None
            self._send(worker, add)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = self._live.get(request_id)
            if request is None or request.is_over:
                continue
            unfinished = [c for c in request.choices if c.finish_reason is None]
            self._release(unfinished)
            for choice in unfinished:
                choice.abort()
            self._forget(request)
            request.put_output(unfinished)

    def _end(self, request: Request, error: FuriosaLLMError | None = None) -> None:
        """Stop what still runs of a request, and forget it; its reader gets the error, if any."""
        if request.is_over:
            return
        self._release([c for c in request.choices if c.finish_reason is None])
        request.is_over = True
        self._forget(request)
        if error is not None:
            request.put_error(error)

    def _forget(self, request: Request) -> None:
        with self._lock:
            if self._live.get(request.request_id) is request:
                del self._live[request.request_id]
                self._num_live_sequences -= len(request.sequence_params)

    def _release(self, choices: list[Choice]) -> None:
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
            worker = self._workers[worker_id]
            if worker is not None:
                self._send(worker, Abort(tuple(sequence_ids)))
        self._dispatch(self._router.finish(*(choice.sequence_id for choice in choices)))

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

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        while True:
            try:
                frames = self._router_socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 2:
                    raise WireError(f"a message of {len(frames)} frames instead of two")
                message = decode_from_worker(frames[1])
            except WireError as error:
                _log.warning("dropped a malformed message of a worker: %s", error)
                continue
            worker = self._sender(message)
            if worker is None or worker.identity != frames[0]:
                continue  # of a dead epoch, or of nobody
            if message.seq != worker.next_seq:
                _log.error(
                    "worker %d sent message %d where %d was due: replacing it",
                    message.worker_id, message.seq, worker.next_seq,
                )  # fmt: skip
                worker.kill()
                continue
            worker.next_seq += 1
            self._handle(worker, message)

    def _sender(self, message: FromWorker) -> WorkerProcess | None:
        if not message.worker_id < len(self._workers):
            return None
        worker = self._workers[message.worker_id]
        return worker if worker is not None and worker.configure.epoch == message.epoch else None

    def _handle(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case Tokens():
                self._take_tokens(message)
            case Added():
                pass  # the ledger has charged them since their dispatch
            case Refused():
                choice = self._choices.get(message.sequence_id)
                if choice is not None:
                    self._end(choice.request, from_wire(message.error_code, message.message))
            case Ready():
                worker.is_ready = True
                self.isa = message.isa
                self._dispatch(self._router.worker_up(message.worker_id))
                if all(w is not None and w.is_ready for w in self._workers):
                    self._started.set()
            case StartFailed():
                worker.start_error = from_wire(message.error_code, message.message)
            case Pong():
                waiting, answered = self._pings.get(message.nonce, (set(), threading.Event()))
                waiting.discard(message.worker_id)
                if not waiting:
                    self._pings.pop(message.nonce, None)
                    answered.set()

    def _take_tokens(self, message: Tokens) -> None:
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
            choice.append(token_id, FINISH_REASONS[finish_code], logprobs.get(index))
            changed.setdefault(choice.request, []).append(choice)
            if finish_code:
                del self._choices[sequence_id]
                freed.append(sequence_id)
            elif choice.finish_reason is not None:  # by a stop string: the worker does not know
                stopped.append(choice)
            else:
                self._router.progress(sequence_id, 1)
        for request, choices in changed.items():
            if request.is_finished:
                self._forget(request)  # before its reader hears of it and uses its id again
            request.put_output(choices)
        self._release(stopped)
        self._dispatch(self._router.finish(*freed))

    def _send(self, worker: WorkerProcess, message: ToWorker) -> None:
        try:
            self._router_socket.send_multipart([worker.identity, encode(message)])
        except zmq.Again:
            _log.error("worker %d reads nothing: replacing it", worker.configure.worker_id)
            worker.kill()
        except zmq.ZMQError as error:
            # It has just died; its process's end, which is about to be seen, moves its sequences.
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def _ping(self, answered: threading.Event) -> None:
        up = {w.configure.worker_id for w in self._workers if w is not None and w.is_ready}
        if not up:
            return  # all are down: the caller's wait ends by its timeout
        nonce = next(self._nonces)
        self._pings[nonce] = (up, answered)
        for worker_id in sorted(up):
            worker = self._workers[worker_id]
            assert worker is not None
            self._send(worker, Ping(nonce))

    # --- processes --------------------------------------------------------------------------------

    def _start_worker(self, configure: Configure) -> None:
        worker = WorkerProcess(configure, start_deadline_s=time.monotonic() + START_TIMEOUT_S)
        self._workers[configure.worker_id] = worker
        self._poller.register(worker.pid_fd, zmq.POLLIN)

    def _worker_exited(self, worker: WorkerProcess) -> None:
        worker_id = worker.configure.worker_id
        self._receive()  # its last words: tokens, or why it could not start
        if not worker.is_ready and worker.has_failed:
            self._await_start_error(worker)
        self._poller.unregister(worker.pid_fd)
        cause = worker.reap()
        self._workers[worker_id] = None
        self._last_step.pop(worker_id, None)
        if not self._started.is_set():
            self._fail_start(worker.start_error or WorkerStartError(f"{cause}"))
            return
        _log.warning("%s", f"{cause}: {worker.start_error}" if worker.start_error else cause)
        self._orphaned(self._router.worker_down(worker_id), cause)
        for nonce, (waiting, _) in list(self._pings.items()):
            if worker_id in waiting:
                del self._pings[nonce]
        self._obey(worker_id, self._policies[worker_id].exited(time.monotonic()))

    def _await_start_error(self, worker: WorkerProcess) -> None:
        """The process's end may be seen before the message it sent, which is on its way then."""
        deadline_s = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while worker.start_error is None and (left_s := deadline_s - time.monotonic()) > 0:
            if self._router_socket.poll(math.ceil(left_s * 1000)):
                self._receive()

    def _orphaned(self, sequence_ids: list[int], cause: str) -> None:
        """Move the sequences of a dead worker, but for those that seem to have killed it."""
        to_move: list[tuple[int, int]] = []
        for sequence_id in sequence_ids:
            choice = self._choices.get(sequence_id)
            if choice is None:
                continue
            choice.num_crashes += 1
            if choice.num_crashes >= MAX_CRASHES_PER_REQUEST:
                self._end(
                    choice.request,
                    WorkerDiedError(
                        f"request {choice.request.request_id!r} was running in "
                        f"{choice.num_crashes} workers that died, so it is not tried again; the "
                        f"last: {cause}"
                    ),
                )
            else:
                num_tokens = len(choice.request.prompt_token_ids) + len(choice.token_ids)
                to_move.append((sequence_id, num_tokens))
        alive = [(i, n) for i, n in to_move if i in self._choices]
        self._dispatch(self._router.submit(alive, first=True))

    def _obey(self, worker_id: int, effects: list[Start | GiveUp]) -> None:
        for effect in effects:
            match effect:
                case Start(epoch):
                    try:
                        self._start_worker(replace(self._configures[worker_id], epoch=epoch))
                    except OSError as error:  # no memory, processes or descriptors left just now
                        _log.error("worker %d cannot be started: %s", worker_id, error)
                        self._obey(worker_id, self._policies[worker_id].exited(time.monotonic()))
                case GiveUp(reason):
                    _log.error("worker %d is given up: %s", worker_id, reason)
                    if not any(self._workers) and all(math.isinf(p.due_s) for p in self._policies):
                        self._fail(WorkerDiedError(f"no worker is left: {reason}"))

    def _fail_start(self, error: Exception) -> None:
        is_ours = isinstance(error, FuriosaLLMError)
        self._start_error = error if is_ours else WorkerStartError(str(error))
        self._is_stopping = True

    def _stop(self) -> None:
        self._is_stopping = True

    def _close_workers(self) -> None:
        for worker in self._workers:
            if worker is not None:
                if worker.is_ready:
                    with suppress(zmq.ZMQError):
                        self._router_socket.send_multipart(
                            [worker.identity, encode(Shutdown())], zmq.NOBLOCK
                        )
                else:
                    worker.kill()
        for worker_id, worker in enumerate(self._workers):
            if worker is not None:
                worker.reap(SHUTDOWN_TIMEOUT_S)
                self._workers[worker_id] = None
