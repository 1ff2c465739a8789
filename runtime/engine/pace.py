"""How fast sequences end, so that a caller who is refused can be told when to come again. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 15
"""Seconds over which the rate is averaged: long enough for several answers to end."""

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


class Pace:
    """Ends counted by the second. Time comes in."""

    def __init__(self) -> None:
        self._ends: deque[list[int]] = deque()  # [second, how many ended in it], ascending

    def ended(self, num_sequences: int, now_s: float) -> None:
        """So many sequences have ended just now."""
        second = int(now_s)
        if self._ends and self._ends[-1][0] == second:
            self._ends[-1][1] += num_sequences
        else:
            self._ends.append([second, num_sequences])
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        """Sequences that ended per second, over the window or since the first one in it."""
        self._forget(now_s)
        if not self._ends:
            return 0.0
        span_s = max(1.0, now_s - self._ends[0][0])
        return sum(count for _, count in self._ends) / span_s

    def retry_after_s(self, num_ahead: int, now_s: float) -> float:
        """When so many sequences more will have ended, if it goes on as it does."""
        per_s = self.per_s(now_s)
        wanted_s = num_ahead / per_s if per_s else MAX_RETRY_S / 12
        return min(MAX_RETRY_S, max(MIN_RETRY_S, wanted_s))

    def _forget(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] < now_s - WINDOW_S:
            self._ends.popleft()
