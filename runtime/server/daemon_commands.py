"""What a daemon does on command, over its control socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from furiosa_llm.checks import check_number
from furiosa_llm.server.control import Command
from furiosa_llm.server.options import MAX_DRAIN_S

if TYPE_CHECKING:
    from furiosa_llm.server.daemon import Daemon

Arguments = Mapping[str, Any]
Answers = AsyncIterator[dict[str, Any]]


def commands_of(daemon: Daemon) -> dict[str, Command]:
    """By name."""
    commands = _Commands(daemon)
    return {
        "status": commands.status,
        "overview": commands.overview,
        "metrics": commands.metrics,
        "drain": commands.drain,
        "stop": commands.stop,
        "reload": commands.reload,
    }


class _Commands:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def status(self, arguments: Arguments) -> Answers:
        yield {"ok": True, **await self._daemon.status()}

    async def overview(self, arguments: Arguments) -> Answers:
        """For the other front-ends, whose HTTP shows it."""
        status = await self._daemon.overview.status()
        yield {"ok": True, "status": msgspec.to_builtins(status)}

    async def metrics(self, arguments: Arguments) -> Answers:
        """As `overview`."""
        yield {"ok": True, "text": (await self._daemon.overview.metrics()).decode()}

    async def drain(self, arguments: Arguments) -> Answers:
        """Take no more requests, and say when none is left; the daemon stays."""
        timeout_s = self._timeout_of(arguments)
        self._daemon.begin_drain()
        yield {"num_in_flight": await self._daemon.num_in_flight(), "drain_timeout_s": timeout_s}
        yield {"ok": True, "num_in_flight": await self._daemon.drained(timeout_s)}

    async def stop(self, arguments: Arguments) -> Answers:
        timeout_s = self._timeout_of(arguments)
        self._daemon.ask_to_stop(timeout_s)
        yield {"num_in_flight": await self._daemon.num_in_flight(), "drain_timeout_s": timeout_s}
        yield {"ok": True, "num_cut": await self._daemon.ended()}

    async def reload(self, arguments: Arguments) -> Answers:
        async for step in self._daemon.reload():
            yield {"step": step}
        yield {"ok": True}

    def _timeout_of(self, arguments: Arguments) -> float:
        given = arguments.get("timeout_s")
        if given is None:
            return self._daemon.drain_timeout_s
        return check_number("timeout_s", given, low=0, high=MAX_DRAIN_S)
