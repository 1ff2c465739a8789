"""A furiosa-serve HTTP server inside the test's process, on a free port of 127.0.0.1.

    with running_server(model) as server:
        httpx.get(server.url + "/livez")

It runs on an event loop of its own thread, so that plain clients and asyncio ones both can call it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvloop
from engines import DEFAULTS

from furiosa_llm import AsyncEngineArgs
from furiosa_llm.server.app import make_app
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.http_server import HttpServer
from furiosa_llm.server.limits import Limits
from furiosa_llm.server.metrics_hooks import MetricsHooks
from furiosa_llm.server.service import Service

T = TypeVar("T")


@dataclass(frozen=True)
class RunningServer:
    """A server that listens; `service` and `http` belong to its loop: use `run`."""

    url: str
    service: Service
    http: HttpServer
    auth: ApiKeys
    loop: asyncio.AbstractEventLoop

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await `make()` on the server's loop."""

        async def call() -> T:
            return await make()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(60)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def connect(self) -> socket.socket:
        """A connection for bytes of the test's own making."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, request: bytes) -> bytes:
        """Send these bytes, and read until the server closes."""
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def running_server(
    model: Path | str,
    *,
    names: tuple[str, ...] = ("tiny",),
    config: HttpConfig | None = None,
    limits: Limits | None = None,
    metrics: MetricsHooks | None = None,
    key_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    chat_template: str | None = None,
    build: Any = None,
    is_started: bool = True,
    **engine_args: Any,
) -> Iterator[RunningServer]:
    """A server on `model`, by default with the mock backend (see `engines.DEFAULTS`).

    Args:
        is_started: wait until the model is loaded; else `service.start` is the test's to call.
    """
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="http-server")
    thread.start()
    args = AsyncEngineArgs(model=str(model), **(DEFAULTS | engine_args))
    config = HttpConfig(port=0) if config is None else config
    auth = ApiKeys(key_file, {} if environ is None else environ)

    async def begin() -> RunningServer:
        service = Service(
            args,
            served_model_names=names,
            limits=limits,
            metrics=metrics,
            chat_template=chat_template,
            build=build,
        )
        http = HttpServer(make_app(service, auth, config), config)
        await http.start()
        if is_started:
            await service.start()
        return RunningServer(http.address, service, http, auth, loop)

    async def end(server: RunningServer) -> None:
        await server.http.stop(timeout_s=0)
        await server.service.stop()

    try:
        server = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(end(server), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
