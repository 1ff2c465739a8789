"""Step batches for executor tests: rows in, the flat arrays of `StepBatch` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from furiosa_llm.workers.executor import StepBatch


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice_index: int = 0
    num_logprobs: int = -1
    history: Sequence[int] = ()
    history_prompt_len: int = 0
    biases: Sequence[tuple[int, float]] = ()  # ascending by token id
    suppressed: Sequence[int] = ()


@dataclass(frozen=True)
class Row:
    """A sequence's part of a step; `sampling` None: the row does not sample."""

    context_len: int
    token_ids: Sequence[int]
    block_ids: Sequence[int]
    sampling: Sampling | None = field(default_factory=Sampling)


def step_batch(rows: Sequence[Row], **overrides: Any) -> StepBatch:
    """The batch of these rows; `overrides` replace whole arrays, to break it on purpose."""
    samples = [row.sampling for row in rows if row.sampling is not None]

    def int32(values: Sequence[int]) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    def each(name: str, dtype: type[np.generic]) -> np.ndarray:
        return np.array([getattr(sample, name) for sample in samples], dtype=dtype)

    def flat(parts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
        return int32([value for part in parts for value in part]), offsets

    token_ids, row_offsets = flat([row.token_ids for row in rows])
    block_ids, block_offsets = flat([row.block_ids for row in rows])
    history_ids, history_offsets = flat([sample.history for sample in samples])
    bias_ids, bias_offsets = flat([[i for i, _ in sample.biases] for sample in samples])
    bias_values = [value for sample in samples for _, value in sample.biases]
    suppressed_ids, suppressed_offsets = flat([sample.suppressed for sample in samples])
    arrays = {
        "token_ids": token_ids,
        "row_offsets": row_offsets,
        "context_lens": int32([row.context_len for row in rows]),
        "block_ids": block_ids,
        "block_offsets": block_offsets,
        "sample_rows": int32([i for i, row in enumerate(rows) if row.sampling is not None]),
        "temperature": each("temperature", np.float32),
        "top_k": each("top_k", np.int32),
        "top_p": each("top_p", np.float32),
        "min_p": each("min_p", np.float32),
        "repetition_penalty": each("repetition_penalty", np.float32),
        "presence_penalty": each("presence_penalty", np.float32),
        "frequency_penalty": each("frequency_penalty", np.float32),
        "seed": each("seed", np.uint64),
        "choice_index": each("choice_index", np.int32),
        "num_logprobs": each("num_logprobs", np.int32),
        "history_ids": history_ids,
        "history_offsets": history_offsets,
        "history_prompt_lens": each("history_prompt_len", np.int32),
        "bias_ids": bias_ids,
        "bias_values": np.array(bias_values, dtype=np.float32),
        "bias_offsets": bias_offsets,
        "suppressed_ids": suppressed_ids,
        "suppressed_offsets": suppressed_offsets,
    }
    return StepBatch(**(arrays | overrides))
