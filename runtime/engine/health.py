"""Health checks that are under way: which workers still have to answer each of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable


class HealthCheck:
    """One caller's question. It waits for `done`; `problem` says what is wrong, if anything is."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.problem = ""


class Health:
    """The checks under way. For the engine's thread alone."""

    def __init__(self) -> None:
        self._nonces = itertools.count(1)
        self._waiting: dict[int, tuple[HealthCheck, set[int]]] = {}

    def begin(self, check: HealthCheck, up: Iterable[int]) -> int:
        """Every worker of `up` is to be pinged with the number that is returned."""
        nonce, waiting = next(self._nonces), set(up)
        self._waiting[nonce] = (check, waiting)
        if not waiting:
            self._end(nonce, "no worker is up")
        return nonce

    def pong(self, nonce: int, worker_id: int) -> None:
        """The worker has answered."""
        if nonce in self._waiting:
            waiting = self._waiting[nonce][1]
            waiting.discard(worker_id)
            if not waiting:
                self._end(nonce, "")

    def worker_down(self, worker_id: int, num_up: int) -> None:
        """The worker will not answer any more; `num_up` are left, and only they have to."""
        for nonce, (_, waiting) in list(self._waiting.items()):
            waiting.discard(worker_id)
            if not waiting or not num_up:
                self._end(nonce, "" if num_up else "no worker is up")

    def fail(self, problem: str) -> None:
        """End all checks."""
        for nonce in list(self._waiting):
            self._end(nonce, problem)

    def _end(self, nonce: int, problem: str) -> None:
        check, _ = self._waiting.pop(nonce)
        check.problem = problem
        check.done.set()
