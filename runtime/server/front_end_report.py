"""What a daemon's other front-ends say of themselves, and what stays of those that have ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.server.front_end_counts import NO_COUNTS, FrontEndCounts


@dataclass(frozen=True, slots=True)
class FrontEndReport:
    """One of them now. One that does not answer has the counts that it last told, and no engine.

    Attributes:
        index, num_restarts: the daemon notes them.
    """

    pid: int | None
    num_connections: int
    counts: FrontEndCounts
    engine: EngineStatus | None
    index: int = 0
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class FrontEndReports:
    """All of them.

    Attributes:
        counts: of them together, and of their predecessors that have ended.
    """

    now: tuple[FrontEndReport, ...] = ()
    counts: FrontEndCounts = NO_COUNTS


class CountsLedger:
    """Keeps a daemon's counts from falling when one of its processes ends.

    What a process counted after it was last asked is lost with it, but nobody has seen that. A
    sum that fell would be worse: to Prometheus it is a restart, and all of it counts anew.
    """

    def __init__(self) -> None:
        self._past = NO_COUNTS
        self._last: dict[int, tuple[int, FrontEndCounts]] = {}  # by index: (pid, what it said)

    def note(self, index: int, pid: int, counts: FrontEndCounts) -> None:
        """The process `pid`, which is front-end `index` now, says so."""
        last_pid, last = self._last.get(index, (pid, NO_COUNTS))
        if last_pid != pid:
            self._past += last.ended()
        self._last[index] = (pid, counts)

    def last(self, index: int) -> FrontEndCounts:
        """What front-end `index` said last, as far as that outlives its process."""
        return self._last.get(index, (0, NO_COUNTS))[1].ended()

    def total(self, now: Iterable[FrontEndCounts]) -> FrontEndCounts:
        """Those of today's front-ends together with the past."""
        return sum(now, self._past)
