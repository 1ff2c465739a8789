"""What one client of the socket may have going on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds per connection; what passes one is refused, and nothing else suffers."""

    max_clients: int = 1024
    max_streams: int = 1024
    """Requests that have not ended, or whose last tokens wait for the client's credits."""
    max_request_bytes: int = 64 << 20
    """Of the messages that began those."""
    max_calls: int = 64
    """Questions that are being answered."""
    max_unread_messages: int = 1024
    """A client whose socket holds this many, and ZeroMQ's own queue, reads nothing: it is cut."""
    heartbeat_s: float = 5.0
    """While a client has anything running, each end says something at least this often."""

    @property
    def silence_s(self) -> float:
        """A client that has requests and is silent for this long is gone."""
        return 3 * self.heartbeat_s
