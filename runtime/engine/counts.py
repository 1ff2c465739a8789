"""What an engine counts for whoever watches it. Its thread writes; any thread may look."""

from __future__ import annotations

from furiosa_llm.histogram import Histogram

STEP_BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
QUEUE_BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0,
    100.0, 200.0, 500.0, 1000.0,
)  # fmt: skip


class EngineCounts:
    """Since the engine was made.

    Attributes:
        step_s: by worker, how long each of its steps took.
        queue_s: how long sequences waited, from their request's arrival until their first step
            began; a sequence that goes on in another worker does not count again.
        num_migrated: requests that went on in another worker, or in the successor of theirs, by
            why: it has died, or was replaced by a reload.
    """

    def __init__(self, num_workers: int) -> None:
        self.step_s = [Histogram(STEP_BOUNDS_S) for _ in range(num_workers)]
        self.queue_s = Histogram(QUEUE_BOUNDS_S)
        self.num_migrated = {"death": 0, "reload": 0}
