"""The restart policy: at once, then ever later, then no more."""

import math

from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.engine.supervisor import GiveUp, RestartPolicy, Start


def test_the_first_crash_restarts_at_once():
    policy = RestartPolicy()
    assert policy.exited(100.0) == [Start(epoch=2)]
    assert math.isinf(policy.due_s)


def test_the_next_crashes_wait_ever_longer():
    policy = RestartPolicy(first_delay_s=1.0)
    policy.exited(0.0)
    assert policy.exited(1.0) == []
    assert policy.due_s == 2.0
    assert policy.tick(1.9) == []
    assert policy.tick(2.0) == [Start(epoch=3)]
    assert policy.exited(3.0) == []
    assert policy.due_s == 5.0


def test_a_crash_long_ago_does_not_count():
    policy = RestartPolicy(window_s=30.0)
    policy.exited(0.0)
    assert policy.exited(31.0) == [Start(epoch=3)]


def test_too_many_crashes_are_given_up():
    policy = RestartPolicy(max_crashes=2, window_s=30.0, first_delay_s=0.5)
    policy.exited(0.0)
    policy.exited(1.0)
    policy.tick(1.5)
    assert policy.exited(2.0) == [GiveUp("3 crashes within 30 s")]
    assert policy.tick(1000.0) == []


@given(lifetimes=st.lists(st.floats(0.0, 20.0), max_size=30))
def test_restarts_are_bounded_in_any_window(lifetimes):
    policy = RestartPolicy(max_crashes=3, window_s=30.0)
    now_s, starts, epoch = 0.0, [], 1
    for lifetime_s in lifetimes:
        now_s += lifetime_s
        effects = policy.exited(now_s)
        if not effects and not math.isinf(policy.due_s):
            now_s = policy.due_s
            effects = policy.tick(now_s)
        if effects and isinstance(effects[0], GiveUp):
            break
        epoch += 1
        assert effects == [Start(epoch)]
        starts.append(now_s)
    for first, fifth in zip(starts, starts[4:], strict=False):
        assert fifth - first >= 30.0 - 1e-9 - 0.25 * 4  # a delayed start trails its crash
