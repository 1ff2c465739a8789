"""When a dead worker is started again, and when it is given up. Pure: time in, effects out.

The first crash restarts at once, the following ones after a growing delay; more than `max_crashes`
within `window_s` and the worker is given up, so that a fault that repeats does not burn the machine
(restart intensity, as in Erlang's supervisors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_CRASHES_PER_REQUEST = 2
"""A request that was running in this many crashes is taken for their cause and is failed."""


@dataclass(frozen=True, slots=True)
class Start:
    """Effect: start the worker's process under this epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Effect: the worker stays down."""

    reason: str


class RestartPolicy:
    """The life of one worker's processes, told apart by epochs."""

    def __init__(
        self, *, first_delay_s: float = 0.25, max_crashes: int = 5, window_s: float = 30.0
    ) -> None:
        assert first_delay_s > 0
        assert max_crashes > 0
        assert window_s > 0
        self._first_delay_s = first_delay_s
        self._max_crashes = max_crashes
        self._window_s = window_s
        self._crashes_s: list[float] = []  # those inside the window
        self._epoch = 1
        self._due_s = math.inf
        self._is_given_up = False

    @property
    def epoch(self) -> int:
        """That of the process that runs, or ran last."""
        return self._epoch

    @property
    def is_given_up(self) -> bool:
        """Whether no further process will be started."""
        return self._is_given_up

    @property
    def due_s(self) -> float:
        """When `tick` has something to do next; infinity: not before the next crash."""
        return self._due_s

    def exited(self, now_s: float) -> list[Start | GiveUp]:
        """The process of the current epoch has ended without being asked to."""
        self._crashes_s = [t for t in self._crashes_s if t > now_s - self._window_s] + [now_s]
        num_crashes = len(self._crashes_s)
        if num_crashes > self._max_crashes:
            self._due_s = math.inf
            self._is_given_up = True
            return [GiveUp(f"{num_crashes} crashes within {self._window_s:g} s")]
        delay_s = 0.0 if num_crashes == 1 else self._first_delay_s * 2 ** (num_crashes - 2)
        self._due_s = now_s + delay_s
        return self.tick(now_s)

    def restart(self) -> list[Start | GiveUp]:
        """The process has ended because it was asked to: no crash, so the next starts at once."""
        self._epoch += 1
        return [Start(self._epoch)]

    def tick(self, now_s: float) -> list[Start | GiveUp]:
        """Time has passed."""
        if now_s < self._due_s:
            return []
        self._due_s = math.inf
        self._epoch += 1
        return [Start(self._epoch)]
