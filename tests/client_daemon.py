"""A daemon's socket for tests: on the test's own event loop, or in a process that may be killed.

async with serving(engine, endpoint) as (service, server): ...
with DaemonProcess(model, endpoint) as daemon: ...; daemon.kill(); daemon.start()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

from engines import DEFAULTS, async_engine

from furiosa_llm import AsyncEngineArgs
from furiosa_llm.engine.settings import MOCK_SPEED_VARIABLE
from furiosa_llm.server.curve import ServerCurve
from furiosa_llm.server.service import Service
from furiosa_llm.server.socket_server import SocketServer


@contextlib.asynccontextmanager
async def serving(engine, endpoint, **options):
    """A service over `engine`, which goes on living, and its socket."""
    model = str(engine.settings.model.path)
    service = Service(AsyncEngineArgs(model=model), build=lambda args, report: engine)
    await service.start()
    server = SocketServer(service, endpoint, **options)
    await server.start()
    try:
        yield service, server
    finally:
        await server.stop()


async def eventually(condition, timeout_s=10.0):
    """Wait until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def eventually_sync(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it has not come true"
        time.sleep(0.005)


class DaemonProcess:
    """A process with an engine and its socket.

    Args:
        tokens_per_s: of the mock backend; 0 is as fast as possible.
        keys: (the daemon's key file, the directory of the clients' keys).
    """

    def __init__(self, model, endpoint, *, tokens_per_s=0, keys=()):
        self.endpoint = endpoint
        self._arguments = [str(model), endpoint, *map(str, keys)]
        self._environment = os.environ | {MOCK_SPEED_VARIABLE: str(tokens_per_s)}
        self._process = None
        self.start()

    def start(self):
        """Start it, again after a `kill`; back when it serves."""
        command = [sys.executable, __file__, *self._arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=self._environment, text=True
        )
        self.endpoint = self._process.stdout.readline().strip()
        assert self.endpoint, "the daemon did not start"

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            self._process.stdout.close()


async def _main(model, endpoint, *keys):
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    curve = ServerCurve.load(*keys) if keys else None
    async with (
        async_engine(model, **DEFAULTS) as engine,
        serving(engine, endpoint, curve=curve) as (_, server),
    ):
        print(server.endpoint, flush=True)
        await stopped.wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
