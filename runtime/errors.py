"""Every error a caller can meet, in one tree.

A message says what was wrong, with the value; what is allowed; and what to do. An error crosses
processes as its class's `code` and its message, never as a pickle: `to_wire` and `from_wire` are
the only way over.
"""

from __future__ import annotations

from typing import ClassVar


class FuriosaLLMError(Exception):
    """Root of the tree. Catch it to catch whatever this library raises on purpose."""

    code: ClassVar[str] = "internal_error"


class InvalidRequestError(FuriosaLLMError, ValueError):
    """The caller's request or argument is wrong. HTTP 400; a retry cannot help.

    Attributes:
        param: the field at fault, or None when no single field is.
    """

    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt plus `max_tokens` exceeds the context window. HTTP 400; a retry cannot help."""

    code: ClassVar[str] = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = "max_tokens") -> None:
        super().__init__(message, param=param)

    @classmethod
    def of(
        cls, *, num_prompt_tokens: int, max_tokens: int, max_model_len: int
    ) -> ContextLengthError:
        """The error for a request of these lengths, both counts spelled out."""
        if num_prompt_tokens >= max_model_len:
            return cls(
                f"the prompt has {num_prompt_tokens} tokens but the maximum context length is "
                f"{max_model_len} tokens and at least one must be left for the answer: shorten the "
                f"prompt by {num_prompt_tokens - max_model_len + 1} tokens or more",
                param="prompt",
            )
        over = num_prompt_tokens + max_tokens - max_model_len
        return cls(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, "
            f"{num_prompt_tokens + max_tokens} in all, but the maximum context length is "
            f"{max_model_len} tokens: shorten the prompt or lower max_tokens by {over}"
        )


class DuplicateRequestError(InvalidRequestError):
    """A live request already has this id."""

    code: ClassVar[str] = "duplicate_request"


class DeviceError(InvalidRequestError):
    """A device string is malformed, out of range, or cannot be divided as asked."""

    code: ClassVar[str] = "invalid_device"


class ArtifactError(FuriosaLLMError, ValueError):
    """A model file is damaged, hostile, of an unknown kind, or does not fit this machine."""

    code: ClassVar[str] = "invalid_artifact"


class OverloadedError(FuriosaLLMError):
    """The bounded queue is full. HTTP 429.

    Attributes:
        retry_after: seconds after which another try makes sense.
    """

    code: ClassVar[str] = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServiceUnavailableError(FuriosaLLMError):
    """The server is starting, draining, or has failed. HTTP 503.

    Attributes:
        retry_after: seconds after which another try makes sense.
    """

    code: ClassVar[str] = "service_unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerDiedError(FuriosaLLMError):
    """A worker process ended and its work could not be moved to another one. HTTP 503: it may run
    elsewhere, or here when there are workers again.
    """

    code: ClassVar[str] = "worker_died"


class QuarantinedError(WorkerDiedError):
    """The request was running in so many workers that died that it is not tried again. HTTP 500:
    no other server should try it either.
    """

    code: ClassVar[str] = "quarantined"


class WorkerStartError(FuriosaLLMError):
    """A worker process did not become ready; the message carries its root cause."""

    code: ClassVar[str] = "worker_start_failed"


class RequestAbortedError(FuriosaLLMError):
    """The request was aborted by its id while somebody was still reading it."""

    code: ClassVar[str] = "request_aborted"


class EngineShutDownError(FuriosaLLMError):
    """The engine was shut down, or is shutting down, and takes no more requests."""

    code: ClassVar[str] = "engine_shut_down"


_CLASS_OF: dict[str, type[FuriosaLLMError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError, ContextLengthError, DuplicateRequestError, DeviceError, ArtifactError,
        OverloadedError, WorkerDiedError, QuarantinedError, WorkerStartError, RequestAbortedError,
        EngineShutDownError, ServiceUnavailableError,
    )
}  # fmt: skip


def to_wire(error: BaseException) -> tuple[str, str]:
    """The (code, message) that stands for `error` in a message to another process."""
    code = error.code if isinstance(error, FuriosaLLMError) else FuriosaLLMError.code
    text = str(error) or type(error).__name__
    return code, text if isinstance(error, FuriosaLLMError) else f"{type(error).__name__}: {text}"


def from_wire(code: str, message: str) -> FuriosaLLMError:
    """The error that `to_wire` described; an unknown code gives a plain FuriosaLLMError."""
    return _CLASS_OF.get(code, FuriosaLLMError)(message)
