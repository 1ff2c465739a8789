"""Probes for whoever runs the server: is it alive, would it answer, how far has it come up?

/livez    200 while the event loop turns.
/readyz   200 exactly while a request would get tokens (readiness.py); /health is the same.
/startupz 200 once it has been ready; before that 503 with the phase.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.errors import ServiceUnavailableError
from furiosa_llm.server.json_response import json_response
from furiosa_llm.server.readiness import Readiness
from furiosa_llm.server.service import Service, ServiceState


class Probes:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._readiness = Readiness(service)

    async def live(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        reason = await self._readiness.reason_against()
        if reason is None:
            return json_response({"status": "ready"})
        return _not_ready({"status": "not ready", "reason": reason})

    async def started(self, request: Request) -> Response:
        service = self._service
        if service.state is ServiceState.STARTING:
            return _not_ready(_how_far(service))
        content = {"status": service.state.value, "phase": service.phase}
        if service.state is ServiceState.FAILED:
            return _not_ready(content | {"reason": str(service.failure)})
        return json_response(content)


def _how_far(service: Service) -> dict[str, Any]:
    done, total = service.progress
    return {
        "status": service.state.value,
        "phase": service.phase,
        "progress": {"done": done, "total": total},
        "workers": msgspec.to_builtins(service.startup.status.workers),
    }


def _not_ready(content: object) -> Response:
    retry_after = str(int(ServiceUnavailableError("").retry_after))
    return json_response(content, 503, {"retry-after": retry_after})
