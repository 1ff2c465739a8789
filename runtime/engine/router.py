"""Which worker runs which sequence. Pure: what happened comes in, what to send comes out.

The ledger is exact: a sequence charges its worker with the tokens it holds, prompt and output so
far, from its dispatch to its end. The least charged worker takes the next sequence; among equals
the one that was given the fewest so far, so that an idle set is used evenly. A worker takes at most
`max_sequences_per_worker`; what no worker has room for waits here, first come first served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Effect: send this sequence to this worker."""

    sequence_id: int
    worker_id: int


@dataclass(slots=True)
class _Replica:
    num_tokens_of: dict[int, int] = field(default_factory=dict)  # by sequence
    num_tokens: int = 0
    num_dispatched: int = 0
    is_full: bool = False  # it has refused a sequence for want of room


class Router:
    """Assigns sequences to the workers that are up."""

    def __init__(self, *, max_sequences_per_worker: int) -> None:
        assert max_sequences_per_worker > 0
        self._max_sequences = max_sequences_per_worker
        self._up: dict[int, _Replica] = {}
        self._worker_of: dict[int, int] = {}
        self._waiting: OrderedDict[int, int] = OrderedDict()  # sequence -> its tokens

    @property
    def num_up(self) -> int:
        return len(self._up)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def load(self, worker_id: int) -> tuple[int, int]:
        """(sequences, tokens) that the worker is charged with."""
        replica = self._up[worker_id]
        return len(replica.num_tokens_of), replica.num_tokens

    def num_dispatched(self, worker_id: int) -> int:
        """Sequences that the worker is charged with; 0 when it is down. Any thread may ask."""
        replica = self._up.get(worker_id)
        return 0 if replica is None else len(replica.num_tokens_of)

    def worker_of(self, sequence_id: int) -> int | None:
        """Where the sequence runs; None while it waits or when it is unknown."""
        return self._worker_of.get(sequence_id)

    def worker_up(self, worker_id: int) -> list[Dispatch]:
        """The worker takes sequences from now on."""
        assert worker_id not in self._up
        self._up[worker_id] = _Replica()
        return self._dispatch()

    def worker_down(self, worker_id: int) -> list[int]:
        """The worker is gone; returns the sequences it held, oldest first, now unknown here."""
        replica = self._up.pop(worker_id, None)
        if replica is None:
            return []
        orphans = list(replica.num_tokens_of)
        for sequence_id in orphans:
            del self._worker_of[sequence_id]
        return orphans

    def submit(self, sequences: list[tuple[int, int]], *, first: bool = False) -> list[Dispatch]:
        """Take (sequence_id, num_tokens) pairs; `first` puts them before all that wait."""
        for sequence_id, num_tokens in reversed(sequences) if first else sequences:
            assert sequence_id not in self._worker_of
            assert sequence_id not in self._waiting
            self._waiting[sequence_id] = num_tokens
            if first:
                self._waiting.move_to_end(sequence_id, last=False)
        return self._dispatch()

    def refused(self, sequence_id: int) -> list[Dispatch]:
        """The worker has no room for it: others have filled it, who share it. It waits first in
        line, and the worker is asked again after one of its sequences has ended, or `reopen`.
        """
        worker_id = self._worker_of.pop(sequence_id)
        replica = self._up[worker_id]
        num_tokens = replica.num_tokens_of.pop(sequence_id)
        replica.num_tokens -= num_tokens
        replica.is_full = True
        return self.submit([(sequence_id, num_tokens)], first=True)

    def reopen(self) -> list[Dispatch]:
        """Workers that were full may have room again."""
        for replica in self._up.values():
            replica.is_full = False
        return self._dispatch()

    def progress(self, worker_id: int, sequence_ids: Iterable[int]) -> None:
        """Each of these sequences, which the worker runs, has grown by one token."""
        replica = self._up[worker_id]
        num_tokens_of, num_grown = replica.num_tokens_of, 0
        for sequence_id in sequence_ids:
            num_tokens_of[sequence_id] += 1
            num_grown += 1
        replica.num_tokens += num_grown

    def finish(self, *sequence_ids: int) -> list[Dispatch]:
        """The sequences have ended, wherever they were; idempotent. Their room goes to who waits.

        What ends together must be finished in one call: of two calls, the first could dispatch a
        sequence that the second is about to end.
        """
        for sequence_id in sequence_ids:
            self._waiting.pop(sequence_id, None)
            worker_id = self._worker_of.pop(sequence_id, None)
            if worker_id is not None:
                replica = self._up[worker_id]
                replica.num_tokens -= replica.num_tokens_of.pop(sequence_id)
                replica.is_full = False
        return self._dispatch()

    def _dispatch(self) -> list[Dispatch]:
        effects = []
        while self._waiting:
            open_workers = [
                (replica.num_tokens, replica.num_dispatched, worker_id)
                for worker_id, replica in self._up.items()
                if len(replica.num_tokens_of) < self._max_sequences and not replica.is_full
            ]
            if not open_workers:
                break
            worker_id = min(open_workers)[2]
            sequence_id, num_tokens = self._waiting.popitem(last=False)
            replica = self._up[worker_id]
            replica.num_tokens_of[sequence_id] = num_tokens
            replica.num_tokens += num_tokens
            replica.num_dispatched += 1
            self._worker_of[sequence_id] = worker_id
            effects.append(Dispatch(sequence_id, worker_id))
        return effects
