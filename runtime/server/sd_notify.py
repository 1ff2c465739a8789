"""What a service tells systemd: ready, busy with what, alive, stopping (sd_notify(3)).

A datagram to the socket that NOTIFY_SOCKET names. Without one (no systemd, or not its main process)
nothing is sent, and nothing here ever fails: telling the manager is a courtesy.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

_log = logging.getLogger(__name__)


class ServiceManager:
    """The other end of NOTIFY_SOCKET.

    Args:
        env: None is this process's environment.
        pid: None is this process; the watchdog's time is meant for one process alone.
    """

    def __init__(self, env: Mapping[str, str] | None = None, *, pid: int | None = None) -> None:
        env = os.environ if env is None else env
        self._address = _address(env.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(env, os.getpid() if pid is None else pid)
        """The manager restarts a service that it has not heard of for so long; None: it does not
        watch.
        """

    def ready(self, status: str) -> None:
        """Start-up, or a reload, is over."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str, *, extend_s: float | None = None) -> None:
        """One line for people. `extend_s`: while starting or stopping, ask for so much time more
        from now on.
        """
        extra = () if extend_s is None else (f"EXTEND_TIMEOUT_USEC={round(extend_s * 1e6)}",)
        self._send(f"STATUS={text}", *extra)

    def alive(self) -> None:
        """The service makes progress. To be sent at least twice in every `watchdog_s`."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """The service is going down."""
        self._send("STOPPING=1", f"STATUS={status}")

    def failed(self, exit_code: int, status: str) -> None:
        """The service goes down because of an error."""
        self._send(f"EXIT_STATUS={exit_code}", f"STATUS={status}")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)  # a manager that does not read must not hold up the loop
                sender.sendto(message.encode(errors="replace"), self._address)
        except OSError as error:
            _log.debug("the service manager was not told %r: %s", message, error)


def _address(text: str) -> bytes | None:
    if text.startswith("@"):  # the abstract namespace
        return b"\0" + os.fsencode(text[1:])
    return os.fsencode(text) if text.startswith("/") else None


def _watchdog_s(env: Mapping[str, str], pid: int) -> float | None:
    text = env.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        return None
    if env.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(text) / 1e6
