"""What a client can meet besides the errors of the daemon itself."""

from __future__ import annotations

from typing import ClassVar

from furiosa_llm.errors import (
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    ServiceUnavailableError,
    from_wire,
)
from furiosa_llm.wire.client_messages import Failed


class DaemonUnreachableError(FuriosaLLMError, ConnectionError):
    """No daemon answers at the address, or it was gone for longer than the client waits."""

    code: ClassVar[str] = "daemon_unreachable"


class RequestTimeoutError(FuriosaLLMError, TimeoutError):
    """The time that the caller gave a call is up; its request was aborted."""

    code: ClassVar[str] = "request_timeout"


class ClientClosedError(FuriosaLLMError):
    """The client was closed while, or before, this was asked of it."""

    code: ClassVar[str] = "client_closed"


class CannotResumeError(FuriosaLLMError):
    """The daemon came back with another model, so a stream could not go on as it began."""

    code: ClassVar[str] = "cannot_resume"


def error_of(failed: Failed) -> FuriosaLLMError:
    """The error that a daemon reports, of the class that it has there."""
    if failed.error_code == CannotResumeError.code:
        return CannotResumeError(failed.message)
    error = from_wire(failed.error_code, failed.message)
    if isinstance(error, InvalidRequestError):
        error.param = failed.param
    elif isinstance(error, OverloadedError | ServiceUnavailableError):
        error.retry_after = failed.retry_after
    return error
