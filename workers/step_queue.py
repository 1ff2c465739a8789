"""Steps between being planned and being committed: executed in order, one at a time.

Two ways with one surface. `InlineSteps` runs a step where it is submitted: with one step in flight
there is nothing to overlap, and a thread would only add switches. `ThreadedSteps` runs steps on a
thread of its own, so that the loop plans the next one and talks to the front-end meanwhile; native
calls release the GIL.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue

from furiosa_llm.scheduler.step_plan import StepPlan
from furiosa_llm.workers.batch import BatchBuilder, RecentSamples, UnresolvedBatch
from furiosa_llm.workers.executor import Executor, StepResult


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """An executed step, ready to be committed."""

    plan: StepPlan
    result: StepResult
    began_s: float  # on the monotonic clock
    seconds: float  # that the executor took


class InlineSteps:
    """At most one step in flight, and it is executed by `submit` itself."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._builder = BatchBuilder()
        self._recent = RecentSamples(num_steps=1)
        self._finished: deque[FinishedStep] = deque()

    @property
    def wakeup_fd(self) -> int | None:
        """None: a submitted step is finished at once, there is nothing to wait for."""
        return None

    def submit(self, plan: StepPlan) -> None:
        """Run the step. Raises: whatever the executor raises."""
        assert not self._finished, "the step before has not been taken"
        batch = self._builder.build(plan)
        self._finished.append(_execute(self._executor, plan, batch, self._recent))

    def take_finished(self) -> FinishedStep | None:
        """The oldest step that is executed and not yet taken; None if there is none."""
        return self._finished.popleft() if self._finished else None


class ThreadedSteps:
    """Up to `limit` steps in flight, executed in order on a daemon thread.

    Args:
        limit: the most steps that are submitted and not yet taken; the scheduler keeps to it.
    """

    def __init__(self, executor: Executor, *, limit: int) -> None:
        self._executor = executor
        self._limit = limit
        self._builder = BatchBuilder()
        self._recent = RecentSamples(num_steps=limit)
        self._num_in_flight = 0
        self._submitted: SimpleQueue[tuple[StepPlan, UnresolvedBatch]] = SimpleQueue()
        self._finished: deque[FinishedStep | BaseException] = deque()
        self._event_fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        threading.Thread(target=self._run, name="executor", daemon=True).start()

    @property
    def wakeup_fd(self) -> int | None:
        """Readable while a finished step waits to be taken."""
        return self._event_fd

    def submit(self, plan: StepPlan) -> None:
        """Queue the step behind those in flight."""
        assert self._num_in_flight < self._limit, "more steps in flight than the scheduler may plan"
        self._num_in_flight += 1
        self._submitted.put((plan, self._builder.build(plan)))

    def take_finished(self) -> FinishedStep | None:
        """The oldest step that is executed and not yet taken; None if there is none.

        Raises: what the executor raised; the steps behind that one never run.
        """
        try:
            os.eventfd_read(self._event_fd)  # one down: the descriptor is a semaphore
        except BlockingIOError:
            return None
        finished = self._finished.popleft()
        self._num_in_flight -= 1
        if isinstance(finished, BaseException):
            raise finished
        return finished

    def _run(self) -> None:
        while True:
            plan, unresolved = self._submitted.get()
            try:
                finished = _execute(self._executor, plan, unresolved, self._recent)
            except BaseException as error:
                self._finish(error)
                return
            self._finish(finished)

    def _finish(self, finished: FinishedStep | BaseException) -> None:
        self._finished.append(finished)
        os.eventfd_write(self._event_fd, 1)  # after the append: who reads it finds the step


def _execute(
    executor: Executor, plan: StepPlan, unresolved: UnresolvedBatch, recent: RecentSamples
) -> FinishedStep:
    began_s = time.monotonic()
    result = executor.execute(unresolved.resolve(recent))
    seconds = time.monotonic() - began_s
    recent.remember(unresolved.sampling_ids, result.token_ids)
    return FinishedStep(plan, result, began_s, seconds)
