"""The workers of another front-end, which this one shares. See `pool.Pool`.

It starts and ends no process. A worker that was told of this front-end connects to it and says
`Ready`; its process's end is seen through its pidfd, just as its owner sees it. When the owner's
process ends, the workers end with it, and so does this pool.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator

import zmq

from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.engine.pool import Event, NoWorkerLeft, ProcessState, WorkerDown, WorkerUp
from furiosa_llm.engine.worker_socket import Peer, WorkerSocket
from furiosa_llm.errors import EngineShutDownError, FuriosaLLMError, WorkerStartError
from furiosa_llm.wire.messages import FromWorker, Leaving, Ready, StartFailed, ToWorker
from furiosa_llm.wire.sockets import remove_endpoint

ATTACH_TIMEOUT_S = 60.0
"""Without any worker for so long, there is nothing to be attached to."""

_log = logging.getLogger(__name__)


class SharedWorker(Peer):
    """A worker's process that somebody else has started."""

    def __init__(self, ready: Ready) -> None:
        super().__init__(ready.worker_id, ready.epoch)
        self.pid = ready.pid
        self.pid_fd = -1  # opened when the message has proved to be the worker's


class AttachedPool:
    """The workers that a ticket names.

    Args:
        ticket: from the front-end that owns the workers; used by one process at a time.
        wakeup_fd: an eventfd; a write to it ends `wait`.
    Raises: EngineShutDownError if the owner has ended; zmq.ZMQError.
    """

    def __init__(self, ticket: AttachTicket, wakeup_fd: int) -> None:
        self._wakeup_fd = wakeup_fd
        self._workers: list[SharedWorker | None] = [None] * len(ticket.workers)
        self._epochs = [0] * len(ticket.workers)
        self._restarts: list[dict[str, int]] = [{} for _ in ticket.workers]
        self._broken: list[SharedWorker] = []  # to be taken out of `_workers`
        self._wake_by_s = math.inf
        self._is_complete = False
        self._alone_since_s = time.monotonic()  # moot while a worker is up
        self.endpoint = ticket.endpoint
        try:
            self._owner_fd = os.pidfd_open(ticket.owner_pid)
        except ProcessLookupError:
            raise EngineShutDownError(
                f"process {ticket.owner_pid}, whose workers were to be shared, has ended"
            ) from None
        try:
            self._socket = WorkerSocket(self.endpoint)
        except BaseException:
            os.close(self._owner_fd)
            raise
        self._poller = zmq.Poller()
        for source in (self._socket.router, self._wakeup_fd, self._owner_fd):
            self._poller.register(source, zmq.POLLIN)

    @property
    def is_complete(self) -> bool:
        """Whether a worker has been up: the others may be on their way to come up again."""
        return self._is_complete

    @property
    def pids(self) -> list[int | None]:
        """Process ids by worker id; None for one that is down. Any thread may ask."""
        return [None if worker is None else worker.pid for worker in self._workers]

    @property
    def up(self) -> list[int]:
        """The workers that take sequences."""
        return [i for i, worker in enumerate(self._workers) if worker is not None]

    def state(self, worker_id: int) -> ProcessState:
        """How the worker fares now. Any thread may ask."""
        worker = self._workers[worker_id]
        phase = "down" if worker is None else "restarting" if worker.is_leaving else "ready"
        return ProcessState(
            pid=None if worker is None else worker.pid,
            epoch=self._epochs[worker_id],
            is_up=phase == "ready",
            phase=phase,
            restarts=tuple(sorted(self._restarts[worker_id].copy().items())),
            last_message_s=None if worker is None else worker.silence_s,
        )

    def start(self) -> None:
        """Nothing: the workers connect by themselves."""

    def send(self, worker_id: int, message: ToWorker) -> None:
        """See `Pool.send`. A worker that reads nothing is its owner's to kill, and counts as down
        here.
        """
        worker = self._workers[worker_id]
        if worker is not None and not self._socket.send(worker, message):
            self._break_off(worker, "reads nothing")

    def restart(self, worker_id: int) -> None:
        """Raises: FuriosaLLMError: only the owner of a worker may."""
        raise FuriosaLLMError("workers are restarted by the front-end that owns them")

    def attach(self, front_end: int, endpoint: str) -> None:
        """Raises: FuriosaLLMError: only the owner of a worker may share it."""
        raise FuriosaLLMError("workers are shared by the front-end that owns them")

    def wake_by(self, due_s: float) -> None:
        """End the next `wait` by then (on the monotonic clock), if nothing else does."""
        self._wake_by_s = min(self._wake_by_s, due_s)

    def wait(self) -> Iterator[Event]:
        """See `Pool.wait`."""
        ready = dict(self._poller.poll(self._sleep_ms()))
        self._wake_by_s = math.inf
        if self._wakeup_fd in ready:
            os.eventfd_read(self._wakeup_fd)
        if self._socket.router in ready:
            yield from self._receive()
        for worker in list(self._workers):
            if worker is not None and worker.pid_fd in ready:
                yield from self._receive()  # its last words
                reason = "reload" if worker.is_leaving else "signal"
                yield from self._down(worker, f"its process (pid {worker.pid}) has ended", reason)
        while self._broken:
            yield from self._down(self._broken.pop(), "the connection was given up", "protocol")
        if self._owner_fd in ready:
            yield NoWorkerLeft("the front-end that owns the workers has ended")
        elif not self.up and time.monotonic() > self._alone_since_s + ATTACH_TIMEOUT_S:
            if not self._is_complete:
                raise WorkerStartError(f"no worker has come within {ATTACH_TIMEOUT_S:g} s")
            yield NoWorkerLeft(f"no worker has been up for {ATTACH_TIMEOUT_S:g} s")

    def close(self) -> None:
        """Leave the workers to their owner; they drop what this front-end had there."""
        for worker in self._workers:
            if worker is not None:
                os.close(worker.pid_fd)
        self._workers = [None] * len(self._workers)
        os.close(self._owner_fd)
        self._socket.close()
        remove_endpoint(self.endpoint)

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self) -> Iterator[Event]:
        for peer, message in self._socket.receive(self._sender_of, self._break_off):
            match message:
                case Ready():
                    assert isinstance(peer, SharedWorker)
                    yield from self._up(peer, message)
                case StartFailed() | Leaving():
                    pass  # the first is its owner's concern; after the second, its end tells
                case _:
                    yield message

    def _sender_of(self, message: FromWorker) -> Peer | None:
        if message.worker_id >= len(self._workers):
            return None
        if isinstance(message, Ready) and message.seq == 0:
            return SharedWorker(message)
        worker = self._workers[message.worker_id]
        return worker if worker is not None and worker.epoch == message.epoch else None

    def _break_off(self, peer: Peer, problem: str) -> None:
        _log.error("worker %d %s: it is down for this front-end", peer.worker_id, problem)
        worker = self._workers[peer.worker_id]
        if worker is peer and worker not in self._broken:
            self._broken.append(worker)
            self._wake_by_s = 0.0

    # --- workers ----------------------------------------------------------------------------------

    def _up(self, worker: SharedWorker, ready: Ready) -> Iterator[Event]:
        before = self._workers[worker.worker_id]
        if before is not None:  # its successor was faster than the news of its end
            reason = "reload" if before.is_leaving else "signal"
            yield from self._down(before, f"its process (pid {before.pid}) was replaced", reason)
        try:
            worker.pid_fd = os.pidfd_open(worker.pid)
        except ProcessLookupError:
            return  # it has ended since
        worker.is_ready = True
        self._workers[worker.worker_id] = worker
        self._epochs[worker.worker_id] = worker.epoch
        self._poller.register(worker.pid_fd, zmq.POLLIN)
        self._is_complete = True
        yield WorkerUp(ready.worker_id, ready.isa, ready.num_blocks)

    def _down(self, worker: SharedWorker, cause: str, reason: str) -> Iterator[Event]:
        worker_id = worker.worker_id
        if self._workers[worker_id] is not worker:
            return
        self._workers[worker_id] = None
        self._poller.unregister(worker.pid_fd)
        os.close(worker.pid_fd)
        self._restarts[worker_id][reason] = self._restarts[worker_id].get(reason, 0) + 1
        if not self.up:
            self._alone_since_s = time.monotonic()
        yield WorkerDown(worker_id, f"worker {worker_id}: {cause}", None, reason == "reload")

    def _sleep_ms(self) -> int | None:
        due_s = self._wake_by_s
        if not self.up:
            due_s = min(due_s, self._alone_since_s + ATTACH_TIMEOUT_S)
        if math.isinf(due_s):
            return None
        return math.ceil(max(0.0, due_s - time.monotonic()) * 1000)
