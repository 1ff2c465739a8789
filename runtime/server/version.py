"""GET /version."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm import __version__
from furiosa_llm.server.json_response import json_response


async def version(request: Request) -> Response:
    """Of this server; it answers in every state."""
    return json_response({"version": __version__})
