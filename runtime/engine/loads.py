"""What each worker said last of its load, and what its processes before had done."""

from __future__ import annotations

from dataclasses import replace

from furiosa_llm.wire.messages import WorkerLoad

_NOTHING = WorkerLoad(
    num_running=0,
    num_waiting=0,
    num_free_blocks=0,
    num_preemptions=0,
    num_steps=0,
    num_computed_tokens=0,
    num_output_tokens=0,
)


class LoadLedger:
    """Loads by worker. One thread writes, any may read: every value in it is immutable."""

    def __init__(self) -> None:
        self._now: dict[int, WorkerLoad] = {}
        self._before: dict[int, WorkerLoad] = {}  # the counters of all processes that have ended

    def up(self, worker_id: int, num_blocks: int) -> None:
        """A new process has this many blocks, all free."""
        self._now[worker_id] = replace(_NOTHING, num_free_blocks=num_blocks)

    def note(self, worker_id: int, load: WorkerLoad) -> None:
        """The worker says so."""
        self._now[worker_id] = load

    def down(self, worker_id: int) -> None:
        """Its process has ended."""
        total = self.total(worker_id)
        self._before[worker_id] = replace(total, num_running=0, num_waiting=0, num_free_blocks=0)
        self._now.pop(worker_id, None)

    def total(self, worker_id: int) -> WorkerLoad:
        """What it holds now, and what all its processes have done together."""
        now, before = self._now.get(worker_id), self._before.get(worker_id, _NOTHING)
        if now is None:
            return before
        return WorkerLoad(
            num_running=now.num_running,
            num_waiting=now.num_waiting,
            num_free_blocks=now.num_free_blocks,
            num_preemptions=before.num_preemptions + now.num_preemptions,
            num_steps=before.num_steps + now.num_steps,
            num_computed_tokens=before.num_computed_tokens + now.num_computed_tokens,
            num_output_tokens=before.num_output_tokens + now.num_output_tokens,
        )
