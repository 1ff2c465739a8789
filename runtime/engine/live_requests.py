"""The requests that were taken and have not ended: by id, bounded in number. Any thread may ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from furiosa_llm.engine.pace import Pace
from furiosa_llm.engine.request import Request
from furiosa_llm.errors import (
    DuplicateRequestError,
    FuriosaLLMError,
    OverloadedError,
    from_wire,
    to_wire,
)


class LiveRequests:
    """Takes requests until `end`.

    Args:
        max_sequences: of all of them together.
    """

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._lock = threading.Lock()  # guards what follows
        self._requests: dict[str, Request] = {}
        self._num_sequences = 0
        self._pace = Pace()
        self._ended_by: FuriosaLLMError | None = None
        self._when_ended: list[Callable[[], None]] = []

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_sequences(self) -> int:
        """Their choices, ended ones included."""
        return self._num_sequences

    @property
    def sequences_per_s(self) -> float:
        """How many have ended per second of late."""
        return self._pace.per_s(time.monotonic())

    @property
    def ended_by(self) -> FuriosaLLMError | None:
        """Why no request is taken any more."""
        with self._lock:
            return self._ended_by

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Raises: DuplicateRequestError, OverloadedError, and what `end` was told."""
        num_sequences = len(request.sequence_params)
        request.submitted_s = time.monotonic()
        with self._lock:
            self._refuse_if_ended()
            if request.request_id in self._requests:
                raise DuplicateRequestError(
                    f"request_id {request.request_id!r} already exist in the engine: use another, "
                    f"or wait for that request to end",
                    param="request_id",
                )
            num_over = self._num_sequences + num_sequences - self.max_sequences
            if num_over > 0:
                retry_after_s = self._pace.retry_after_s(num_over, time.monotonic())
                raise OverloadedError(
                    f"{self._num_sequences} sequences are running or waiting and the limit is "
                    f"{self.max_sequences}: try again in {retry_after_s:.0f} s",
                    retry_after=retry_after_s,
                )
            self._requests[request.request_id] = request
            self._num_sequences += num_sequences

    def forget(self, request: Request) -> None:
        """It has ended, and its id is free; idempotent."""
        with self._lock:
            if self._requests.get(request.request_id) is request:
                del self._requests[request.request_id]
                num_sequences = len(request.sequence_params)
                self._num_sequences -= num_sequences
                self._pace.ended(num_sequences, time.monotonic())

    def end(self, error: FuriosaLLMError) -> list[Request]:
        """Take no more, because of the first such error. Returns: those that there are."""
        with self._lock:
            if self._ended_by is None:
                self._ended_by = error
            callbacks, self._when_ended = self._when_ended, []
            left = list(self._requests.values())
        for callback in callbacks:
            callback()
        return left

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have it called, by whichever thread, when no request is taken any more; now if so."""
        with self._lock:
            if self._ended_by is None:
                self._when_ended.append(callback)
                return
        callback()

    def refuse_if_ended(self) -> None:
        """Raises: what `end` was told."""
        with self._lock:
            self._refuse_if_ended()

    def _refuse_if_ended(self) -> None:
        if self._ended_by is not None:  # a new error each time: raising one adds to its traceback
            raise from_wire(*to_wire(self._ended_by))
