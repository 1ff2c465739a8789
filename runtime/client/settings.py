"""How a client reaches its daemon, and for how long it tries."""

from __future__ import annotations

import os
from dataclasses import dataclass

from furiosa_llm import __version__
from furiosa_llm.client.address import CurveKeys, endpoint_of
from furiosa_llm.client.connection import Connection
from furiosa_llm.client.requests import checked_timeout
from furiosa_llm.errors import InvalidRequestError

CONNECT_TIMEOUT_S = 10.0
RECONNECT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What both clients are given."""

    address: str
    curve: CurveKeys | None
    timeout_s: float | None
    connect_timeout_s: float
    reconnect_timeout_s: float

    def __post_init__(self) -> None:
        checked_timeout(self.timeout_s)
        for name in ("connect_timeout_s", "reconnect_timeout_s"):
            if checked_timeout(getattr(self, name)) is None:
                raise InvalidRequestError(f"{name}: None is not a number of seconds", param=name)

    def resolve(self) -> tuple[Connection, str, tuple[bytes, bytes, bytes] | None]:
        """A connection that is not open yet, the endpoint and the keys.

        Raises: FuriosaLLMError if no daemon of that name runs; InvalidRequestError.
        """
        keys = None if self.curve is None else self.curve.load()
        endpoint = endpoint_of(self.address, has_keys=keys is not None)
        connection = Connection(
            os.urandom(16).hex(),
            software=f"furiosa-llm client {__version__}",
            address=endpoint,
            connect_timeout_s=self.connect_timeout_s,
            reconnect_timeout_s=self.reconnect_timeout_s,
        )
        return connection, endpoint, keys

    def timeout_of(self, timeout_s: float | None) -> float | None:
        """The time that a call has: its own, else the client's."""
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)
