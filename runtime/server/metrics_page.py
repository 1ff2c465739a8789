"""GET /metrics, from the first moment of the server on."""

from __future__ import annotations

import asyncio
import platform
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.service import Service

if TYPE_CHECKING:
    from furiosa_llm.server.metrics_collector import MetricsCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsPage:
    """The endpoint."""

    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._build_info = {"version": version, "python_version": platform.python_version()}
        self._collector: MetricsCollector | None = None

    async def get(self, request: Request) -> Response:
        if self._collector is None:
            self._collector = await asyncio.to_thread(self._make_collector)
        # On the loop, which owns the numbers: about a millisecond.
        return Response(self._collector.text(), headers={"content-type": CONTENT_TYPE})

    def _make_collector(self) -> MetricsCollector:
        # Here and not at the top: prometheus-client takes 20 ms to load, which the start can do
        # without, and whoever is not scraped for good.
        from furiosa_llm.server.metrics_collector import MetricsCollector

        metrics = self._service.metrics
        if not isinstance(metrics, Metrics):
            metrics = Metrics()  # somebody else listens; what the engine says is still shown
        return MetricsCollector(self._service, metrics, self._build_info)
