"""uvicorn's HTTP protocol on sockets of our own, inside our own event loop.

Of uvicorn only the protocol is used: its Server installs signal handlers, owns the loop and wakes
up ten times a second, none of which suits a process that does other things and should idle at no
cost.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import time
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.http_protocol import HttpProtocol

BACKLOG = 2048
TLS_HANDSHAKE_TIMEOUT_S = 10.0


class _State(ServerState):
    """Connections and their tasks, and a Date header that is made when it is wanted."""

    def __init__(self) -> None:
        self._date: tuple[int, list[tuple[bytes, bytes]]] = (0, [])
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, [(b"date", formatdate(now, usegmt=True).encode())])
        return self._date[1]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """uvicorn sets an empty list at first."""


class HttpServer:
    """Listens for one app. It belongs to the event loop that `start` is called on."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._config = config
        self._state = _State()
        self._server: asyncio.Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._socket: socket.socket | None = None

    @property
    def address(self) -> str:
        """The URL to reach it by, or unix:PATH; the port is the one that was bound."""
        if self._config.uds is not None:
            return f"unix:{self._config.uds}"
        assert self._socket is not None, "start() comes first"
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def num_connections(self) -> int:
        return len(self._state.connections)

    async def start(self) -> None:
        """Bind and listen. Raises: InvalidRequestError saying what to change if that fails."""
        self._tls = _tls_context(self._config)
        self._socket = _bind(self._config)
        uvicorn_config = uvicorn.Config(
            self._app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=int(self._config.idle_timeout_s),
        )
        uvicorn_config.load()
        loop = asyncio.get_running_loop()
        make_protocol = partial(
            HttpProtocol,
            uvicorn_config,
            self._state,
            {},
            http_config=self._config,
        )
        self._server = await loop.create_server(
            make_protocol,
            sock=self._socket,
            ssl=self._tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=None if self._tls is None else TLS_HANDSHAKE_TIMEOUT_S,
        )

    def reload_certificates(self) -> None:
        """Read certificate and key again, for connections from now on; without TLS nothing.

        Raises: InvalidRequestError if they cannot be read; the old ones stay in use then.
        """
        if self._tls is not None:
            _load_certificates(self._tls, self._config)

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Listen no more, let responses end for `timeout_s`, then cut what is left; idempotent."""
        if self._server is None:
            return
        self._server.close()
        if self._config.uds is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._config.uds)
        for connection in list(self._state.connections):
            connection.shutdown()  # idle ones close now, the others after their response
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=timeout_s)
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=1.0)
        for connection in list(self._state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._server = None


def _bind(config: HttpConfig) -> socket.socket:
    return _bind_unix(config.uds) if config.uds is not None else _bind_tcp(config)


def _bind_tcp(config: HttpConfig) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise InvalidRequestError(
            f"--host: {config.host!r} is no address of this machine ({error}): use 127.0.0.1, "
            f"0.0.0.0 or a name that resolves",
            param="host",
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InvalidRequestError(
            f"--port: cannot listen on {config.host}:{config.port} ({error.strerror}): choose "
            f"another with --port, or 0 for any free one",
            param="port",
        ) from error
    return listener


def _bind_unix(path: str) -> socket.socket:
    """A socket file that its owner alone may use; a stale one of a dead server is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale_socket(path):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)  # nobody can connect before listen()
    except OSError as error:
        listener.close()
        raise InvalidRequestError(
            f"--uds: cannot listen on {path!r} ({error.strerror or error}): give a path that does "
            f"not exist, in a directory you may write to",
            param="uds",
        ) from error
    return listener


def _is_stale_socket(path: str) -> bool:
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def _tls_context(config: HttpConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificates(context, config)
    return context


def _load_certificates(context: ssl.SSLContext, config: HttpConfig) -> None:
    assert config.ssl_certfile is not None
    # Into a context of its own first: half of a pair that does not match must not get in.
    for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
        try:
            target.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, _no_password)
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"--ssl-certfile: {config.ssl_certfile!r} with the key "
                f"{config.ssl_keyfile or config.ssl_certfile!r} cannot be used: {error}",
                param="ssl_certfile",
            ) from error


def _no_password() -> str:
    """OpenSSL would ask the terminal, which a daemon does not have."""
    raise ValueError("the key is encrypted: give one without a password")
