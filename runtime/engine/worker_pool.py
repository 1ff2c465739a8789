"""The worker processes that a front-end started itself, and the socket they speak over.

It starts every worker, and starts dead ones again as their policy says. See `pool.Pool`.

`wait` sleeps in `poll` until a message, the end of a process (its pidfd), a due restart or the
wake-up descriptor ends the sleep; with none of these it costs nothing.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import zmq

from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.pool import (
    Event,
    NoWorkerLeft,
    ProcessState,
    WorkerDown,
    WorkerLost,
    WorkerUp,
)
from furiosa_llm.engine.supervisor import GiveUp, RestartPolicy, Start
from furiosa_llm.engine.worker_process import WorkerProcess
from furiosa_llm.engine.worker_socket import Peer, WorkerSocket
from furiosa_llm.errors import WorkerStartError, from_wire
from furiosa_llm.wire.messages import (
    Attach,
    Configure,
    FromWorker,
    Leaving,
    Ready,
    Shutdown,
    StartFailed,
    ToWorker,
)
from furiosa_llm.wire.sockets import new_endpoint, remove_endpoint

START_TIMEOUT_S = 600.0
"""A worker that says nothing for so long is taken for stuck: mapping a model takes far less."""

LAST_WORDS_TIMEOUT_S = 0.5
"""How long to wait for the message in which a worker that has left said why it could not start."""

LEAVE_TIMEOUT_S = 10.0
"""A worker leaves between two steps; one that was told to and has not by then is killed."""

SHUTDOWN_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class WorkerPool:
    """One worker per entry of `configures`, whose endpoint is filled in.

    Args:
        configures: by worker id, for the first epoch.
        wakeup_fd: an eventfd; a write to it ends `wait`.
        head_start: processes that were started already.
    """

    def __init__(
        self,
        configures: tuple[Configure, ...],
        wakeup_fd: int,
        head_start: HeadStart | None = None,
    ) -> None:
        self._wakeup_fd = wakeup_fd
        self._head_start = HeadStart([]) if head_start is None else head_start
        self._policies = [RestartPolicy() for _ in configures]
        self._workers: list[WorkerProcess | None] = [None] * len(configures)
        self._restarts: list[dict[str, int]] = [{} for _ in configures]  # why, how often
        self._is_complete = False  # whether all workers have been up; nothing restarts before
        self._attached: dict[int, Attach] = {}  # by the front-end's index
        self._wake_by_s = math.inf
        self.endpoint = new_endpoint()
        self._configures = tuple(replace(c, endpoint=self.endpoint) for c in configures)
        self._socket = WorkerSocket(self.endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket.router, zmq.POLLIN)
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

    def state(self, worker_id: int) -> ProcessState:
        """How the worker fares now. Any thread may ask."""
        worker, policy = self._workers[worker_id], self._policies[worker_id]
        if worker is None:
            phase = "lost" if policy.is_given_up else "down"
        elif worker.is_leaving:
            phase = "restarting"
        else:
            phase = "ready" if worker.is_ready else "loading"
        return ProcessState(
            pid=None if worker is None else worker.pid,
            epoch=policy.epoch,
            is_up=phase == "ready",
            phase=phase,
            restarts=tuple(sorted(self._restarts[worker_id].copy().items())),
            last_message_s=None if worker is None else worker.silence_s,
        )

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
        if not self._socket.send(worker, message):
            _log.error("worker %d reads nothing: replacing it", worker_id)
            worker.kill("stuck")

    def restart(self, worker_id: int) -> None:
        """Have the worker's process replaced: `WorkerDown`, then `WorkerUp`.

        Nothing if it is down; it comes up again by itself, or not at all.
        """
        worker = self._workers[worker_id]
        if worker is None or worker.is_leaving:
            return
        self.send(worker_id, Shutdown())
        worker.end_reason = worker.end_reason or "reload"
        worker.is_leaving = True
        # One that still loads cannot hear it, and is killed at once.
        worker.deadline_s = time.monotonic() + (LEAVE_TIMEOUT_S if worker.is_ready else 0.0)

    def attach(self, front_end: int, endpoint: str) -> None:
        """Have all workers, whenever they come up, serve another front-end, too."""
        attach = self._attached[front_end] = Attach(front_end, endpoint)
        for worker_id in self.up:
            self.send(worker_id, attach)

    def wake_by(self, due_s: float) -> None:
        """End the next `wait` by then (on the monotonic clock), if nothing else does."""
        self._wake_by_s = min(self._wake_by_s, due_s)

    def wait(self) -> Iterator[Event]:
        """Sleep until something happens, and yield what it was. Nothing after a wake-up, perhaps.

        To be run to its end, each event handled before the next is asked for: then what is sent
        meanwhile goes to the process that the events so far tell of.
        """
        ready = dict(self._poller.poll(self._sleep_ms()))
        self._wake_by_s = math.inf
        if self._wakeup_fd in ready:
            os.eventfd_read(self._wakeup_fd)
        # Messages before deaths: what a worker still said counts before it is replaced.
        if self._socket.router in ready:
            yield from self._receive()
        for worker in list(self._workers):
            if worker is not None and worker.pid_fd in ready:
                yield from self._exited(worker)
        now_s = time.monotonic()
        for worker_id, policy in enumerate(self._policies):
            yield from self._obey(worker_id, policy.tick(now_s))
        self._kill_overdue(now_s)

    def close(self) -> None:
        """End all workers, wait for that, and remove the socket."""
        for worker in self._workers:
            if worker is not None and worker.is_ready:
                self._socket.router.setsockopt(zmq.SNDTIMEO, 0)  # too busy to be told politely
                self._socket.send(worker, Shutdown())
            elif worker is not None:
                worker.kill("shutdown")
        for worker_id, worker in enumerate(self._workers):
            if worker is not None:
                worker.reap(SHUTDOWN_TIMEOUT_S)
                self._workers[worker_id] = None
        self._socket.close()
        for endpoint in (self.endpoint, *(attach.endpoint for attach in self._attached.values())):
            remove_endpoint(endpoint)

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self) -> Iterator[Event]:
        """The events in the messages that are there, without waiting for any."""
        for peer, message in self._socket.receive(self._sender_of, self._break_off):
            worker = self._workers[peer.worker_id]
            assert worker is peer
            match message:
                case Ready():
                    worker.is_ready = True
                    worker.deadline_s = math.inf
                    self._is_complete = self._is_complete or len(self.up) == len(self._workers)
                    for attach in self._attached.values():
                        self.send(peer.worker_id, attach)
                    yield WorkerUp(message.worker_id, message.isa, message.num_blocks)
                case StartFailed():
                    worker.start_error = from_wire(message.error_code, message.message)
                case Leaving():
                    pass  # its end tells
                case _:
                    yield message

    def _sender_of(self, message: FromWorker) -> WorkerProcess | None:
        if message.worker_id >= len(self._workers):
            return None
        worker = self._workers[message.worker_id]
        return worker if worker is not None and worker.epoch == message.epoch else None

    def _break_off(self, peer: Peer, problem: str) -> None:
        _log.error("worker %d %s: replacing it", peer.worker_id, problem)
        worker = self._workers[peer.worker_id]
        assert worker is peer
        worker.kill("protocol")

    # --- processes --------------------------------------------------------------------------------

    def _spawn(self, configure: Configure) -> None:
        worker = WorkerProcess(
            configure,
            deadline_s=time.monotonic() + START_TIMEOUT_S,
            fresh=self._head_start.take(configure),
        )
        self._workers[configure.worker_id] = worker
        self._poller.register(worker.pid_fd, zmq.POLLIN)

    def _exited(self, worker: WorkerProcess) -> Iterator[Event]:
        worker_id = worker.worker_id
        yield from self._receive()  # its last words: tokens, or why it could not start
        if not worker.is_ready and worker.has_failed:
            yield from self._await_start_error(worker)
        self._poller.unregister(worker.pid_fd)
        reason = worker.end_reason or worker.how_it_ended
        cause = worker.reap()
        self._workers[worker_id] = None
        was_asked = reason == "reload"
        yield WorkerDown(worker_id, cause, worker.start_error, was_asked)
        if self._is_complete:
            self._restarts[worker_id][reason] = self._restarts[worker_id].get(reason, 0) + 1
            if was_asked:
                _log.info("%s, as it was told to", cause)
                yield from self._obey(worker_id, self._policies[worker_id].restart())
                return
            _log.warning("%s", f"{cause}: {worker.start_error}" if worker.start_error else cause)
            effects = self._policies[worker_id].exited(time.monotonic())
            yield from self._obey(worker_id, effects)

    def _await_start_error(self, worker: WorkerProcess) -> Iterator[Event]:
        """The process's end may be seen before the message it sent, which is on its way then."""
        deadline_s = time.monotonic() + LAST_WORDS_TIMEOUT_S
        while worker.start_error is None and (left_s := deadline_s - time.monotonic()) > 0:
            if self._socket.router.poll(math.ceil(left_s * 1000)):
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
                    yield WorkerLost(worker_id, reason)
                    if not any(self._workers) and all(math.isinf(p.due_s) for p in self._policies):
                        yield NoWorkerLeft(reason)

    def _kill_overdue(self, now_s: float) -> None:
        """Kill those that should have been ready, or gone; their end is then seen as any other."""
        for worker in self._workers:
            if worker is not None and now_s > worker.deadline_s:
                worker.deadline_s = math.inf
                if not worker.is_leaving:
                    worker.start_error = WorkerStartError(
                        f"worker {worker.worker_id} was not ready within {START_TIMEOUT_S:g} s"
                    )
                worker.kill("stuck")

    def _sleep_ms(self) -> int | None:
        due_s = min(self._wake_by_s, *(policy.due_s for policy in self._policies))
        due_s = min(due_s, *(w.deadline_s for w in self._workers if w is not None), math.inf)
        if math.isinf(due_s):
            return None
        return math.ceil(max(0.0, due_s - time.monotonic()) * 1000)
