"""One connection at a time to the daemon's socket: bytes out, bytes in, and how it ends.

ZeroMQ would connect anew by itself, silently, and lose what was on the way. Here a connection is
one socket that never reconnects, and its end is an event.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import zmq

from furiosa_llm.wire.client_codec import MAX_CLIENT_MESSAGE_BYTES

_HEARTBEAT_MS = 15_000
"""TCP alone may take a quarter of an hour to notice that the other machine is gone."""
_LINGER_MS = 200
"""A goodbye has that long to leave."""
_NO_DAEMON = "what listens there is no daemon, or its key is another"
_ENDS = {
    zmq.EVENT_DISCONNECTED: "the connection ended",
    zmq.EVENT_CLOSED: "nothing listens there",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: _NO_DAEMON,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the daemon does not know this client's key",
}


class Transport:
    """For one thread.

    Args:
        endpoint: of the daemon.
        keys: (the daemon's public key, ours, our secret one), for CURVE.
    """

    def __init__(self, endpoint: str, keys: tuple[bytes, bytes, bytes] | None) -> None:
        self._endpoint = endpoint
        self._keys = keys
        self._context: zmq.Context[Any] = zmq.Context()
        self._dealer: zmq.Socket[Any] | None = None
        self._monitor: zmq.Socket[Any] | None = None

    @property
    def sockets(self) -> list[zmq.Socket[Any]]:
        """What to wait for; [] while there is no connection."""
        return [end for end in (self._dealer, self._monitor) if end is not None]

    def dial(self) -> None:
        """Open a new connection, in the background; an old one is closed."""
        self.hang_up()
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, _LINGER_MS)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.setsockopt(zmq.SNDHWM, 0)  # what callers ask for waits here instead of blocking them
        dealer.setsockopt(zmq.RCVHWM, 0)  # bounded by the credits
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_CLIENT_MESSAGE_BYTES)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS if self._keys is not None else 0)
        if self._keys is not None:
            dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = self._keys
        self._monitor = dealer.get_monitor_socket(sum(_ENDS))
        self._dealer = dealer
        dealer.connect(self._endpoint)

    def hang_up(self) -> None:
        """Close the connection there is, if any."""
        if self._dealer is not None and self._monitor is not None:
            self._dealer.disable_monitor()
            self._monitor.close(linger=0)
            self._dealer.close()
        self._dealer = self._monitor = None

    def send(self, packed: bytes) -> None:
        """Send a message; it never blocks."""
        if self._dealer is not None:
            with suppress(zmq.Again):  # the connection has ended, which its event will tell
                self._dealer.send(packed, zmq.NOBLOCK)

    def receive(self) -> bytes | None:
        """The next message; None if there is none yet."""
        if self._dealer is None:
            return None
        try:
            frames = self._dealer.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return b"" if len(frames) != 1 else frames[0]  # b"" is a malformed message

    def end(self) -> tuple[str, bool] | None:
        """How the connection ended, and whether another attempt is no use; None: it has not."""
        if self._monitor is None:
            return None
        try:
            event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        # By hand (zmq_socket_monitor(3)): pyzmq's parser would load asyncio, half of this package's
        # time to load.
        (kind,) = struct.unpack_from("=H", event)
        if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._keys is not None:
            return _NO_DAEMON, False  # a server does not answer who has sealed a box for another
        return _ENDS.get(kind, "it ended"), kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH

    def close(self) -> None:
        """Close everything. Waits a moment for what was sent last."""
        self.hang_up()
        self._context.term()
