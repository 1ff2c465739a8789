"""The one interface between a worker's loop and whatever computes: a whole step in one call.

`StepBatch` is a `StepPlan` as flat arrays, every pending token resolved. An executor holds the
model and the KV cache and nothing about sequences: all it needs of them is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of one step. T tokens in R rows, of which S sample; all arrays C-contiguous.

    Row r owns tokens row_offsets[r] .. row_offsets[r+1]; its first token's position is
    context_lens[r], so its tokens attend to context_lens[r] cached tokens and, causally, to each
    other. Its block table is block_ids[block_offsets[r] .. block_offsets[r+1]].
    """

    token_ids: Int32  # (T,)
    row_offsets: Int32  # (R+1,)
    context_lens: Int32  # (R,)
    block_ids: Int32  # flat
    block_offsets: Int32  # (R+1,)
    sample_rows: Int32  # (S,) ascending row indices
    temperature: Float32  # (S,) below 1e-5 is greedy
    top_k: Int32  # (S,) 0 is off
    top_p: Float32  # (S,)
    min_p: Float32  # (S,)
    repetition_penalty: Float32  # (S,) over the whole history; 1 is off
    presence_penalty: Float32  # (S,) over the history's output part; 0 is off
    frequency_penalty: Float32  # (S,) as presence_penalty
    seed: UInt64  # (S,)
    choice_index: Int32  # (S,)
    num_logprobs: Int32  # (S,) -1 none, 0 the sampled token's, k also the k likeliest
    history_ids: Int32  # flat: tokens that the penalties apply to, the prompt's before the output's
    history_offsets: Int32  # (S+1,)
    history_prompt_lens: Int32  # (S,) how many of a row's history are the prompt's
    bias_ids: Int32  # flat: tokens whose logits are shifted, ascending within a row
    bias_values: Float32  # flat: by how much
    bias_offsets: Int32  # (S+1,)
    suppressed_ids: Int32  # flat: tokens that must not be sampled
    suppressed_offsets: Int32  # (S+1,)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The output of one step, in the order of `sample_rows`. K = max(num_logprobs, 0) over rows.

    The log-probability fields are meaningful only for rows that asked (num_logprobs >= 0).
    """

    token_ids: Int32  # (S,)
    logprobs: Float32  # (S,) of the sampled token
    ranks: Int32  # (S,) of the sampled token; 1 is the likeliest
    top_token_ids: Int32  # (S, K), likeliest first; -1 pads
    top_logprobs: Float32  # (S, K)


class Executor(Protocol):
    """Runs steps in order, one at a time, on its own PEs. Not thread-safe."""

    @property
    def isa(self) -> str:
        """The kernel family; tokens are bit-identical within one family and weight type."""
        ...

    def execute(self, batch: StepBatch) -> StepResult:
        """Run the whole step: forward, KV write, sampling. Releases the GIL while it computes."""
        ...

    def logits(self, batch: StepBatch) -> Float32:
        """The same forward step, KV write included; (S, vocab) logits instead of samples."""
        ...

    def close(self) -> None:
        """Free the KV cache and threads; idempotent."""
        ...
