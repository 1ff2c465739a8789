"""Who may connect over TCP: CurveZMQ keys, and the handler that checks them (ZeroMQ's RFC 27).

Keys are files in ZeroMQ's certificate format, as `zmq.auth.create_certificates` and CZMQ write
them: `NAME.key` holds a public key, `NAME.key_secret` both.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.auth import load_certificate, load_certificates

from furiosa_llm.errors import InvalidRequestError

ZAP_ENDPOINT = "inproc://zeromq.zap.01"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerCurve:
    """The daemon's key pair and the keys of the clients that may connect."""

    public_key: bytes
    secret_key: bytes
    client_keys: frozenset[bytes]  # public, Z85

    @classmethod
    def load(cls, key_file: str | Path, clients_dir: str | Path) -> ServerCurve:
        """Read the daemon's own key pair and a directory of the clients' public keys.

        Raises: InvalidRequestError saying which file is missing, readable by others, or no key.
        """
        public_key, secret_key = _load_pair(Path(key_file))
        try:
            client_keys = frozenset(load_certificates(str(clients_dir)))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"the directory of client keys {clients_dir} cannot be read: {error}",
                param="clients_dir",
            ) from None
        if not client_keys:
            raise InvalidRequestError(
                f"the directory of client keys {clients_dir} holds no *.key file, so nobody could "
                f"connect: put the public key of each client into it",
                param="clients_dir",
            )
        return cls(public_key, secret_key, client_keys)


def _load_pair(path: Path) -> tuple[bytes, bytes]:
    try:
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        public_key, secret_key = load_certificate(str(path))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"the key file {path} cannot be read: {error}", param="key_file"
        ) from None
    if secret_key is None or public_key is None:
        raise InvalidRequestError(
            f"the key file {path} holds no secret key: give the .key_secret file", param="key_file"
        )
    if others:
        raise InvalidRequestError(
            f"the key file {path} can be read by others: run 'chmod 600 {path}'", param="key_file"
        )
    return public_key, secret_key


class Authenticator:
    """Answers ZeroMQ's question, for each connection to a CURVE server, whether it may connect.

    The one handler of its context; it lives on the event loop that is running.
    """

    def __init__(self, context: zmq.Context[Any], client_keys: frozenset[bytes]) -> None:
        self._client_keys = client_keys
        self.num_refused = 0
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ENDPOINT)
        self._loop = asyncio.get_running_loop()
        self._fd = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self._answer_all)
        self._answer_all()  # only a socket that was found empty announces what comes next

    def allow(self, client_keys: frozenset[bytes]) -> None:
        """Let in these from now on. A connection that is open lives on."""
        self._client_keys = client_keys

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _answer_all(self) -> None:
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # the descriptor is edge-triggered
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            delimiter = frames.index(b"") + 1
            version, request_id, _, address, _, mechanism, *credentials = frames[delimiter:]
            is_allowed = mechanism == b"CURVE" and _z85(credentials) in self._client_keys
            if not is_allowed:
                self.num_refused += 1
                _log.warning("a client at %s has no key that is allowed", address.decode("latin-1"))
            status = [b"200", b"OK"] if is_allowed else [b"400", b"this key is not allowed"]
            reply = [*frames[:delimiter], version, request_id, *status, b"", b""]
            self._socket.send_multipart(reply)


def _z85(credentials: list[bytes]) -> bytes:
    key = credentials[0] if credentials else b""
    return zmq.utils.z85.encode(key) if len(key) == 32 else b""
