"""The ZeroMQ side of the daemon: where client libraries connect.

One ROUTER, on the daemon's event loop. Its file descriptor is edge-triggered: it tells of a change,
not of a state, and a send may swallow the change that announced a message. So whoever has sent asks
whether something came meanwhile.

A client is known by its `Hello` until it says goodbye, its connection ends, or it has requests and
is silent for too long; then its requests end and their blocks are free. ZeroMQ does not say whose
connection ended: upon a disconnect every session is sent a message that means nothing, and those
that cannot be reached are gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError, OverloadedError, to_wire
from furiosa_llm.server.client_limits import ClientLimits
from furiosa_llm.server.client_session import ClientSession, Sent
from furiosa_llm.server.curve import Authenticator, ServerCurve
from furiosa_llm.server.live_stream import Inbox
from furiosa_llm.server.overview import Overview, OwnersOverview
from furiosa_llm.server.service import Service
from furiosa_llm.wire.client_codec import (
    MAX_CLIENT_MESSAGE_BYTES,
    VersionError,
    decode_from_client,
    encode_client,
)
from furiosa_llm.wire.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    Failed,
    FromDaemon,
    Goodbye,
    Hello,
    Pong,
)
from furiosa_llm.wire.codec import clip_text
from furiosa_llm.wire.errors import WireError

MAX_MESSAGES_PER_TURN = 64
"""Read in one turn of the loop; then others have theirs."""
MAX_QUEUED_MESSAGES = 256
"""ZeroMQ's own queue, per client and direction."""
SWEEP_DELAYS_S = (0.005, 0.25)
"""After a disconnect: soon, and once more, for the news of it may overtake the thing itself."""
LINGER_MS = 200
"""A goodbye has that long to leave."""

_log = logging.getLogger(__name__)


class SocketServer:
    """Serves client libraries at `endpoint`, ipc:// or, with keys, tcp://.

    Raises: InvalidRequestError if the endpoint is malformed, or tcp:// without keys.
    """

    def __init__(
        self,
        service: Service,
        endpoint: str,
        curve: ServerCurve | None = None,
        *,
        limits: ClientLimits | None = None,
        overview: Overview | None = None,
    ) -> None:
        self._service = service
        self._overview = OwnersOverview(service) if overview is None else overview
        self.endpoint = _check_endpoint(endpoint, has_keys=curve is not None)
        self._curve = curve
        self._limits = ClientLimits() if limits is None else limits
        self.server_id = secrets.token_hex(8)
        self.num_malformed = 0
        self._sessions: dict[bytes, ClientSession] = {}  # by identity
        self._authenticator: Authenticator | None = None
        self._context: zmq.Context[Any] | None = None

    @property
    def num_clients(self) -> int:
        return len(self._sessions)

    async def start(self) -> None:
        """Bind, and serve from now on. A service that is not ready refuses requests itself.

        Raises: FuriosaLLMError if the endpoint is in use or cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop)
        _check_unused(self.endpoint)
        self._context = zmq.Context()
        try:
            self._bind(self._context)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._context = None
            raise FuriosaLLMError(f"{self.endpoint} cannot be bound: {error.strerror}") from None
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._fds = [(self._router, self._receive), (self._monitor, self._notice)]
        for end, callback in self._fds:
            self._loop.add_reader(end.getsockopt(zmq.FD), callback)
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        # Only a socket that was found empty announces what comes next.
        self._read_monitor()
        self._receive()

    def _bind(self, context: zmq.Context[Any]) -> None:
        if self._curve is not None:
            self._authenticator = Authenticator(context, self._curve.client_keys)
        self._router = router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, LINGER_MS)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        router.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_CLIENT_MESSAGE_BYTES)
        if self._curve is not None:
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_PUBLICKEY, self._curve.public_key)
            router.setsockopt(zmq.CURVE_SECRETKEY, self._curve.secret_key)
            router.setsockopt(zmq.ZAP_DOMAIN, b"furiosa-serve")
        router.bind(self.endpoint)
        if self.endpoint.startswith("ipc://"):
            os.chmod(self.endpoint.removeprefix("ipc://"), 0o600)
        else:
            self.endpoint = router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def allow(self, curve: ServerCurve) -> None:
        """Let in the clients of `curve` from now on; the server's own key stays what it is."""
        if self._authenticator is not None:
            self._authenticator.allow(curve.client_keys)

    async def stop(self) -> None:
        """Say goodbye to all clients and end their requests; idempotent.

        To be called before the engine is shut down: the clients then know that they can go on with
        their requests when a daemon is back, and hear of no failure.
        """
        if self._context is None:
            return
        for session in list(self._sessions.values()):
            session.send(Goodbye("the daemon stops"))
            self._end(session)
        for timer in self._timers.values():
            timer.cancel()
        for end, _ in self._fds:
            self._loop.remove_reader(end.getsockopt(zmq.FD))
        self._router.disable_monitor()
        self._monitor.close()
        self._router.close()
        if self._authenticator is not None:
            self._authenticator.close()
        await asyncio.to_thread(self._context.term)  # waits until the goodbyes have left
        self._context = None
        if self.endpoint.startswith("ipc://"):
            with suppress(OSError):
                os.unlink(self.endpoint.removeprefix("ipc://"))

    # --- receiving --------------------------------------------------------------------------------

    def _receive(self) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                self._take(*frames)
            else:
                self._malformed(frames[0], f"{len(frames)} frames are not an identity and one more")
        self._soon(self._receive)

    def _take(self, identity: bytes, packed: bytes) -> None:
        session = self._sessions.get(identity)
        if session is not None and session.is_closed:  # it did not read, or could not be reached
            self._end(session)
            session = None
        try:
            message = decode_from_client(packed)
        except VersionError as error:
            self.num_malformed += 1
            self._reply(identity, _version_failure(error.version))
            return
        except WireError as error:
            self._malformed(identity, str(error))
            return
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif session is None:  # of a client that was given up: it is to connect anew
            self._reply(identity, Goodbye("this connection is unknown"))
        else:
            session.last_heard_s = time.monotonic()
            session.handle(message, len(packed))
            if session.is_closed:
                self._end(session)
            elif session.num_streams:
                self._later(self._limits.heartbeat_s, self._beat)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        # A client that comes back has lost its former connection, whether we have noticed or not.
        for session in list(self._sessions.values()):
            if session.client_id == hello.client_id:
                self._end(session)
        if len(self._sessions) >= self._limits.max_clients:
            text = f"{len(self._sessions)} clients are connected, which is the limit"
            error = OverloadedError(f"{text}: try again later")
            self._reply(identity, Failed(0, *to_wire(error), None, error.retry_after))
            return
        session = ClientSession(
            identity,
            hello.client_id,
            service=self._service,
            overview=self._overview,
            inbox=self._inbox,
            limits=self._limits,
            transmit=self._transmit,
        )
        self._sessions[identity] = session
        session.welcome(self.server_id)

    def _malformed(self, identity: bytes, problem: str) -> None:
        """Count, log and drop it, and tell the sender: it may be waiting for an answer."""
        self.num_malformed += 1
        _log.warning("a malformed message of a client was dropped: %s", problem)
        error = InvalidRequestError(f"the daemon dropped a malformed message: {problem}")
        code, text = to_wire(error)
        self._reply(identity, Failed(0, code, clip_text(text), None, 0.0))

    # --- sending ----------------------------------------------------------------------------------

    def _reply(self, identity: bytes, message: FromDaemon) -> None:
        """Answer a connection without a session; whether it arrives is its own matter."""
        self._transmit(identity, encode_client(message))

    def _transmit(self, identity: bytes, packed: bytes) -> Sent:
        self._soon(self._receive)  # what came may have been announced to this send, and only to it
        try:
            self._router.send_multipart([identity, packed], zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.GONE
        return Sent.SENT

    # --- clients that go --------------------------------------------------------------------------

    def _end(self, session: ClientSession) -> None:
        session.close()
        self._sessions.pop(session.identity, None)

    def _notice(self) -> None:
        """A connection has ended, whosever it was."""
        self._read_monitor()
        self._later(SWEEP_DELAYS_S[0], self._sweep)
        self._later(SWEEP_DELAYS_S[1], self._sweep_again)

    def _read_monitor(self) -> None:
        with suppress(zmq.Again):
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)

    def _sweep_again(self) -> None:
        self._sweep()

    def _sweep(self) -> None:
        """End the sessions that cannot be reached."""
        for session in list(self._sessions.values()):
            session.send(Pong(0))
            if session.is_closed:
                self._end(session)

    def _beat(self) -> None:
        """While anything runs: hear who is silent, and be heard by those that get nothing."""
        now_s = time.monotonic()
        any_streams = False
        for session in list(self._sessions.values()):
            if not session.num_streams:
                continue
            if now_s - session.last_heard_s > self._limits.silence_s:
                _log.warning(
                    "client %s has said nothing for %.0f s: its requests end",
                    session.client_id, now_s - session.last_heard_s,
                )  # fmt: skip
                self._end(session)
            else:
                any_streams = True
        if any_streams:
            self._later(self._limits.heartbeat_s, self._beat)

    def _soon(self, callback: Callable[[], None]) -> None:
        self._later(0.0, callback)

    def _later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call it once after that time, however often it is asked for until then."""
        if callback not in self._timers:

            def call() -> None:
                del self._timers[callback]
                callback()

            self._timers[callback] = self._loop.call_later(delay_s, call)


def _version_failure(version: int) -> Failed:
    error = InvalidRequestError(
        f"the client speaks version {version} of the protocol and the daemon version "
        f"{CLIENT_PROTOCOL_VERSION}: use the furiosa-serve of the daemon for both"
    )
    return Failed(0, *to_wire(error), None, 0.0)


def _check_endpoint(endpoint: str, *, has_keys: bool) -> str:
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in ("ipc", "tcp") or not rest:
        raise InvalidRequestError(
            f"the socket {endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT", param="socket"
        )
    if scheme == "tcp" and not has_keys:
        raise InvalidRequestError(
            f"the socket {endpoint} can be reached by whoever reaches the machine, so it needs "
            f"keys: give the daemon's key file and the directory of the clients' public keys, or "
            f"use ipc://",
            param="socket",
        )
    return endpoint


def _check_unused(endpoint: str) -> None:
    """Refuse an endpoint at which somebody listens: binding it would take it away from them."""
    if endpoint.startswith("ipc://"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.connect(endpoint.removeprefix("ipc://"))
            raise FuriosaLLMError(f"{endpoint} is in use by another process: choose another")
