"""What the server and its workers are doing, in any state of the server."""

from __future__ import annotations

import time

import msgspec

from furiosa_llm import __version__
from furiosa_llm.engine.status import EngineStatus
from furiosa_llm.server.service import Service


class Progress(msgspec.Struct):
    """How much of a phase is done; of 0 where that is not known."""

    done: int
    total: int


class FrontEndStatus(msgspec.Struct):
    """A process beside the first one that serves HTTP on the same port."""

    index: int
    pid: int | None
    """Null while it is not running."""
    num_restarts: int
    num_in_flight: int
    num_connections: int


class ServerStatus(msgspec.Struct, kw_only=True):
    """What the server and its workers are doing."""

    state: str
    """starting, ready, draining or failed."""
    phase: str
    progress: Progress
    failure: str | None
    """Why it failed."""
    version: str
    created: int
    """When the server began, in Unix seconds."""
    uptime_s: float
    model: str
    served_model_names: list[str]
    num_in_flight: int
    """Requests being served, streams included."""
    artifact_id: str | None = None
    """This and what follows is null while there is no engine."""
    weights: str | None = None
    """fp32, bf16, int8 or int4."""
    isa: str | None = None
    """The kernel family: the same artifact gives the same tokens within one."""
    max_model_len: int | None = None
    """Tokens that prompt and answer may have together."""
    engine: EngineStatus | None = None
    """Workers, queues and blocks."""
    front_ends: list[FrontEndStatus] = []
    """With --api-servers: all but the first. What is counted above is that of all together."""


def status_of(service: Service) -> ServerStatus:
    """What this process and its workers are doing now."""
    status = ServerStatus(
        state=service.state.value,
        phase=service.phase,
        progress=Progress(*service.progress),
        failure=None if service.failure is None else str(service.failure),
        version=__version__,
        created=service.created,
        uptime_s=round(max(0.0, time.time() - service.created), 3),
        model=service.model_name,
        served_model_names=list(service.served_model_names),
        num_in_flight=service.num_in_flight,
    )
    engine = service.engine_or_none
    if engine is not None:
        status.artifact_id = service.artifact_id
        status.weights = engine.weights
        status.isa = engine.isa
        status.max_model_len = engine.max_model_len
        status.engine = engine.status()
    return status
