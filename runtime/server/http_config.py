"""Where HTTP listens, and what it bears from a connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Of one `HttpServer` and its app."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: the system picks a free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead of host and port."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    """None: the key is in `ssl_certfile`."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call; "*" is any. Empty: no CORS header is sent."""
    header_timeout_s: float = 15.0
    """From a request's first byte to the end of its headers."""
    body_timeout_s: float = 60.0
    """From the end of its headers to the end of its body."""
    idle_timeout_s: float = 75.0
    """Of a connection between two requests; whole seconds."""
    write_timeout_s: float = 300.0
    """A reader that takes nothing off a full buffer for so long is cut off."""
    max_header_bytes: int = 64 << 10
    max_connections: int = 4096
    """One more is answered 503 and closed."""
    keep_alive_interval_s: float = 15.0
    """A stream that has been silent for so long gets a comment."""
    reuse_port: bool = False
    """SO_REUSEPORT: several front-end processes listen on one port."""
