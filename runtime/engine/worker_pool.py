"""The worker processes and the socket they speak over: what they say and how they fare, as events.

It starts every worker, starts dead ones again as their policy says, and lets through only valid
messages of a living epoch, in order. It knows nothing of requests. All of it belongs to the one
thread that made it.

`wait` sleeps in `poll` until a message, the end of a process (its pidfd), a due restart or the
wake-up descriptor ends the sleep; with none of these it costs nothing.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import zmq

from furiosa_llm.engine.supervisor import GiveUp, RestartPolicy, Start
from furiosa_llm.engine.worker_process import WorkerProcess
from furiosa_llm.errors import FuriosaLLMError, WorkerStartError, from_wire
from furiosa_llm.wire.codec import decode_from_worker, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import (
    Added,
    Configure,
    FromWorker,
    Pong,
    Ready,
    Refused,
    Shutdown,
    StartFailed,
    Tokens,
    ToWorker,
)
from furiosa_llm.wire.sockets import bind_router, new_endpoint, remove_endpoint

START_TIMEOUT_S = 600.0
"""A worker that says nothing for so long is taken for stuck: mapping a model takes far less."""

LAST_WORDS_TIMEOUT_S = 0.5
"""How long to wait for the message in which a worker that has left said why it could not start."""

SEND_TIMEOUT_S = 5.0
"""A worker whose queue of thousands of messages stays full for so long is killed."""

SHUTDOWN_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """The worker takes sequences from now on."""

    worker_id: int
    isa: str


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """The worker's process has ended, and all it held is lost. It may come up again."""

    worker_id: int
    cause: str
    start_error: FuriosaLLMError | None  # why it could not start, if that is what happened


@dataclass(frozen=True, slots=True)
class NoWorkerLeft:
    """Every worker is down and given up."""

    reason: str


Event = WorkerUp | WorkerDown | NoWorkerLeft | Tokens | Added | Refused | Pong


class WorkerPool:
    """One worker per entry of `configures`, whose endpoint is filled in.

    Args:
        configures: by worker id, for the first epoch.
        wakeup_fd: an eventfd; a write to it ends `wait`.
    """

    def __init__(self, configures: tuple[Configure, ...], wakeup_fd: int) -> None:
        self._wakeup_fd = wakeup_fd
        self._policies = [RestartPolicy() for _ in configures]
        self._workers: list[WorkerProcess | None] = [None] * len(configures)
        self._is_complete = False  # whether all workers have been up; nothing restarts before
        self.endpoint = new_endpoint()
        self._configures = tuple(replace(c, endpoint=self.endpoint) for c in configures)
        self._context: zmq.Context[zmq.Socket[Any]] = zmq.Context()
        try:
            self._socket = bind_router(self._context, self.endpoint)
        except BaseException:
            self._context.term()
            raise
        self._socket.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup_fd, zmq.POLLIN)

    @property
    def is_complete(self) -> bool:
        """Whether all workers have been up at least once."""
        return self._is_complete

    @property
    def pids(self) -> list[int | None]:
        """Process ids by worker id; None for one that is down. Any thread may ask."""
        return [None if worker is None else worker.pid for worker in self._workers]

    @property
    def up(self) -> list[int]:
        """The workers that take sequences."""
        return [i for i, worker in enumerate(self._workers) if worker and worker.is_ready]

    def start(self) -> None:
        """Start all processes; `WorkerUp` tells when each is ready. Raises: OSError."""
        for configure in self._configures:
            self._spawn(configure)

    def send(self, worker_id: int, message: ToWorker) -> None:
        """Send it if the worker is up. If it is not, or dies before it reads it, so be it:

        its `WorkerDown` tells, or has told, that what it was given is lost.
        """
        worker = self._workers[worker_id]
        if worker is None or not worker.is_ready:
            return
        try:
            self._socket.send_multipart([worker.identity, encode(message)])
        except zmq.Again:
            _log.error("worker %d reads nothing: replacing it", worker_id)
            worker.kill()
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # that means it has just died
                raise

    def wait(self) -> Iterator[Event]:
        """Sleep until something happens, and yield what it was. Nothing after a wake-up, perhaps.

        To be run to its end, each event handled before the next is asked for: then what is sent
        meanwhile goes to the process that the events so far tell of.
        """
        ready = dict(self._poller.poll(self._sleep_ms()))
        if self._wakeup_fd in ready:
            os.eventfd_read(self._wakeup_fd)
        # Messages before deaths: what a worker still said counts before it is replaced.
        if self._socket in ready:
            yield from self._receive()
        for worker in list(self._workers):
            if worker is not None and worker.pid_fd in ready:
                yield from self._exited(worker)
        now_s = time.monotonic()
        for worker_id, policy in enumerate(self._policies):
            yield from self._obey(worker_id, policy.tick(now_s))
        self._kill_stuck(now_s)

    def close(self) -> None:
        """End all workers, wait for that, and remove the socket."""
        for worker in self._workers:
            if worker is not None and worker.is_ready:
                with suppress(zmq.ZMQError):  # it is dead, or too busy to be told politely
                    self._socket.send_multipart([worker.identity, encode(Shutdown())], zmq.NOBLOCK)
            elif worker is not None:
                worker.kill()
        for worker_id, worker in enumerate(self._workers):
            if worker is not None:
                worker.reap(SHUTDOWN_TIMEOUT_S)
                self._workers[worker_id] = None
        self._context.destroy(linger=0)
        remove_endpoint(self.endpoint)

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self) -> Iterator[Event]:
        """The events in the messages that are there, without waiting for any."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 2:
                    raise WireError(f"a message of {len(frames)} frames instead of two")
                message = decode_from_worker(frames[1])
            except WireError as error:
                _log.warning("dropped a malformed message of a worker: %s", error)
                continue
            worker = self._sender(frames[0], message)
            if worker is None:
                continue
            is_first = isinstance(message, Ready | StartFailed)
            if message.seq != worker.next_seq or is_first != (worker.next_seq == 0):
                _log.error(
                    "worker %d sent %s number %d where number %d was due: replacing it",
                    message.worker_id, type(message).__name__, message.seq, worker.next_seq,
                )  # fmt: skip
                worker.kill()
                continue
            worker.next_seq += 1
            match message:
                case Ready():
                    worker.is_ready = True
                    self._is_complete = self._is_complete or len(self.up) == len(self._workers)
                    yield WorkerUp(message.worker_id, message.isa)
                case StartFailed():
                    worker.start_error = from_wire(message.error_code, message.message)
                case _:
                    yield message

    def _sender(self, identity: bytes, message: FromWorker) -> WorkerProcess | None:
        """The living process that the message is of; None: a dead epoch's, or nobody's."""
        if message.worker_id >= len(self._workers):
            return None
        worker = self._workers[message.worker_id]
        if worker is None or worker.identity != identity:
            return None
        return worker if worker.configure.epoch == message.epoch else None

    # --- processes --------------------------------------------------------------------------------

    def _spawn(self, configure: Configure) -> None:
        worker = WorkerProcess(configure, start_deadline_s=time.monotonic() + START_TIMEOUT_S)
        self._workers[configure.worker_id] = worker
        self._poller.register(worker.pid_fd, zmq.POLLIN)

    def _exited(self, worker: WorkerProcess) -> Iterator[Event]:
        worker_id = worker.configure.worker_id
        yield from self._receive()  # its last words: tokens, or why it could not start
        if not worker.is_ready and worker.has_failed:
            yield from self._await_start_error(worker)
        self._poller.unregister(worker.pid_fd)
        cause = worker.reap()
        self._workers[worker_id] = None
        yield WorkerDown(worker_id, cause, worker.start_error)
        if self._is_complete:
            _log.warning("%s", f"{cause}: {worker.start_error}" if worker.start_error else cause)
            effects = self._policies[worker_id].exited(time.monotonic())
            yield from self._obey(worker_id, effects)

    def _await_start_error(self, worker: WorkerProcess) -> Iterator[Event]:
        """The process's end may be seen before the message it sent, which is on its way then."""
        deadline_s = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while worker.start_error is None and (left_s := deadline_s - time.monotonic()) > 0:
            if self._socket.poll(math.ceil(left_s * 1000)):
                yield from self._receive()

    def _obey(self, worker_id: int, effects: list[Start | GiveUp]) -> Iterator[Event]:
        for effect in effects:
            match effect:
                case Start(epoch):
                    try:
                        self._spawn(replace(self._configures[worker_id], epoch=epoch))
                    except OSError as error:  # no memory, processes or descriptors left just now
                        _log.error("worker %d cannot be started: %s", worker_id, error)
                        next_effects = self._policies[worker_id].exited(time.monotonic())
                        yield from self._obey(worker_id, next_effects)
                case GiveUp(reason):
                    _log.error("worker %d is given up: %s", worker_id, reason)
                    if not any(self._workers) and all(math.isinf(p.due_s) for p in self._policies):
                        yield NoWorkerLeft(reason)

    def _kill_stuck(self, now_s: float) -> None:
        """Kill those that should have been ready by now; their end is then seen as any other."""
        for worker in self._workers:
            if worker is not None and not worker.is_ready and now_s > worker.start_deadline_s:
                worker.start_error = WorkerStartError(
                    f"worker {worker.configure.worker_id} was not ready within "
                    f"{START_TIMEOUT_S:g} s"
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
