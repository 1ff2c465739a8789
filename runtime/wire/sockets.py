"""The two ends of the wire on one machine: a ROUTER at the front-end, a DEALER in each worker.

Sockets are files in a directory that only this user can enter, so there is no port to collide and
nothing for another user to connect to. Every queue is bounded; a peer that does not read makes its
sender wait, it does not grow the sender.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import zmq

from furiosa_llm.wire.codec import MAX_MESSAGE_BYTES
from furiosa_llm.wire.runtime_directory import runtime_directory

MAX_QUEUED_MESSAGES = 8192
"""Per peer and direction. A step is one message, so this is minutes of a reader that stalls."""

_STALE_AFTER_S = 60.0

S = TypeVar("S", bound="zmq.Socket[Any]")


# --- where sockets live ---------------------------------------------------------------------------


def new_endpoint() -> str:
    """An `ipc://` endpoint that nobody uses yet. Leftovers of killed front-ends are removed."""
    directory = runtime_directory()
    _remove_stale_sockets(directory)
    return f"ipc://{directory}/{os.urandom(8).hex()}.sock"


def remove_endpoint(endpoint: str) -> None:
    """Delete the socket file of an `ipc://` endpoint that is no longer bound; idempotent."""
    if endpoint.startswith("ipc://"):
        with suppress(OSError):
            os.unlink(endpoint.removeprefix("ipc://"))


def _remove_stale_sockets(directory: Path) -> None:
    """Delete sockets that nobody listens on. A young one may only be about to be listened on."""
    for path in directory.glob("*.sock"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime < _STALE_AFTER_S:
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()


# --- the two ends ---------------------------------------------------------------------------------


def bind_router(context: zmq.Context[S], endpoint: str) -> S:
    """The front-end's end. A message is [worker identity, bytes], both ways.

    Sending to a worker that is not connected raises zmq.ZMQError with EHOSTUNREACH, and to one
    that has not read the last MAX_QUEUED_MESSAGES, with NOBLOCK, zmq.Again. Works with an asyncio
    context too. Raises: zmq.ZMQError if the endpoint cannot be bound.
    """
    router = context.socket(zmq.ROUTER)
    _bound(router)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        router.bind(endpoint)
    except zmq.ZMQError:
        router.close()
        raise
    return router


def connect_dealer(
    context: zmq.Context[S],
    endpoint: str,
    worker_id: int,
    epoch: int,
    *,
    max_reconnect_ms: int = 0,
) -> S:
    """A worker's end. A message is one frame of bytes, both ways.

    Connecting goes on in the background, and what is sent meanwhile waits. The first message makes
    the worker known to the front-end, which cannot reach it before.

    Args:
        max_reconnect_ms: tries come ever more rarely, down to one in this time; 0: every 100 ms.
    """
    dealer = context.socket(zmq.DEALER)
    _bound(dealer)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, max_reconnect_ms)
    dealer.setsockopt(zmq.ROUTING_ID, worker_identity(worker_id, epoch))
    dealer.connect(endpoint)
    return dealer


def _bound(end: zmq.Socket[Any]) -> None:
    end.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    end.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
    end.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


def worker_identity(worker_id: int, epoch: int) -> bytes:
    """The routing id of a worker: what was sent to a dead epoch cannot reach its successor."""
    return b"%d.%d" % (worker_id, epoch)


def parse_worker_identity(identity: bytes) -> tuple[int, int] | None:
    """The (worker_id, epoch) that `worker_identity` wrote, or None for any other bytes."""
    match = re.fullmatch(rb"(\d{1,18})\.(\d{1,18})", identity)
    return (int(match[1]), int(match[2])) if match else None
