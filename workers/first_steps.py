"""Which sequences a step has run for the first time, until their front-end is told.

That ends their wait: a front-end knows when a request came, and how long ago its first step began.
A sequence that is preempted later does not begin again.
"""

from __future__ import annotations

from collections.abc import Iterable

from furiosa_llm.scheduler.step_plan import StepRow
from furiosa_llm.wire.codec import MAX_ROWS
from furiosa_llm.wire.messages import front_end_of


class FirstSteps:
    """Costs nothing in a step in which no sequence is new."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._begun: dict[int, dict[int, float]] = {}  # by front-end: sequence -> its first step

    def added(self, sequence_id: int) -> None:
        """It waits for its first step."""
        self._new.add(sequence_id)

    def dropped(self, sequence_id: int) -> None:
        """Nobody asks for it any more; unknown ids are no error."""
        self._new.discard(sequence_id)
        self._begun.get(front_end_of(sequence_id), {}).pop(sequence_id, None)

    def ran(self, rows: Iterable[StepRow], began_s: float) -> None:
        """A step that began then had these rows."""
        if not self._new:
            return
        for row in rows:
            if row.sequence_id in self._new:
                self._new.remove(row.sequence_id)
                begun = self._begun.setdefault(front_end_of(row.sequence_id), {})
                begun[row.sequence_id] = began_s

    def take(self, front_end: int, now_s: float) -> tuple[tuple[int, float], ...]:
        """(sequence, seconds since its first step began) of those that were not taken before."""
        begun = self._begun.pop(front_end, None)
        if begun is None:
            return ()
        ages = [(sequence_id, now_s - began_s) for sequence_id, began_s in begun.items()]
        return tuple(ages[:MAX_ROWS])  # what fits a message; more than any step's rows
