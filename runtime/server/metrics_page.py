"""GET /metrics, from the first moment of the server on."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.server.overview import Overview

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsPage:
    """The endpoint."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    async def get(self, request: Request) -> Response:
        return Response(await self._overview.metrics(), headers={"content-type": CONTENT_TYPE})
