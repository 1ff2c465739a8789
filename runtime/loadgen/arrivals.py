"""When the requests of an open loop are due."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

PROCESSES = ("poisson", "constant")


def due_times(rate: float, *, process: str, seed: int) -> Iterator[float]:
    """Seconds since the start at which each request is due, without end.

    Args:
        rate: requests per second, above 0.
        process: "poisson" for independent callers, whose gaps are exponential; "constant" for one
            every 1 / rate seconds. The first request is due at once either way.
        seed: the same seed gives the same times.
    """
    assert rate > 0, rate
    assert process in PROCESSES, process
    if process == "constant":
        yield from (index / rate for index in itertools.count())
    choose = random.Random(seed)
    due_s = 0.0
    while True:
        yield due_s
        due_s += choose.expovariate(rate)
