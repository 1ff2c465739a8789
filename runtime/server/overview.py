"""What the whole daemon says of itself, whichever of its processes is asked.

The one that owns the workers asks the other front-ends and adds up. Any other one asks that one,
over the control socket, so that it need not know who else there is.
"""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from furiosa_llm import __version__
from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.errors import ServiceUnavailableError
from furiosa_llm.server.front_end_counts import FrontEndCounts, counts_of
from furiosa_llm.server.front_end_report import FrontEndReports
from furiosa_llm.server.service import Service
from furiosa_llm.server.status import FrontEndStatus, ServerStatus, status_of

if TYPE_CHECKING:
    from furiosa_llm.server.metrics_collector import MetricsCollector

ANSWER_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 1 << 26
"""A worker takes a few kilobytes of metrics, and there may be thousands."""


class Overview(Protocol):
    """The daemon, seen from one of its processes."""

    async def status(self) -> ServerStatus:
        """What it and its workers are doing. Raises: ServiceUnavailableError."""
        ...

    async def metrics(self) -> bytes:
        """What it has counted, in Prometheus' text format. Raises: ServiceUnavailableError."""
        ...


async def _nobody() -> FrontEndReports:
    return FrontEndReports()


class OwnersOverview:
    """Of the process that owns the workers, which may be the only one.

    Args:
        ask_others: has the other front-ends report.
    """

    def __init__(
        self, service: Service, ask_others: Callable[[], Awaitable[FrontEndReports]] = _nobody
    ) -> None:
        self._service = service
        self._ask_others = ask_others
        self._collector: MetricsCollector | None = None

    async def status(self) -> ServerStatus:
        reports = (await self._ask_others()).now
        status = status_of(self._service)
        for report in reports:
            status.num_in_flight += report.counts.num_in_flight
            if status.engine is not None and report.engine is not None:
                status.engine = _together(status.engine, report.engine)
            status.front_ends.append(
                FrontEndStatus(
                    index=report.index,
                    pid=report.pid,
                    num_restarts=report.num_restarts,
                    num_in_flight=report.counts.num_in_flight,
                    num_connections=report.num_connections,
                )
            )
        return status

    async def metrics(self) -> bytes:
        if self._collector is None:
            self._collector = await asyncio.to_thread(self._make_collector)
        counts: FrontEndCounts = (await self._ask_others()).counts
        # On the loop, which owns the numbers: about a millisecond.
        return self._collector.text(counts_of(self._service) + counts)

    def _make_collector(self) -> MetricsCollector:
        # Here and not at the top: prometheus-client takes 20 ms to load, which the start can do
        # without, and whoever is not scraped for good.
        from furiosa_llm.server.metrics_collector import MetricsCollector

        build_info = {"version": __version__, "python_version": platform.python_version()}
        return MetricsCollector(self._service, build_info)


class RemoteOverview:
    """Of any other process: what the owner's says.

    Args:
        control: the daemon's control socket.
    """

    def __init__(self, control: Path) -> None:
        self._control = control

    async def status(self) -> ServerStatus:
        return msgspec.convert((await self._ask("overview"))["status"], ServerStatus)

    async def metrics(self) -> bytes:
        text: str = (await self._ask("metrics"))["text"]
        return text.encode()

    async def _ask(self, command: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(
                    str(self._control), limit=MAX_ANSWER_BYTES
                )
                try:
                    writer.write(json.dumps({"command": command}).encode() + b"\n")
                    answer = json.loads(await reader.readline())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):
            answer = {}
        if "ok" not in answer:
            raise ServiceUnavailableError("the daemon's first process does not answer: try again")
        return dict(answer)


def _together(owners: EngineStatus, other: EngineStatus) -> EngineStatus:
    """The owner's view of the engine, with what another front-end has in it.

    Of the workers themselves the owner's view is the newest.
    """
    dispatched = {worker.worker_id: worker.num_dispatched for worker in other.workers}
    return replace(
        owners,
        workers=tuple(
            replace(w, num_dispatched=w.num_dispatched + dispatched.get(w.worker_id, 0))
            for w in owners.workers
        ),
        num_requests=owners.num_requests + other.num_requests,
        num_sequences=owners.num_sequences + other.num_sequences,
        num_waiting=owners.num_waiting + other.num_waiting,
        sequences_per_s=owners.sequences_per_s + other.sequences_per_s,
    )
