"""One table from the error tree to HTTP: status, OpenAI's type and code, headers.

A 4xx tells the caller what was wrong, in our words. A 5xx never echoes internals: its text is fixed
here, and the log has the rest under the request's id.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
from starlette.exceptions import HTTPException

from furiosa_llm.errors import (
    ContextLengthError,
    EngineShutDownError,
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    QuarantinedError,
    RequestAbortedError,
    ServiceUnavailableError,
    WorkerDiedError,
)

Headers = tuple[tuple[bytes, bytes], ...]

NO_RETRY: Headers = ((b"x-should-retry", b"false"),)
"""OpenAI's clients try a 5xx again by themselves; this header keeps them from it."""

NO_WORKER_RETRY_AFTER_S = 5.0
"""A server that has lost all workers ends, and whoever runs it starts it again."""

MAX_MESSAGE_CHARS = 2_000


class HttpError(FuriosaLLMError):
    """An answer other than 2xx, as OpenAI's clients know it.

    Attributes:
        status: of HTTP.
        type: the kind of error, such as invalid_request_error.
        error_code: what a program may look at, such as context_length_exceeded; or None.
        param: the field at fault, such as messages[0].content; or None.
        headers: to send besides the usual ones.
    """

    code: ClassVar[str] = "http_error"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.error_code = code
        self.param = param
        self.headers = headers

    def content(self, request_id: str) -> dict[str, Any]:
        """The value of `error` in a body or a stream's last chunk."""
        return {
            "message": _printable(str(self)),
            "type": self.type,
            "param": None if self.param is None else _printable(self.param),
            "code": self.error_code,
            "request_id": request_id,
        }

    def body(self, request_id: str) -> bytes:
        """The JSON body."""
        return msgspec.json.encode({"error": self.content(request_id)})


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> HttpError:
    """400: the caller's request is wrong."""
    return HttpError(400, message, type="invalid_request_error", code=code, param=param)


def unsupported(param: str, reason: str) -> HttpError:
    """400: a field that other servers know and this one cannot honour."""
    return invalid(f"{param}: {reason}", param, code="unsupported_parameter")


def unauthorized(message: str) -> HttpError:
    """401."""
    return HttpError(
        401,
        message,
        type="authentication_error",
        code="invalid_api_key",
        headers=((b"www-authenticate", b"Bearer"),),
    )


def model_not_found(name: str, served: tuple[str, ...]) -> HttpError:
    """404: the request names a model that is not served here."""
    return HttpError(
        404,
        f"the model {name[:200]!r} is not served here: use {' or '.join(map(repr, served))}",
        type="not_found_error",
        code="model_not_found",
        param="model",
    )


def not_found(message: str) -> HttpError:
    """404: no such route."""
    return HttpError(404, message, type="not_found_error", code="not_found")


def method_not_allowed(method: str, path: str, allowed: tuple[str, ...]) -> HttpError:
    """405."""
    names = ", ".join(allowed)
    return HttpError(
        405,
        f"{method} is not possible on {path}: use {names}",
        type="invalid_request_error",
        code="method_not_allowed",
        headers=((b"allow", names.encode()),),
    )


def body_too_large(max_bytes: int) -> HttpError:
    """413."""
    return HttpError(
        413,
        f"the body is larger than {max_bytes} bytes, the server's limit: send less",
        type="invalid_request_error",
        code="request_too_large",
        headers=((b"connection", b"close"),),  # the rest of the body is not read
    )


def unsupported_media_type(header: str, given: str) -> HttpError:
    """415."""
    return HttpError(
        415,
        f"the {header} is {given[:100]!r}: send plain JSON as application/json in UTF-8",
        type="invalid_request_error",
        code="unsupported_media_type",
    )


def http_error_of(error: BaseException) -> HttpError:
    """What `error` is to the client; anything unknown is an internal error without details."""
    match error:
        case HttpError():
            return error
        case InvalidRequestError():
            code = error.code if isinstance(error, ContextLengthError) else None
            return invalid(str(error), error.param, code=code)
        case OverloadedError():
            return HttpError(
                429,
                str(error),
                type="rate_limit_error",
                code=error.code,
                headers=_retry_after(error.retry_after),
            )
        case ServiceUnavailableError():
            return HttpError(
                503,
                str(error),
                type="server_error",
                code=error.code,
                headers=_retry_after(error.retry_after),
            )
        case EngineShutDownError() | RequestAbortedError():
            return HttpError(
                503,
                "the server is shutting down: try again later",
                type="server_error",
                code=ServiceUnavailableError.code,
                headers=_retry_after(1.0),
            )
        case QuarantinedError():
            return HttpError(
                500,
                "the workers that ran this request died, so it is not tried again",
                type="server_error",
                code=error.code,
                headers=NO_RETRY,
            )
        case WorkerDiedError():
            return HttpError(
                503,
                "no worker is left to run this request: try again later, or another server",
                type="server_error",
                code=error.code,
                headers=_retry_after(NO_WORKER_RETRY_AFTER_S),
            )
        case HTTPException():
            return HttpError(
                error.status_code, error.detail, type="invalid_request_error", code=None
            )
    return HttpError(
        500,
        "the server failed on this request; its log says why, under the request's id",
        type="server_error",
        code=FuriosaLLMError.code,
        headers=NO_RETRY,
    )


def _retry_after(seconds: float) -> Headers:
    return (
        (b"retry-after", str(max(1, math.ceil(seconds))).encode()),
        (b"retry-after-ms", str(max(1, math.ceil(1000 * seconds))).encode()),
    )


def _printable(text: str) -> str:
    """`text` as valid Unicode of bounded length: what a caller sent may come back in a message."""
    return text[:MAX_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode()
