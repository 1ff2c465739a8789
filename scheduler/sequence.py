"""One token stream as its scheduler sees it. Private to the scheduler, and mutable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from furiosa_llm.scheduler.params import SequenceParams


class SequenceState(Enum):
    """Where a sequence is. Only a running one holds blocks."""

    WAITING = auto()  # for its first step, or for its next one after a preemption
    RUNNING = auto()  # holds blocks for all its tokens
    DRAINING = auto()  # every step it needs is planned; only results are missing
    FINISHED = auto()  # left: ended or aborted; results still in flight are dropped


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and how far they are computed. Positions count from the prompt's first token."""

    sequence_id: int
    arrival_index: int  # rises with each sequence added; never changes, preempted or not
    token_ids: list[int]  # prompt, then the output as far as it is known
    num_prompt_tokens: int
    max_len: int  # it ends with "length" when it has so many tokens
    params: SequenceParams
    stop_token_ids: frozenset[int]
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0  # tokens whose KV is written, or will be by a step in flight
    num_pending: int = 0  # tokens behind `token_ids` that steps in flight will sample
    num_bypassed: int = 0  # steps in a row whose packing preferred a later sequence

    @property
    def num_tokens(self) -> int:
        """All tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is not computed yet."""
        return self.num_computed == len(self.token_ids) + self.num_pending - 1

    @property
    def num_prefillable(self) -> int:
        """Tokens that a chunk may hold now; 0 while only results in flight can tell the next one.

        A row can stand on the newest token while that is pending, but on no other pending one.
        """
        return len(self.token_ids) - self.num_computed + (self.num_pending == 1)
