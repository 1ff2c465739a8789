"""Python's garbage collector in a process that serves: few and short pauses.

A front-end holds some 50,000 containers that its imports made and that stay for good. Each full
collection looks at all of them, which holds up every stream for 30 ms and more, and comes about
once a second when hundreds of streams run. Nearly all else goes by its reference count, and what
hangs in a cycle (an error and its traceback) may wait.
"""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 20, 50)
"""Instead of (700, 10, 10): a young collection of so many objects takes about 1 ms."""


def collect_rarely() -> None:
    """To be called before the imports, which would be looked through again and again."""
    gc.set_threshold(*THRESHOLDS)


def settle() -> None:
    """What is there now stays: no later collection looks at it. To be called when start-up is over.

    It collects nothing first: that would add to the start, and imports leave little garbage.
    """
    collect_rarely()
    gc.freeze()
