"""Where an HTTP server is, and how to get there."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from furiosa_llm.checks import refuse


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """A base URL, taken apart."""

    host: str
    port: int
    prefix: str  # of every path, without a slash at its end, and without /v1
    is_tls: bool

    @classmethod
    def parse(cls, name: str, url: str) -> HttpUrl:
        """Read a URL such as http://127.0.0.1:8000, with or without /v1 at its end.

        Args:
            name: what the user typed before it, for the message.
        Raises: InvalidRequestError
        """
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:  # a port of 99999, a broken IPv6 address
            raise refuse(name, f"{url!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise refuse(name, f"{url!r} is not a base URL like http://127.0.0.1:8000")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if is_tls else 80), prefix, is_tls)

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.is_tls else None

    def __str__(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.authority}{self.prefix}"
