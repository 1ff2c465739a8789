"""What a server says of itself at one moment, reduced to what is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from furiosa_llm.top.metrics_text import Metrics


@dataclass(frozen=True, slots=True)
class WorkerReading:
    """One worker; zeros and blanks where it does not say (while it starts)."""

    worker_id: int
    devices: str
    phase: str
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_restarts: int
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A server at the moment `at_s`, of a monotonic clock."""

    at_s: float
    where: str
    state: str
    phase: str
    failure: str | None
    model: str
    weights: str
    isa: str
    uptime_s: float
    num_in_flight: int
    num_waiting: int  # in the front-end: no worker has room for them
    workers: tuple[WorkerReading, ...]
    metrics: Metrics | None = None  # None where they cannot be read


def reading_of(
    status: Mapping[str, Any], *, at_s: float, where: str, metrics: Metrics | None = None
) -> Reading:
    """From the object of `/v1/status`, or of the daemon's control socket.

    A server of another version may say less or more: what is missing shows as nothing.
    """
    engine = status.get("engine") or {}
    workers = engine.get("workers", status.get("workers")) or []
    return Reading(
        at_s=at_s,
        where=where,
        state=str(status.get("state", "")),
        phase=str(status.get("phase", "")),
        failure=status.get("failure"),
        model=str(status.get("model", "")),
        weights=str(status.get("weights") or ""),
        isa=str(status.get("isa") or ""),
        uptime_s=_number(status, "uptime_s"),
        num_in_flight=_count(status, "num_in_flight"),
        num_waiting=_count(engine, "num_waiting"),
        workers=tuple(_worker(each, i) for i, each in enumerate(workers)),
        metrics=metrics,
    )


def _worker(said: Mapping[str, Any], index: int) -> WorkerReading:
    num_blocks = _count(said, "num_blocks")
    return WorkerReading(
        worker_id=_count(said, "worker_id", index),
        devices=str(said.get("devices", "")),
        phase=str(said.get("phase", "")),
        num_running=_count(said, "num_running"),
        num_waiting=_count(said, "num_waiting"),
        num_used_blocks=num_blocks - _count(said, "num_free_blocks", num_blocks),
        num_blocks=num_blocks,
        num_restarts=sum(int(count) for _, count in said.get("restarts", ())),
        num_preemptions=_count(said, "num_preemptions"),
        num_steps=_count(said, "num_steps"),
        num_computed_tokens=_count(said, "num_computed_tokens"),
        num_output_tokens=_count(said, "num_output_tokens"),
    )


def _count(said: Mapping[str, Any], name: str, default: int = 0) -> int:
    value = said.get(name)
    return value if isinstance(value, int) else default


def _number(said: Mapping[str, Any], name: str) -> float:
    value = said.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
