"""Tells whoever waits for a daemon how far its start is."""

from __future__ import annotations

import asyncio

from furiosa_llm.server.sd_notify import ServiceManager
from furiosa_llm.server.service import Service, ServiceState
from furiosa_llm.server.start_report import StartReport

START_POLL_S = 0.1
START_EXTENSION_S = 60.0
"""While it makes progress, the service manager is asked for so much more time."""


class StartWatch:
    """Of one service's start."""

    def __init__(self, service: Service, report: StartReport, manager: ServiceManager) -> None:
        self._service = service
        self._report = report
        self._manager = manager

    async def run(self) -> None:
        """Tell how the start goes on, whenever it does, until it is over."""
        last: object = None
        while self._service.state is ServiceState.STARTING:
            now = (self._service.phase, *self._service.progress, self._service.startup.status)
            if now != last:
                last = now
                line = self.line()
                self._report.phase(line)
                self._manager.status(line, extend_s=START_EXTENSION_S)
            await asyncio.sleep(START_POLL_S)

    def line(self) -> str:
        """What it is doing, for people."""
        phase, (done, total) = self._service.phase, self._service.progress
        workers = self._service.startup.status.workers
        if workers:
            num_ready = sum(worker.phase == "ready" for worker in workers)
            return f"starting the workers: {num_ready} of {len(workers)} ready"
        return f"{phase}: {100 * done // total} %" if total else phase
