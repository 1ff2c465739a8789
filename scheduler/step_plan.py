"""The plan of one step: which tokens of which sequences run, and where their KV goes.

A plan is a value: it stays valid however the scheduler's state moves on, because the executor may
still be busy with it when the next one is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.scheduler.params import SequenceParams

PENDING_TOKEN = -1
"""Stands for a token that an earlier step, still in flight, will sample for the same sequence.

Steps run in the order they were planned, so the executor knows every such token by the time it
runs the row. Only a row's last token (and the last entries of `history`) can be pending.
"""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's part of a step: a prefill chunk, or one decode token."""

    sequence_id: int
    start: int
    """Tokens already in the KV cache; the position of `token_ids[0]`."""
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    """The sequence's block table; it covers positions 0 .. start + len(token_ids) - 1."""
    params: SequenceParams | None
    """How to sample the token after the last one; None for a chunk that ends inside the prompt."""
    suppressed_token_ids: tuple[int, ...] = ()
    """Tokens that must not be sampled here (stop tokens before `min_tokens`)."""
    history: tuple[int, ...] = ()
    """The tokens before the sampled one that its penalties need: the prompt's, the output's."""
    num_history_prompt: int = 0
    """How many of the first entries of `history` are the prompt's."""
    num_pending: int = 0
    """How many of the last entries of `history` are PENDING_TOKEN."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one native call runs. Rows are independent of each other: any order, same tokens."""

    step_id: int  # +1 per plan
    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def sampling_rows(self) -> tuple[int, ...]:
        """Indices of the rows that sample, in the order of the executor's results."""
        return tuple(i for i, row in enumerate(self.rows) if row.params is not None)
