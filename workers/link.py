"""A worker's connection to one front-end, and the numbers of the messages that go over it.

The front-end that started the worker cannot vanish unseen: the worker ends with it (tether.py). Of
any other one the connection itself is watched. When it breaks, the link starts anew: connected
again in the background, with `Ready` as its first message, for whoever binds the endpoint next.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from furiosa_llm.wire.codec import decode_to_worker, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import Attach, Configure, FromWorker, ToWorker
from furiosa_llm.wire.sockets import connect_dealer

LEAVING_LINGER_MS = 1000
"""How long a worker that leaves waits for its last message to be read off its hands."""

MAX_RECONNECT_MS = 1000
"""An endpoint that nobody binds is tried ever more rarely, down to once in this time."""

_log = logging.getLogger(__name__)


class FrontEndLink:
    """Where one front-end is, how to speak to it, and whether it is still there.

    Args:
        dealer: connected to the front-end; nothing but this link's messages go over it.
        front_end: its index.
    """

    def __init__(self, configure: Configure, dealer: zmq.Socket[bytes], front_end: int = 0) -> None:
        self._configure = configure
        self.dealer = dealer
        self.front_end = front_end
        self._num_sent = 0
        self._num_malformed = 0

    def send(self, make: Callable[..., FromWorker], **fields: Any) -> None:
        """Send the next message. Waits while the front-end leaves too many of them unread."""
        configure = self._configure
        message = make(
            worker_id=configure.worker_id, epoch=configure.epoch, seq=self._num_sent, **fields
        )
        self.dealer.send(encode(message))
        self._num_sent += 1

    def receive(self, max_messages: int) -> Iterator[ToWorker]:
        """The messages that are there, without waiting for any."""
        for _ in range(max_messages):
            try:
                frames = self.dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise WireError(f"a message of {len(frames)} frames instead of one")
                message = decode_to_worker(frames[0])
            except WireError as error:
                self._drop_malformed(error)
            else:
                yield message

    def close(self) -> None:
        """Let what was sent go out, and close."""
        self.dealer.close(linger=LEAVING_LINGER_MS)

    def _drop_malformed(self, error: WireError) -> None:
        """Count it, and log the 1st, 2nd, 4th, 8th ...: a flood must not fill the disk."""
        self._num_malformed += 1
        if self._num_malformed.bit_count() == 1:
            _log.warning("dropped malformed message number %d: %s", self._num_malformed, error)


class AttachedLink(FrontEndLink):
    """A link to a front-end that may vanish, and come back as another process."""

    def __init__(
        self, configure: Configure, context: zmq.Context[zmq.Socket[bytes]], attach: Attach
    ) -> None:
        dealer = connect_dealer(
            context,
            attach.endpoint,
            configure.worker_id,
            configure.epoch,
            max_reconnect_ms=MAX_RECONNECT_MS,
        )
        super().__init__(configure, dealer, attach.front_end)
        self.attach = attach
        self.monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        )
        self._is_connected = False

    def has_vanished(self) -> bool:
        """Whether the connection has broken since the link was made. It is to be replaced then."""
        while self.monitor.poll(0):
            # By hand (zmq_socket_monitor(3)): pyzmq's own parser would load asyncio here.
            frame, _ = self.monitor.recv_multipart()
            (event,) = struct.unpack_from("=H", frame)
            self._is_connected = event == zmq.Event.HANDSHAKE_SUCCEEDED
            if not self._is_connected:
                return True
        return False

    def close(self) -> None:
        """Let what was sent go out, if anybody is there, and close."""
        self.has_vanished()  # reads what there is to know of the connection
        self.dealer.disable_monitor()
        self.monitor.close(linger=0)
        self.dealer.close(linger=LEAVING_LINGER_MS if self._is_connected else 0)
