"""GET /v1/models and /v1/models/{id}: what is served, and how much of it fits a request."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.server.errors import model_not_found
from furiosa_llm.server.json_response import json_response
from furiosa_llm.server.service import Service


def check_model(service: Service, name: str | None) -> str:
    """The model that a request asks for; None is the first one served.

    Raises: HttpError (404) if it is not served here.
    """
    served = service.served_model_names
    if name is None:
        return served[0]
    if name not in served:
        raise model_not_found(name, served)
    return name


class Models:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, request: Request) -> Response:
        names = self._service.served_model_names
        return json_response({"object": "list", "data": [self._card(name) for name in names]})

    async def get(self, request: Request) -> Response:
        name = request.path_params["model"]
        card = self._card(name)  # first, so that a server that is starting says so
        check_model(self._service, name)
        return json_response(card)

    def _card(self, name: str) -> dict[str, Any]:
        engine = self._service.engine
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "furiosa-serve",
            "root": self._service.model_name,
            "parent": None,
            "max_model_len": engine.max_model_len,
            "max_prompt_len": engine.max_model_len - 1,  # one token is left for the answer
            "max_context_len": engine.max_model_len,
            "artifact_id": self._service.artifact_id,
            "weights": engine.weights,
        }
