"""furiosa_llm.client: talk to a furiosa-serve daemon over its socket.

Every name is loaded on first use, and none loads the engine, a tokenizer or numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME_OF = {
    "AsyncClient": "furiosa_llm.client.async_client",
    "AsyncStream": "furiosa_llm.client.async_client",
    "CannotResumeError": "furiosa_llm.client.errors",
    "Client": "furiosa_llm.client.client",
    "ClientClosedError": "furiosa_llm.client.errors",
    "CurveKeys": "furiosa_llm.client.address",
    "DaemonStatus": "furiosa_llm.client.status",
    "DaemonUnreachableError": "furiosa_llm.client.errors",
    "RequestTimeoutError": "furiosa_llm.client.errors",
    "Stream": "furiosa_llm.client.client",
}

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "CannotResumeError",
    "Client",
    "ClientClosedError",
    "CurveKeys",
    "DaemonStatus",
    "DaemonUnreachableError",
    "RequestTimeoutError",
    "Stream",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'furiosa_llm.client' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from furiosa_llm.client.address import CurveKeys
    from furiosa_llm.client.async_client import AsyncClient, AsyncStream
    from furiosa_llm.client.client import Client, Stream
    from furiosa_llm.client.errors import (
        CannotResumeError,
        ClientClosedError,
        DaemonUnreachableError,
        RequestTimeoutError,
    )
    from furiosa_llm.client.status import DaemonStatus
