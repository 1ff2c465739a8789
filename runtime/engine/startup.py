"""How far the start of an engine is: written by the thread that starts it, read by any other."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from furiosa_llm.progress import Progress


@dataclass(frozen=True, slots=True)
class WorkerStartup:
    """One worker's start."""

    worker_id: int
    devices: str
    phase: str
    """"waiting", "loading" or "ready"; "failed" if its process has ended."""


@dataclass(frozen=True, slots=True)
class StartupStatus:
    """One moment of a start."""

    phase: str
    """"finding model", "fetching ..." or "packing" (building the artifact), "loading tokenizer",
    "starting workers", "ready", "failed"."""
    done: int
    total: int
    """How much of the phase is done, of how much; both 0 where that cannot be said."""
    workers: tuple[WorkerStartup, ...]
    """Empty until it is known which there will be."""


class StartupProgress:
    """Hand one to `from_engine_args`, in a thread, and ask for its `status` from another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._done, self._total = "finding model", 0, 0
        self._workers: dict[int, WorkerStartup] = {}

    @property
    def status(self) -> StartupStatus:
        """How far it is now."""
        with self._lock:
            workers = tuple(self._workers.values())
            return StartupStatus(self._phase, self._done, self._total, workers)

    def enter(self, phase: str, done: int = 0, total: int = 0) -> None:
        """The start is in this phase now."""
        with self._lock:
            self._phase, self._done, self._total = phase, done, total

    def worker(self, worker_id: int, devices: str, phase: str) -> None:
        """That is how far this worker is."""
        with self._lock:
            self._workers[worker_id] = WorkerStartup(worker_id, devices, phase)

    def beside(self, progress: Progress) -> Progress:
        """A callback that tells both this and `progress`."""

        def tell(stage: str, done: int, total: int) -> None:
            self.enter(stage, done, total)
            progress(stage, done, total)

        return tell
