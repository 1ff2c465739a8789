"""The mock executor keeps the promises of the real ones, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from step_batches import Row, Sampling, step_batch

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.workers.kernels import mock
from furiosa_llm.workers.kernels.mock import FIRST_TOKEN_ID, MockExecutor


def token_of(row: Row, vocab_size: int = 1000) -> int:
    return int(MockExecutor(vocab_size).execute(step_batch([row])).token_ids[0])


def test_the_tokens_are_these():
    """Tests elsewhere may store them: a change of the hash is a change of what they mean."""
    executor = MockExecutor(49152)
    rows = [Row(position, [7], [], Sampling(seed=2**63 + 1)) for position in range(4)]
    assert executor.execute(step_batch(rows)).token_ids.tolist() == [35817, 1925, 4840, 1327]
    assert executor.isa == "mock"
    executor.close()
    executor.close()


def test_a_token_depends_on_seed_choice_position_and_last_token_only():
    base = token_of(Row(4, [9, 8], [1], Sampling(seed=3)))
    assert base == token_of(Row(5, [8], [2, 3], Sampling(seed=3, temperature=1.0, top_k=4)))
    others = [
        Row(4, [9, 8], [1], Sampling(seed=4)),
        Row(4, [9, 8], [1], Sampling(seed=3 + 2**32)),
        Row(4, [9, 8], [1], Sampling(seed=3, choice_index=1)),
        Row(5, [9, 8], [1], Sampling(seed=3)),
        Row(4, [8, 9], [1], Sampling(seed=3)),
    ]
    assert base not in [token_of(row) for row in others]


def test_a_row_does_not_depend_on_its_batch():
    rows = [Row(i, [i, 2 * i], [], Sampling(seed=i) if i % 3 else None) for i in range(64)]
    together = MockExecutor(1000).execute(step_batch(rows)).token_ids.tolist()
    assert together == [token_of(row) for row in rows if row.sampling]


def test_special_and_suppressed_tokens_are_avoided():
    rows = [Row(i, [1], [], Sampling(suppressed=[4, 5])) for i in range(100)]
    tokens = MockExecutor(7).execute(step_batch(rows)).token_ids
    assert set(tokens.tolist()) == {FIRST_TOKEN_ID, 6}
    with pytest.raises(InvalidRequestError, match="every token is suppressed"):
        token_of(Row(0, [1], [], Sampling(suppressed=[3, 4])), vocab_size=5)


def test_tokens_spread_over_the_vocabulary():
    rows = [Row(i, [1], [], Sampling(seed=i)) for i in range(2000)]
    counts = np.bincount(MockExecutor(13).execute(step_batch(rows)).token_ids, minlength=13)
    assert counts[:FIRST_TOKEN_ID].sum() == 0
    assert np.abs(counts[FIRST_TOKEN_ID:] - 200).max() < 70  # five standard deviations


def test_logprobs_are_certain():
    rows = [Row(0, [1], [], Sampling(num_logprobs=n)) for n in (-1, 0, 2)]
    result = MockExecutor(10).execute(step_batch(rows))
    assert result.logprobs.tolist() == [0, 0, 0]
    assert result.ranks.tolist() == [1, 1, 1]
    assert result.top_token_ids.tolist() == [[-1, -1], [-1, -1], [result.token_ids[2], -1]]


def test_there_are_no_logits():
    with pytest.raises(InvalidRequestError, match="mock backend has no logits"):
        MockExecutor(10).logits(step_batch([Row(0, [1], [])]))


class FakeTime:
    """A clock that only sleeping moves, and what was slept."""

    def __init__(self) -> None:
        self.now_s, self.slept_s = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.slept_s += duration_s


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(mock, "time", clock)
    return clock


def test_a_step_takes_its_tokens_over_the_speed(fake_time):
    executor = MockExecutor(10, tokens_per_s=100)
    batch = step_batch([Row(0, [1] * 30, []), Row(0, [1] * 20, [], None)])
    executor.execute(batch)
    first_s = fake_time.slept_s
    executor.execute(batch)
    assert first_s == pytest.approx(0.5, abs=0.011), "the first may begin in the past"
    assert fake_time.slept_s - first_s == pytest.approx(0.5)


def test_lateness_is_made_up_for_but_idleness_is_not(fake_time):
    executor = MockExecutor(10, tokens_per_s=100)
    batch = step_batch([Row(0, [1] * 10, [])])
    executor.execute(batch)
    fake_time.now_s += 0.004  # late by less than is made up for
    before_s = fake_time.slept_s
    executor.execute(batch)
    assert fake_time.slept_s - before_s == pytest.approx(0.096)
    fake_time.now_s += 60  # idle
    before_s = fake_time.slept_s
    executor.execute(batch)
    assert fake_time.slept_s - before_s > 0.08


def test_without_a_speed_there_is_no_waiting(fake_time):
    MockExecutor(10).execute(step_batch([Row(0, [1] * 1000, [])]))
    assert fake_time.slept_s == 0
