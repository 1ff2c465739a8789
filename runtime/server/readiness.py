"""Would a request get tokens now? Asked of the workers' step loops, not of the process.

A check passes when every worker that is up answers a ping between two of its steps, and each that
holds sequences has stepped since the last check that found it standing still. So a worker that
hangs, one that answers but no longer steps, and an engine without workers are all noticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.errors import FuriosaLLMError, ServiceUnavailableError
from furiosa_llm.server.service import Service, ServiceState

STALL_S = 2.0
"""A worker that has work and neither steps nor answers for so long counts as standing still."""

MAX_AGE_S = 1.0
"""Of a check's result: probes may come as often as they like."""


class Readiness:
    """One check is shared by all who ask while it runs, and good for MAX_AGE_S after it."""

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._check: asyncio.Task[str | None] | None = None
        self._ended_s = 0.0
        self._stillness = Stillness()

    async def reason_against(self) -> str | None:
        """None if the service would answer; else why it would not."""
        if self._service.state is not ServiceState.READY:
            return str(self._service.state.value)
        check = self._check
        if check is None or (check.done() and self._clock() > self._ended_s + MAX_AGE_S):
            check = self._check = asyncio.create_task(self._ask())
        return await asyncio.shield(check)

    async def _ask(self) -> str | None:
        try:
            engine: AsyncLLMEngine = self._service.engine
            await engine.check_health(STALL_S)
            return self._stillness.look(engine.status(), self._clock())
        except ServiceUnavailableError:
            return str(self._service.state.value)
        except FuriosaLLMError as error:
            return str(error)
        finally:
            self._ended_s = self._clock()


class Stillness:
    """Finds workers that hold sequences but make no step. Time comes in."""

    def __init__(self) -> None:
        # Of those that had work at the last look: (epoch, steps), and since when that is so.
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}

    def look(self, status: EngineStatus, now_s: float) -> str | None:
        """None while all that have work go on; else which does not."""
        for worker in status.workers:
            if not worker.is_up or worker.num_dispatched == 0:
                self._seen.pop(worker.worker_id, None)
                continue
            mark = (worker.epoch, worker.num_steps)
            known, since_s = self._seen.get(worker.worker_id, (mark, now_s))
            if known != mark:
                since_s = now_s
            self._seen[worker.worker_id] = (mark, since_s)
            if now_s - since_s >= STALL_S:
                return (
                    f"worker {worker.worker_id} holds {worker.num_dispatched} sequences and has "
                    f"made no step for {now_s - since_s:.1f} s"
                )
        return None
