"""GET /v1/status: what the daemon and its workers are doing, in any state of the server."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.server.json_response import json_response
from furiosa_llm.server.overview import Overview


class StatusPage:
    """The endpoint."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    async def get(self, request: Request) -> Response:
        return json_response(await self._overview.status())
