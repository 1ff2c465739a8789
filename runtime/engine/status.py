"""What an engine and its workers are doing: values to look at, made in no time by any thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker. Counters run since the engine was made and go on when its process is replaced.

    What its scheduler holds is as of its last message, which each of its steps sends.
    """

    worker_id: int
    devices: str
    """The PEs it runs on, as a device list: "npu:0:0-3"."""
    pid: int | None
    """None while it has no process."""
    epoch: int
    """How many processes it has had."""
    is_up: bool
    """Whether it takes sequences."""
    phase: str
    """"loading", "ready", "restarting" (its restart was asked for), "down" (to be started again)
    or "lost" (given up)."""
    num_dispatched: int
    """Sequences that this front-end has sent to it and that have not ended."""
    num_running: int
    """Sequences that hold KV blocks."""
    num_waiting: int
    """Sequences that it holds and that have no KV blocks yet."""
    num_free_blocks: int
    num_blocks: int
    restarts: tuple[tuple[str, int], ...]
    """(why, how often). It left by itself: "crash" or "exit"; from outside: "signal"; we ended it:
    "stuck", "protocol" (it broke it) or "reload" (a restart that was asked for)."""
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int
    """Through the model: of prompts and answers, recomputed ones once more."""
    num_output_tokens: int
    last_message_s: float | None
    """Seconds since it last said anything; None if it has not. An idle worker is silent."""

    @property
    def num_restarts(self) -> int:
        return sum(count for _, count in self.restarts)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """An engine as its front-end sees it."""

    workers: tuple[WorkerStatus, ...]
    block_size: int
    """Tokens of a KV block."""
    num_requests: int
    """Requests that have not ended."""
    num_sequences: int
    """Their choices, ended ones of unended requests included."""
    num_waiting: int
    """Sequences that no worker has room for, or that wait for a worker to come up."""
    max_sequences: int
    """More than these (`num_sequences`) are refused with OverloadedError."""
    ended_by: str | None
    """Why no request is taken any more; None while requests are taken."""
    sequences_per_s: float = 0.0
    """How many have ended per second of late."""

    @property
    def num_workers_up(self) -> int:
        return sum(worker.is_up for worker in self.workers)
