"""The thread behind the blocking client: one for all its requests, asleep while nothing happens."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from typing import Any

import zmq

from furiosa_llm.client.connection import Connection
from furiosa_llm.client.driver import Command, Driver
from furiosa_llm.client.transport import Transport

_log = logging.getLogger(__name__)


class IoThread:
    """Owns the connection. `post` may be called by any thread."""

    def __init__(
        self, connection: Connection, endpoint: str, keys: tuple[bytes, bytes, bytes] | None
    ) -> None:
        self._connection = connection
        self._transport = Transport(endpoint, keys)
        self._driver = Driver(connection, self._transport, self._watch_sockets)
        self._commands: deque[Command] = deque()
        # Guards what follows. Reentrant: a stream that is let go of posts a command from wherever
        # the garbage collector runs, which may be inside `post`.
        self._lock = threading.RLock()
        self._is_closing = False
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._watched: list[zmq.Socket[Any]] = []
        self._poller.register(self._wakeup_fd, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="furiosa-client", daemon=True)
        self._thread.start()

    def post(self, command: Command) -> bool:
        """Have the thread run this. Returns: False if it has ended, and nothing comes of it."""
        with self._lock:
            if self._is_closing:
                return False
            self._commands.append(command)
            os.eventfd_write(self._wakeup_fd, 1)
            return True

    def close(self) -> None:
        """Close the connection, tell those who wait, and end the thread; idempotent."""
        with self._lock:
            if not self._is_closing:
                self._is_closing = True
                os.eventfd_write(self._wakeup_fd, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._turn()
        except Exception:
            # A defect: those who wait are told by `close` below, and later ones by `post`.
            _log.exception("the client cannot go on")
        finally:
            with self._lock:
                self._is_closing = True
            self._run_commands()
            self._driver.run(self._connection.close)
            self._transport.close()
            os.close(self._wakeup_fd)

    def _turn(self) -> None:
        sleep_s = self._driver.sleep_s
        timeout_ms = None if math.isinf(sleep_s) else math.ceil(1000 * sleep_s)
        for end, _ in self._poller.poll(timeout_ms):
            if end == self._wakeup_fd:
                os.eventfd_read(self._wakeup_fd)
        self._run_commands()
        self._driver.pump()
        self._driver.tick()

    def _run_commands(self) -> None:
        while self._commands:
            self._driver.run(self._commands.popleft())

    def _watch_sockets(self) -> None:
        for end in self._watched:
            self._poller.unregister(end)
        self._watched = self._transport.sockets
        for end in self._watched:
            self._poller.register(end, zmq.POLLIN)
