"""The HTTP application: which route is served by what, and what holds for all of them.

Around every route: a request id, the API key, and errors in one shape. It is plain ASGI, so that
a stream's chunks pass through one thin wrapper and no middleware.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from furiosa_llm import __version__
from furiosa_llm.server.anthropic_errors import REQUEST_ID_HEADER, anthropic_error, is_anthropic
from furiosa_llm.server.anthropic_messages import CountTokens, Messages
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.chat import ChatCompletions
from furiosa_llm.server.completions import Completions
from furiosa_llm.server.docs_page import DocsPage
from furiosa_llm.server.errors import HttpError, http_error_of, method_not_allowed, not_found
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.http_protocol import connection_of
from furiosa_llm.server.json_response import send_json
from furiosa_llm.server.mailbox import ClientLeftError
from furiosa_llm.server.metrics_page import MetricsPage
from furiosa_llm.server.models import Models
from furiosa_llm.server.openapi import OpenApi
from furiosa_llm.server.overview import Overview, OwnersOverview
from furiosa_llm.server.probes import Probes
from furiosa_llm.server.request_ids import assign_request_id
from furiosa_llm.server.responses import Responses, no_such_response
from furiosa_llm.server.service import Service
from furiosa_llm.server.status_page import StatusPage
from furiosa_llm.server.tokenization import Detokenize, Tokenize, TokenizerInfo
from furiosa_llm.server.version import version

EXPOSED_HEADERS = ("X-Request-Id", "X-Ignored-Params", "Retry-After")

DROP_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


def make_routes(
    service: Service, auth: ApiKeys, config: HttpConfig, overview: Overview
) -> list[BaseRoute]:
    """The table of routes. An endpoint is a Starlette function or, where it streams, an ASGI app.

    An endpoint raises what is wrong (any FuriosaLLMError, see errors.py); nobody catches it but
    `HttpApp`.
    """
    probes, models = Probes(service), Models(service)
    return [
        Route("/livez", probes.live),
        Route("/readyz", probes.ready),
        Route("/health", probes.ready),
        Route("/startupz", probes.started),
        Route("/version", version),
        Route("/tokenize", Tokenize(service), methods=["POST"]),
        Route("/detokenize", Detokenize(service), methods=["POST"]),
        Route("/tokenizer_info", TokenizerInfo(service).get),
        Route("/v1/completions", Completions(service, config), methods=["POST"]),
        Route("/v1/chat/completions", ChatCompletions(service, config), methods=["POST"]),
        Route("/v1/responses", Responses(service, config), methods=["POST"]),
        Route("/v1/responses/{response_id}", no_such_response, methods=["GET", "DELETE"]),
        Route("/v1/responses/{response_id}/cancel", no_such_response, methods=["POST"]),
        Route("/v1/responses/{response_id}/input_items", no_such_response),
        Route("/v1/messages", Messages(service, config), methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokens(service), methods=["POST"]),
        Route("/v1/status", StatusPage(overview).get),
        Route("/metrics", MetricsPage(overview).get),
        Route("/openapi.json", OpenApi(service, auth, __version__).get),
        Route("/docs", DocsPage().get),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.get),
    ]


def make_app(
    service: Service, auth: ApiKeys, config: HttpConfig, overview: Overview | None = None
) -> ASGIApp:
    """The application of one service.

    Args:
        overview: of the daemon that the service is a part of; None: it is all of it.
    """
    overview = OwnersOverview(service) if overview is None else overview
    app: ASGIApp = HttpApp(make_routes(service, auth, config, overview), auth, service)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    return app


class HttpApp:
    """Routes, and what surrounds them."""

    def __init__(self, routes: list[BaseRoute], auth: ApiKeys, service: Service) -> None:
        self._router = Router(routes, redirect_slashes=False, default=self._no_route)
        self._auth = auth
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # http_server.py turns the others off
        scope["app"] = self  # Starlette: raise for a wrong method instead of answering in text
        request_id = assign_request_id(scope)
        id_headers = [(b"x-request-id", request_id.encode())]
        error_body: Callable[[HttpError, str], bytes] = HttpError.body
        if is_anthropic(scope["path"]):
            id_headers.append((REQUEST_ID_HEADER, request_id.encode()))
            error_body = anthropic_error
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if connection_of(scope).is_closed:
                raise ClientLeftError
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *id_headers]
            await send(message)

        try:
            self._auth.check(scope)
            await self._router(scope, receive, send_with_id)
        except ClientLeftError:
            return  # nobody is left to be told anything
        except asyncio.CancelledError:  # the server stops and has waited long enough
            connection_of(scope).cut()
        except Exception as error:
            http_error = self._error_of(error, scope)
            if http_error.status == 500:
                _log.error("request %s failed", request_id, exc_info=error)
            if has_started:
                raise  # what was sent cannot be taken back: the connection is closed
            self._service.metrics.refused(
                status=http_error.status, reason=http_error.error_code or http_error.type
            )
            body = error_body(http_error, request_id)
            answer = partial(send_json, body, send_with_id, http_error.headers, http_error.status)
            if http_error.status == 413:
                await answer(is_last=False)
                await _drop_body(receive)
                await send_with_id({"type": "http.response.body"})
            else:
                await answer()

    def _error_of(self, error: Exception, scope: Scope) -> HttpError:
        if isinstance(error, HTTPException) and error.status_code == 405:
            return method_not_allowed(scope["method"], scope["path"], self._methods(scope["path"]))
        return http_error_of(error)

    async def _no_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the right path where the wrong one shows which was meant."""
        path = scope["path"]
        meant = self._meant(path)
        hint = "" if meant is None else f": you may mean {meant}"
        raise not_found(f"there is no route {path[:200]!r}{hint}")

    def _meant(self, path: str) -> str | None:
        bare = "/" + path.strip("/")
        while bare.startswith("/v1/v1/"):
            bare = bare[3:]
        for candidate in (bare, "/v1" + bare, bare.removeprefix("/v1")):
            if candidate and self._methods(candidate):
                return candidate
        return None

    def _methods(self, path: str) -> tuple[str, ...]:
        """The methods that `path` has; none if there is no such route."""
        scope = {"type": "http", "path": path, "method": "", "headers": []}
        found = set[str]()
        for route in self._router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                found |= route.methods or set()
        return tuple(sorted(found))


async def _drop_body(receive: Receive) -> None:
    """Read what a refused client still sends: closing with bytes unread resets the connection, and
    then the client may not see why.
    """
    try:
        async with asyncio.timeout(DROP_TIMEOUT_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        return
