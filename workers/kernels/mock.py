"""The mock executor: tokens out of thin air, at a set speed, for tests of all that is above it.

A token is a hash of (seed, choice, position, last token of the row), so it keeps the promises that
the real executors keep: the same request gives the same tokens whatever is in its batch, however
its prompt is cut, and wherever it is resumed.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.workers.executor import Float32, Int32, StepBatch, StepResult
from furiosa_llm.workers.sampler import sampled_positions

# Ids below it are never made: checkpoints keep their special tokens there, and a sequence that met
# its end-of-sequence token by accident would be shorter than a test asked for.
FIRST_TOKEN_ID = 3

# A step that was late by up to this much is made up for by the next ones; more is idleness.
_MAX_CATCH_UP_S = 0.01

# The odd multipliers and shifts of splitmix64 (Steele, Lea and Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class MockExecutor:
    """Implements `Executor` without a model. Sampling parameters other than the seed mean nothing;
    suppressed tokens are avoided.

    Args:
        vocab_size: more than FIRST_TOKEN_ID.
        tokens_per_s: the speed, prompt tokens counted as well as sampled rows' last tokens: a step
            of n tokens takes n / tokens_per_s seconds of real time. 0: no waiting at all.
    """

    def __init__(self, vocab_size: int, *, tokens_per_s: float = 0.0) -> None:
        assert vocab_size > FIRST_TOKEN_ID, vocab_size
        assert tokens_per_s >= 0, tokens_per_s
        self._num_choices = np.uint64(vocab_size - FIRST_TOKEN_ID)
        self._tokens_per_s = tokens_per_s
        self._due_s = 0.0  # when the step before this one was over, on the monotonic clock

    @property
    def isa(self) -> str:
        """The kernel family."""
        return "mock"

    def execute(self, batch: StepBatch) -> StepResult:
        """Make one token for each sampling row, then wait until the step's time is over."""
        last_tokens = batch.token_ids[batch.row_offsets[batch.sample_rows + 1] - 1]
        mixed = _mix(batch.seed)
        for part in (batch.choice_index, sampled_positions(batch), last_tokens):
            mixed = _mix(mixed ^ part.astype(np.uint64))
        picks = mixed % self._num_choices
        if len(batch.suppressed_ids):
            picks = self._avoid_suppressed(picks, batch)
        token_ids = (picks + np.uint64(FIRST_TOKEN_ID)).astype(np.int32)
        self._wait(len(batch.token_ids))
        return _certain(token_ids, batch.num_logprobs)

    def logits(self, batch: StepBatch) -> Float32:
        """Refused: there are none."""
        raise InvalidRequestError("the mock backend has no logits: use native or numpy")

    def close(self) -> None:
        """Nothing to free."""

    def _avoid_suppressed(self, picks: NDArray[np.uint64], batch: StepBatch) -> NDArray[np.uint64]:
        """Each pick, or the next id (around the end) that its row does not suppress."""
        picks = picks.copy()
        for i in range(len(picks)):
            start, end = batch.suppressed_offsets[i], batch.suppressed_offsets[i + 1]
            suppressed = set(batch.suppressed_ids[start:end].tolist())
            if suppressed:
                pick, count = int(picks[i]), int(self._num_choices)
                for step in range(count):
                    if (pick + step) % count + FIRST_TOKEN_ID not in suppressed:
                        picks[i] = (pick + step) % count
                        break
                else:
                    raise InvalidRequestError("every token is suppressed: nothing can be sampled")
        return picks

    def _wait(self, num_tokens: int) -> None:
        if self._tokens_per_s == 0:
            return
        # From the last step's due time, so that the sleeps' lateness does not add up.
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s - _MAX_CATCH_UP_S) + num_tokens / self._tokens_per_s
        if self._due_s > now_s:
            time.sleep(self._due_s - now_s)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every bit of the input moves half of the output's."""
    mixed = values + _STEP
    for shift, multiplier in _MIX:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
    return mixed ^ (mixed >> np.uint64(31))


def _certain(token_ids: Int32, num_logprobs: Int32) -> StepResult:
    """The result of a distribution that has only the sampled token in it."""
    num_columns = max(0, int(num_logprobs.max(initial=0)))
    top_token_ids = np.full((len(token_ids), num_columns), -1, np.int32)
    top_token_ids[:, :1] = np.where(num_logprobs > 0, token_ids, -1)[:, None]
    return StepResult(
        token_ids=token_ids,
        logprobs=np.zeros(len(token_ids), np.float32),
        ranks=np.ones(len(token_ids), np.int32),
        top_token_ids=top_token_ids,
        top_logprobs=np.zeros((len(token_ids), num_columns), np.float32),
    )
