"""How late what a step makes reaches its readers: beside the first of the same step.

A server paced to a step every so often hands out a step's pieces one after the other. The time of a
piece less that of the step's first one is what the front-end adds for being busy with the others.
Beside a timetable every stall of the machine would count for all that come after it; and within a
stream, a token that ends within a character has no text yet, and its piece comes with the next
step's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from furiosa_llm.loadgen.summary import percentile

QUIET_S = 0.005
"""Between two steps' pieces at least, and more than between those of one: steps are 10 ms and
more."""


def lateness(times_s: Iterable[float]) -> list[float]:
    """Of each piece, in seconds, ascending; `times_s` are those of all streams' pieces."""
    late, first_s = [], -math.inf
    for before_s, at_s in pairwise([-math.inf, *sorted(times_s)]):
        if at_s - before_s > QUIET_S:
            first_s = at_s
        late.append(at_s - first_s)
    return sorted(late)


def shares_of(late_s: list[float]) -> dict[str, float]:
    """Percentiles of `lateness`."""
    return {"p50": percentile(late_s, 0.5), "p99": percentile(late_s, 0.99), "max": late_s[-1]}
