"""Sending a load, closed or open, and gathering the records of its requests."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from furiosa_llm.loadgen.record import Record, clock
from furiosa_llm.loadgen.target import Prompt, Target


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is sent: what comes first ends the run. At least one of them is set."""

    num_requests: int | None = None
    duration_s: float | None = None  # no request is due later; those under way are waited for


@dataclass(slots=True)
class Run:
    """A load on a target. `records` may be read at any time, and after a cancellation too."""

    records: list[Record] = field(default_factory=list)  # in the order of their due times
    begin_s: float = 0.0
    client_cpu_s: float = 0.0  # processor time that the load generator itself took

    async def closed(
        self, target: Target, prompts: Iterator[Prompt], extent: Extent, *, concurrency: int
    ) -> None:
        """`concurrency` callers, each of which sends its next request when it has its answer."""
        with _CpuTime(self):
            left = iter(range(extent.num_requests)) if extent.num_requests else itertools.count()
            end_s = self.begin_s + (extent.duration_s or math.inf)

            async def caller() -> None:
                while (now_s := clock()) < end_s and next(left, None) is not None:
                    await self._send(target, next(prompts), due_s=now_s)

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(caller())

    async def open(
        self,
        target: Target,
        prompts: Iterator[Prompt],
        extent: Extent,
        due_times: Iterator[float],
    ) -> None:
        """Each request is sent when it is due, however many are still under way."""
        with _CpuTime(self):
            async with asyncio.TaskGroup() as group:
                for due_s in itertools.islice(due_times, extent.num_requests):
                    if extent.duration_s is not None and due_s >= extent.duration_s:
                        break
                    due_s += self.begin_s
                    if (wait_s := due_s - clock()) > 0:
                        await asyncio.sleep(wait_s)
                    group.create_task(self._send(target, next(prompts), due_s=due_s))

    async def _send(self, target: Target, prompt: Prompt, *, due_s: float) -> None:
        record = Record(due_s)
        self.records.append(record)
        await target.send(prompt, record)


class _CpuTime:
    """Notes when the run begins and what processor time it takes."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._begin_s = time.process_time()
        self._run.begin_s = clock()

    def __exit__(self, *_: object) -> None:
        self._run.client_cpu_s = time.process_time() - self._begin_s
