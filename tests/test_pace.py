"""How long a refused caller is told to wait."""

import pytest

from furiosa_llm.engine.pace import MAX_RETRY_S, MIN_RETRY_S, Pace


def test_the_rate_is_that_of_the_last_seconds():
    pace = Pace()
    assert pace.per_s(0.0) == 0.0
    for second in range(100):
        pace.ended(4, float(second))
    assert pace.per_s(100.0) == pytest.approx(4, rel=0.1)
    assert pace.per_s(200.0) == 0.0


@pytest.mark.parametrize(
    ("num_ahead", "expected_s"),
    [
        pytest.param(1, MIN_RETRY_S, id="at once, but never sooner than a second"),
        pytest.param(40, 10.0, id="as long as so many take"),
        pytest.param(10**6, MAX_RETRY_S, id="no longer than a minute"),
    ],
)
def test_a_caller_is_told_when_there_will_be_room(num_ahead, expected_s):
    pace = Pace()
    for second in range(10):
        pace.ended(4, float(second))
    assert pace.retry_after_s(num_ahead, 10.0) == pytest.approx(expected_s)


def test_where_nothing_has_ended_yet_a_few_seconds_are_a_guess():
    assert MIN_RETRY_S < Pace().retry_after_s(1, 0.0) < MAX_RETRY_S
