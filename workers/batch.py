"""A `StepPlan` as the flat arrays of a `StepBatch`, and the tokens it had to leave open.

This is done in two parts, so that the long one overlaps with the step before: `BatchBuilder.build`
makes all arrays on the loop's thread while that step still runs, and `UnresolvedBatch.resolve`
fills in the pending tokens, which only that step could tell, right before this one is executed.

A token is pending only while the step that samples it is in flight, so `RecentSamples` has to
remember only as many steps as can be in flight. A row's pending tokens are always the last ones
that were sampled for its sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN, StepPlan, StepRow
from furiosa_llm.workers.executor import Float32, Int32, StepBatch, UInt64


class RecentSamples:
    """The tokens of the last few executed steps, by sequence. Bounded by `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        self._steps: deque[dict[int, int]] = deque(maxlen=num_steps)  # newest first

    def remember(self, sequence_ids: Sequence[int], token_ids: Int32) -> None:
        """Note what a step has just sampled; a step beyond the bound is forgotten."""
        self._steps.appendleft(dict(zip(sequence_ids, token_ids.tolist(), strict=True)))

    def newest(self, sequence_id: int, num_back: int) -> int:
        """The last token sampled for the sequence (`num_back` 0), the one before it (1), ...

        Raises: KeyError if no remembered step sampled it.
        """
        for step in self._steps:
            token_id = step.get(sequence_id)
            if token_id is not None:
                if num_back == 0:
                    return token_id
                num_back -= 1
        raise KeyError(f"sequence {sequence_id} has no sampled token in the last steps")


@dataclass(frozen=True, slots=True)
class UnresolvedBatch:
    """A batch whose pending tokens are still PENDING_TOKEN, and where they are."""

    batch: StepBatch
    sampling_ids: tuple[int, ...]  # sequence ids in the order of the results
    token_places: tuple[int, ...]  # indices into batch.token_ids ...
    token_owners: tuple[int, ...]  # ... and whose newest token belongs there
    history_places: tuple[tuple[int, int, int], ...]  # (index into history_ids, owner, num_back)

    def resolve(self, recent: RecentSamples) -> StepBatch:
        """The batch, complete. All steps planned before it have been remembered in `recent`."""
        if self.token_places:
            self.batch.token_ids[list(self.token_places)] = [
                recent.newest(sequence_id, 0) for sequence_id in self.token_owners
            ]
        for place, sequence_id, num_back in self.history_places:
            self.batch.history_ids[place] = recent.newest(sequence_id, num_back)
        return self.batch


@dataclass(frozen=True, slots=True)
class _ParamColumns:
    """The sampling parameters of a step's sampling rows, one array per field."""

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    repetition_penalty: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    seed: UInt64
    choice_index: Int32
    num_logprobs: Int32
    bias_ids: Int32
    bias_values: Float32
    bias_offsets: Int32

    @classmethod
    def of(cls, params: list[SequenceParams]) -> _ParamColumns:
        return cls(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_k=np.array([p.top_k for p in params], np.int32),
            top_p=np.array([p.top_p for p in params], np.float32),
            min_p=np.array([p.min_p for p in params], np.float32),
            repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
            presence_penalty=np.array([p.presence_penalty for p in params], np.float32),
            frequency_penalty=np.array([p.frequency_penalty for p in params], np.float32),
            seed=np.array([p.seed for p in params], np.uint64),
            choice_index=np.array([p.choice_index for p in params], np.int32),
            num_logprobs=np.array([p.num_logprobs for p in params], np.int32),
            bias_ids=_flat((p.bias_token_ids for p in params), -1),
            bias_values=np.fromiter(chain.from_iterable(p.bias_values for p in params), np.float32),
            bias_offsets=_offsets([len(p.bias_token_ids) for p in params]),
        )


class BatchBuilder:
    """Turns plans into batches. Executors must not write to a batch: two may share arrays.

    While nothing but decoding happens, a plan differs from the one before by one token a row. So
    the parameter columns are kept from the last batch, and each sequence's block table is kept as
    bytes until the scheduler hands out another tuple for it.
    """

    def __init__(self) -> None:
        self._params: list[SequenceParams] = []
        self._columns = _ParamColumns.of([])
        self._block_tables: dict[int, tuple[tuple[int, ...], bytes]] = {}

    def build(self, plan: StepPlan) -> UnresolvedBatch:
        """The arrays of `plan`; needs no result of an earlier step."""
        rows = plan.rows
        sample_rows = plan.sampling_rows
        sampling = [rows[index] for index in sample_rows]
        columns = self._columns_of([row.params for row in sampling if row.params is not None])
        row_offsets = _offsets([len(row.token_ids) for row in rows])
        history_offsets = _offsets([len(row.history) for row in sampling])
        places = [i for i, row in enumerate(rows) if row.token_ids[-1] == PENDING_TOKEN]
        batch = StepBatch(
            token_ids=_flat((row.token_ids for row in rows), int(row_offsets[-1])),
            row_offsets=row_offsets,
            context_lens=np.array([row.start for row in rows], np.int32),
            block_ids=self._flat_block_tables(rows),
            block_offsets=_offsets([len(row.block_ids) for row in rows]),
            sample_rows=np.array(sample_rows, np.int32),
            temperature=columns.temperature,
            top_k=columns.top_k,
            top_p=columns.top_p,
            min_p=columns.min_p,
            repetition_penalty=columns.repetition_penalty,
            presence_penalty=columns.presence_penalty,
            frequency_penalty=columns.frequency_penalty,
            seed=columns.seed,
            choice_index=columns.choice_index,
            num_logprobs=columns.num_logprobs,
            history_ids=_flat((row.history for row in sampling), int(history_offsets[-1])),
            history_offsets=history_offsets,
            history_prompt_lens=np.array([row.num_history_prompt for row in sampling], np.int32),
            bias_ids=columns.bias_ids,
            bias_values=columns.bias_values,
            bias_offsets=columns.bias_offsets,
            suppressed_ids=_flat((row.suppressed_token_ids for row in sampling), -1),
            suppressed_offsets=_offsets([len(row.suppressed_token_ids) for row in sampling]),
        )
        return UnresolvedBatch(
            batch=batch,
            sampling_ids=tuple([row.sequence_id for row in sampling]),
            token_places=tuple((row_offsets[1:][places] - 1).tolist()),
            token_owners=tuple([rows[index].sequence_id for index in places]),
            history_places=_history_places(sampling, history_offsets),
        )

    def _columns_of(self, params: list[SequenceParams]) -> _ParamColumns:
        if params != self._params:  # a list compares its entries by identity first
            self._params, self._columns = params, _ParamColumns.of(params)
        return self._columns

    def _flat_block_tables(self, rows: tuple[StepRow, ...]) -> Int32:
        known, tables = self._block_tables, {}
        for row in rows:
            table = known.get(row.sequence_id)
            if table is None or table[0] is not row.block_ids:
                table = (row.block_ids, np.array(row.block_ids, np.int32).tobytes())
            tables[row.sequence_id] = table
        self._block_tables = tables  # of this plan's sequences only, so it stays bounded
        joined = bytearray().join([tables[row.sequence_id][1] for row in rows])
        return np.frombuffer(joined, np.int32)


def _offsets(lengths: list[int]) -> Int32:
    """Where each of several runs of these lengths starts when they lie end to end, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _flat(runs: Iterable[tuple[int, ...]], count: int) -> NDArray[np.int32]:
    """The runs end to end; `count` is their total length, or -1 when it is not known."""
    return np.fromiter(chain.from_iterable(runs), np.int32, count)


def _history_places(sampling: list[StepRow], offsets: Int32) -> tuple[tuple[int, int, int], ...]:
    """For every pending token of a history: its index, its sequence, how many follow it."""
    return tuple(
        (int(offsets[index + 1]) - 1 - num_back, row.sequence_id, num_back)
        for index, row in enumerate(sampling)
        for num_back in range(row.num_pending)
    )
