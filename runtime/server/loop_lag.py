"""How late the event loop runs what is due: whatever blocks it delays every stream."""

from __future__ import annotations

import asyncio

from furiosa_llm.histogram import Histogram

INTERVAL_S = 0.1
NUM_QUIET_TICKS = 10
"""Without activity for so many ticks it stops: an idle server is never woken up."""

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class LoopLag:
    """Measures one event loop while there is activity, which `note` tells of."""

    def __init__(self) -> None:
        self.seconds = Histogram(BOUNDS_S)
        self._quiet_ticks = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._timer is not None

    def note(self) -> None:
        """There is activity. Call it on the loop; it costs next to nothing."""
        self._quiet_ticks = 0
        if self._timer is None:
            self._schedule(asyncio.get_running_loop())

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        due_s = loop.time() + INTERVAL_S
        self._timer = loop.call_at(due_s, self._tick, loop, due_s)

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self.seconds.add(max(0.0, loop.time() - due_s))
        self._quiet_ticks += 1
        if self._quiet_ticks < NUM_QUIET_TICKS:
            self._schedule(loop)
        else:
            self._timer = None
