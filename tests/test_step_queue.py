"""Steps in flight: executed in the order they were submitted, one at a time, errors passed on."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import zmq

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN, StepPlan, StepRow
from furiosa_llm.workers.executor import Float32, StepBatch, StepResult
from furiosa_llm.workers.step_queue import FinishedStep, InlineSteps, ThreadedSteps

PATIENCE_MS = 30_000


class GatedExecutor:
    """Samples the last token of each row plus one; with a gate, a step waits for a permit."""

    isa = "fake"

    def __init__(self, *, is_gated: bool = False, fails_at: int = -1) -> None:
        self.permits = threading.Semaphore(0) if is_gated else None
        self.num_executed = 0
        self._fails_at = fails_at

    def execute(self, batch: StepBatch) -> StepResult:
        if self.permits is not None:
            assert self.permits.acquire(timeout=PATIENCE_MS / 1000)
        self.num_executed += 1
        if batch.context_lens[0] == self._fails_at:
            raise ArithmeticError("the kernel gave up")
        token_ids = batch.token_ids[batch.row_offsets[1:] - 1] + 1
        none = np.zeros((len(token_ids), 0))
        return StepResult(
            token_ids=token_ids.astype(np.int32),
            logprobs=np.zeros(len(token_ids), np.float32),
            ranks=np.ones(len(token_ids), np.int32),
            top_token_ids=none.astype(np.int32),
            top_logprobs=none.astype(np.float32),
        )

    def logits(self, batch: StepBatch) -> Float32:
        raise NotImplementedError

    def close(self) -> None:
        pass


def decode_plan(step_id: int, token_id: int = PENDING_TOKEN) -> StepPlan:
    """One sequence's `step_id`-th decode."""
    params = SequenceParams(max_tokens=99)
    return StepPlan(step_id, (StepRow(1, step_id, (token_id,), (0,), params),))


def is_readable(steps: ThreadedSteps, timeout_ms: int = 0) -> bool:
    poller = zmq.Poller()
    assert steps.wakeup_fd is not None
    poller.register(steps.wakeup_fd, zmq.POLLIN)
    return bool(poller.poll(timeout_ms))


def wait_for(steps: ThreadedSteps) -> FinishedStep:
    assert is_readable(steps, PATIENCE_MS), "no step ended"
    finished = steps.take_finished()
    assert finished is not None
    return finished


def test_inline_steps_are_finished_when_submitted() -> None:
    steps = InlineSteps(GatedExecutor())
    assert steps.wakeup_fd is None
    assert steps.take_finished() is None
    for step_id in range(3):
        steps.submit(decode_plan(step_id, token_id=40))
        finished = steps.take_finished()
        assert finished is not None
        assert finished.plan.step_id == step_id
        assert finished.result.token_ids.tolist() == [41]
        assert steps.take_finished() is None


def test_an_error_of_an_inline_step_is_raised_where_it_is_submitted() -> None:
    steps = InlineSteps(GatedExecutor(fails_at=0))
    with pytest.raises(ArithmeticError, match="the kernel gave up"):
        steps.submit(decode_plan(0, token_id=40))


def test_submitting_does_not_wait_and_finished_steps_wake_the_poller_in_order() -> None:
    executor = GatedExecutor(is_gated=True)
    assert executor.permits is not None
    steps = ThreadedSteps(executor, limit=3)
    steps.submit(decode_plan(0, token_id=40))
    steps.submit(decode_plan(1))
    steps.submit(decode_plan(2))
    assert steps.take_finished() is None
    assert not is_readable(steps)
    for step_id in range(3):
        executor.permits.release()
        finished = wait_for(steps)
        assert finished.plan.step_id == step_id
        # Each pending token is the one that the step before has just sampled.
        assert finished.result.token_ids.tolist() == [41 + step_id]
        assert steps.take_finished() is None
        assert not is_readable(steps)


def test_the_descriptor_stays_readable_until_every_finished_step_is_taken() -> None:
    executor = GatedExecutor(is_gated=True)
    assert executor.permits is not None
    steps = ThreadedSteps(executor, limit=2)
    steps.submit(decode_plan(0, token_id=40))
    steps.submit(decode_plan(1))
    executor.permits.release(2)
    assert wait_for(steps).plan.step_id == 0
    assert wait_for(steps).plan.step_id == 1
    assert not is_readable(steps)


def test_an_error_comes_out_in_its_turn_and_no_later_step_runs() -> None:
    executor = GatedExecutor(fails_at=1)
    steps = ThreadedSteps(executor, limit=3)
    for step_id in range(3):
        steps.submit(decode_plan(step_id, token_id=40))
    assert wait_for(steps).plan.step_id == 0
    with pytest.raises(ArithmeticError, match="the kernel gave up"):
        wait_for(steps)
    assert steps.take_finished() is None
    assert executor.num_executed == 2


def test_more_steps_than_the_limit_are_a_defect_of_the_caller() -> None:
    executor = GatedExecutor(is_gated=True)
    assert executor.permits is not None
    steps = ThreadedSteps(executor, limit=1)
    steps.submit(decode_plan(0, token_id=40))
    with pytest.raises(AssertionError, match="more steps in flight"):
        steps.submit(decode_plan(1))
    executor.permits.release()
    assert wait_for(steps).plan.step_id == 0
