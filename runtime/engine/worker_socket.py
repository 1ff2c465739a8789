"""The front-end's socket, and what it knows of each worker process that speaks over it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from furiosa_llm.wire.codec import decode_from_worker, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import FromWorker, Leaving, Ready, StartFailed, ToWorker
from furiosa_llm.wire.sockets import bind_router, worker_identity

SEND_TIMEOUT_S = 5.0
"""A worker whose queue of thousands of messages stays full for so long reads nothing."""

_log = logging.getLogger(__name__)


class Peer:
    """One worker process, as far as its messages tell."""

    def __init__(self, worker_id: int, epoch: int) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.identity = worker_identity(worker_id, epoch)
        self.is_ready = False
        self.is_leaving = False  # it was told to leave, or has said that it was
        self.next_seq = 0
        self.last_message_s: float | None = None  # on the monotonic clock

    @property
    def silence_s(self) -> float | None:
        """Seconds since its last message; None if it has sent none."""
        last_s = self.last_message_s
        return None if last_s is None else time.monotonic() - last_s


class WorkerSocket:
    """A ROUTER bound to `endpoint`. Belongs to the thread that made it. Raises: zmq.ZMQError."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[Any]] = zmq.Context()
        try:
            self.router = bind_router(self._context, endpoint)
        except BaseException:
            self._context.term()
            raise
        self.router.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))

    def send(self, peer: Peer, message: ToWorker) -> bool:
        """Send to a living peer; False if it reads nothing. Whether it lives is not told."""
        try:
            self.router.send_multipart([peer.identity, encode(message)])
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # that means it has just died
                raise
        return True

    def receive(
        self,
        sender_of: Callable[[FromWorker], Peer | None],
        break_off: Callable[[Peer, str], None],
    ) -> Iterator[tuple[Peer, FromWorker]]:
        """The messages that are there, without waiting for any; each with its sender.

        Args:
            sender_of: the living process that a message claims to be of; None: there is none.
            break_off: called with a peer that breaks the protocol, and how; the message is dropped.
        """
        while True:
            try:
                frames = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 2:
                    raise WireError(f"a message of {len(frames)} frames instead of two")
                message = decode_from_worker(frames[1])
            except WireError as error:
                _log.warning("dropped a malformed message of a worker: %s", error)
                continue
            peer = sender_of(message)
            if peer is None or peer.identity != frames[0]:
                continue
            is_first = isinstance(message, Ready | StartFailed)
            if message.seq != peer.next_seq or is_first != (peer.next_seq == 0):
                kind = type(message).__name__
                break_off(
                    peer, f"sent {kind} number {message.seq} where number {peer.next_seq} was due"
                )
                continue
            peer.next_seq += 1
            peer.last_message_s = time.monotonic()
            if isinstance(message, Leaving):
                peer.is_leaving = True
            yield peer, message

    def close(self) -> None:
        """Drop what was not sent yet."""
        self._context.destroy(linger=0)
