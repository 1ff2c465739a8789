"""The event loop behind the asynchronous client.

ZeroMQ's descriptors are edge-triggered: they tell of a change, which a send may swallow. So they
are read empty each time, and looked at again after whatever was sent.
"""

from __future__ import annotations

import asyncio
import math

import zmq

from furiosa_llm.client.connection import Connection
from furiosa_llm.client.driver import Command, Driver
from furiosa_llm.client.transport import Transport


class IoLoop:
    """Owns the connection, on the loop that is running when it is made."""

    def __init__(
        self, connection: Connection, endpoint: str, keys: tuple[bytes, bytes, bytes] | None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_closed = False
        self._connection = connection
        self._transport = Transport(endpoint, keys)
        self._driver = Driver(connection, self._transport, self._watch_sockets)
        self._fds: list[int] = []
        self._is_pump_due = False
        self._timer: asyncio.TimerHandle | None = None

    def run(self, command: Command) -> None:
        """Do this, on the loop's own thread; nothing once it is closed."""
        if not self.is_closed:
            self._driver.run(command)
            self._pump_soon()

    def run_threadsafe(self, command: Command) -> None:
        """Do this soon, from any thread, or from wherever the garbage collector runs."""
        if not self.is_closed and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.run, command)

    async def close(self) -> None:
        """Close the connection, and tell those who wait; idempotent."""
        if self.is_closed:
            return
        self._driver.run(self._connection.close)
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(self._transport.close)

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        if self.is_closed:
            return
        has_more = self._driver.pump()
        if self._driver.tick() or has_more:
            self._pump_soon()
        self._set_timer()

    def _set_timer(self) -> None:
        sleep_s = self._driver.sleep_s
        if math.isinf(sleep_s):
            return
        # A timer that comes early does no harm, and setting one anew each time would cost more.
        due_s = self.loop.time() + sleep_s
        if self._timer is None or self._timer.cancelled() or self._timer.when() > due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(due_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._pump()

    def _watch_sockets(self) -> None:
        for fd in self._fds:
            self.loop.remove_reader(fd)
        self._fds = [int(end.getsockopt(zmq.FD)) for end in self._transport.sockets]
        for fd in self._fds:
            self.loop.add_reader(fd, self._pump)
        self._pump_soon()  # only a socket that was found empty announces what comes next
