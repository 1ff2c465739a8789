"""What the core needs of its workers, whether it started them or shares another front-end's.

A pool knows nothing of requests: it says what workers say and how they fare, as events, and lets
through only valid messages of a living epoch, in order. All of it but `pids` and `state` belongs
to the one thread that made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.wire.messages import Added, Idle, Pong, Refused, Tokens, ToWorker


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """The worker takes sequences from now on."""

    worker_id: int
    isa: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """The worker's process has ended, and all it held is lost. It may come up again."""

    worker_id: int
    cause: str
    start_error: FuriosaLLMError | None  # why it could not start, if that is what happened
    was_asked: bool = False  # it left because it was told to: nothing that it ran is to blame


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker is given up: it will not come up again."""

    worker_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class NoWorkerLeft:
    """Every worker is down and given up."""

    reason: str


Event = WorkerUp | WorkerDown | WorkerLost | NoWorkerLeft | Tokens | Idle | Added | Refused | Pong


@dataclass(frozen=True, slots=True)
class ProcessState:
    """How a worker's process fares; see `WorkerStatus`, which has the same fields."""

    pid: int | None
    epoch: int
    is_up: bool
    phase: str
    restarts: tuple[tuple[str, int], ...]
    last_message_s: float | None


class Pool(Protocol):
    """Workers, seen from the core."""

    @property
    def is_complete(self) -> bool:
        """Whether the engine may begin: all workers that are to be there have been up."""
        ...

    @property
    def pids(self) -> list[int | None]:
        """Process ids by worker id; None for one that is down. Any thread may ask."""
        ...

    @property
    def up(self) -> list[int]:
        """The workers that take sequences."""
        ...

    def state(self, worker_id: int) -> ProcessState:
        """How the worker fares now. Any thread may ask."""
        ...

    def start(self) -> None:
        """Have the workers come up; `WorkerUp` tells when each is ready."""
        ...

    def send(self, worker_id: int, message: ToWorker) -> None:
        """Send it if the worker is up. If it is not, or dies before it reads it, so be it:

        its `WorkerDown` tells, or has told, that what it was given is lost.
        """
        ...

    def restart(self, worker_id: int) -> None:
        """Have the worker's process replaced: `WorkerDown`, then `WorkerUp`."""
        ...

    def attach(self, front_end: int, endpoint: str) -> None:
        """Have all workers, whenever they come up, serve another front-end, too."""
        ...

    def wake_by(self, due_s: float) -> None:
        """End the next `wait` by then (on the monotonic clock), if nothing else does."""
        ...

    def wait(self) -> Iterator[Event]:
        """Sleep until something happens, and yield what it was. Nothing after a wake-up, perhaps.

        To be run to its end, each event handled before the next is asked for: then what is sent
        meanwhile goes to the process that the events so far tell of.
        """
        ...

    def close(self) -> None:
        """End what this pool started, and remove its socket."""
        ...
