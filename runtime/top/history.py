"""The last minute of readings: rates between two of them, and latencies over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise

from furiosa_llm.top.metrics_text import Buckets
from furiosa_llm.top.reading import Reading, WorkerReading

WINDOW_S = 60.0


class History:
    """Readings of one server, oldest first. Pure: time is in the readings."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        self._readings.append(reading)
        while self._readings[0].at_s < reading.at_s - WINDOW_S:
            self._readings.popleft()

    @property
    def last(self) -> Reading:
        return self._readings[-1]

    @property
    def span_s(self) -> float:
        """The time that `latency` covers; 0 for the server's whole life."""
        return self.last.at_s - self._readings[0].at_s

    def rate(self, count_of: Callable[[Reading], int]) -> float | None:
        """How fast a counter has grown since the reading before; None with only one reading."""
        if len(self._readings) < 2:
            return None
        return _rate(self._readings[-2], self._readings[-1], count_of)

    def rates(self, count_of: Callable[[Reading], int]) -> list[float]:
        """The same between all neighbours of the window, oldest first."""
        readings = list(self._readings)
        return [_rate(a, b, count_of) for a, b in pairwise(readings)]

    def worker_rate(self, worker_id: int, count_of: Callable[[WorkerReading], int]) -> float | None:
        """As `rate`, of one worker."""

        def count(reading: Reading) -> int:
            return sum(count_of(w) for w in reading.workers if w.worker_id == worker_id)

        return self.rate(count)

    def latency(self, name: str) -> Buckets | None:
        """The histogram of what came within the window; None if there are no metrics."""
        if self.last.metrics is None or name not in self.last.metrics:
            return None
        first = self._readings[0].metrics
        earlier = first.get(name) if first is not None and len(self._readings) > 1 else None
        return self.last.metrics[name].since(earlier)


def _rate(before: Reading, after: Reading, count_of: Callable[[Reading], int]) -> float:
    elapsed_s = after.at_s - before.at_s
    # A server that was restarted in between counts from 0 again.
    return max(0, count_of(after) - count_of(before)) / elapsed_s if elapsed_s > 0 else 0.0
