"""Errors as Anthropic's clients know them, for the paths of its API."""

from __future__ import annotations

import msgspec

from furiosa_llm.server.errors import HttpError

PREFIX = "/v1/messages"
REQUEST_ID_HEADER = b"request-id"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class AnthropicErrorContent(msgspec.Struct, kw_only=True):
    """What went wrong."""

    type: str
    message: str
    param: str | None = None
    """The field at fault. Anthropic has no such member; its clients skip it."""


class AnthropicError(msgspec.Struct, kw_only=True):
    """An answer other than 2xx, or the last event of a stream that failed."""

    type: str = "error"
    error: AnthropicErrorContent
    request_id: str


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's API."""
    return path == PREFIX or path.startswith(PREFIX + "/")


def anthropic_error(error: HttpError, request_id: str) -> bytes:
    """The JSON body."""
    content = error.content(request_id)
    kind = _TYPES.get(error.status, "api_error")
    return msgspec.json.encode(
        AnthropicError(
            error=AnthropicErrorContent(
                type=kind, message=content["message"], param=content["param"]
            ),
            request_id=request_id,
        )
    )
