"""One worker after the other is replaced, the next when the one before is up again. Pure."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from furiosa_llm.errors import FuriosaLLMError, WorkerStartError


class RollingRestart:
    """Which worker is to be restarted next; the caller waits for `done`, and looks at `error`."""

    def __init__(self, worker_ids: Iterable[int]) -> None:
        self.done = threading.Event()
        self.error: FuriosaLLMError | None = None
        self._left = deque(worker_ids)
        self._current: int | None = None

    def begin(self) -> int | None:
        """The worker to restart first; None: there is none."""
        return self._next()

    def worker_up(self, worker_id: int) -> int | None:
        """A worker takes sequences; returns the one to restart now, if any."""
        return self._next() if worker_id == self._current else None

    def worker_lost(self, worker_id: int, reason: str) -> None:
        """A worker will not come up again. The others are left as they are."""
        if worker_id == self._current:
            self.fail(
                WorkerStartError(
                    f"worker {worker_id} did not come up again ({reason}); the workers after it "
                    f"were not restarted"
                )
            )

    def fail(self, error: FuriosaLLMError) -> None:
        """End it before its time."""
        if not self.done.is_set():
            self.error = error
            self.done.set()

    def _next(self) -> int | None:
        self._current = self._left.popleft() if self._left else None
        if self._current is None:
            self.done.set()
        return self._current
