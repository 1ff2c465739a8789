"""Packing: the budget is used up, nobody gets more than he wants or is passed over for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.scheduler.packing import MAX_BYPASSES, pack_greedy, pack_identity

wanted_tokens = st.lists(st.integers(1, 50), max_size=12)


@pytest.mark.parametrize(("wanted", "budget", "chunks"), [
    pytest.param([], 8, [], id="nobody"),
    pytest.param([3, 4], 8, [3, 4], id="all fit"),
    pytest.param([10, 2, 3], 8, [8, 0, 0], id="the first takes all"),
    pytest.param([5, 5, 5], 8, [5, 3, 0], id="the second is split"),
])  # fmt: skip
def test_identity_serves_in_order(wanted, budget, chunks):
    assert pack_identity(wanted, budget) == chunks


@pytest.mark.parametrize(("wanted", "num_bypassed", "budget", "chunks"), [
    pytest.param([], [], 8, [], id="nobody"),
    pytest.param([3, 4], [0, 0], 8, [3, 4], id="all fit"),
    pytest.param([10, 2, 3], [0, 0, 0], 8, [3, 2, 3], id="whole ones first, the rest to the first"),
    pytest.param([5, 6, 2], [0, 0, 0], 8, [0, 6, 2], id="best fit passes over the first"),
    pytest.param([5, 6, 2], [7, 0, 0], 8, [0, 6, 2], id="seven times is not overdue"),
    pytest.param([5, 6, 2], [8, 0, 0], 8, [5, 1, 2], id="eight times is"),
    pytest.param([9, 9, 2], [8, 8, 0], 8, [8, 0, 0], id="overdue ones in order"),
    pytest.param([9, 20], [0, 0], 8, [8, 0], id="none fits: the first is split"),
    pytest.param([4, 4, 4], [0, 0, 0], 8, [4, 4, 0], id="equals in order"),
])  # fmt: skip
def test_greedy_fits_best(wanted, num_bypassed, budget, chunks):
    assert pack_greedy(wanted, num_bypassed, budget) == chunks


@given(wanted=wanted_tokens, budget=st.integers(1, 100), data=st.data())
def test_the_budget_is_used_up_and_no_more(wanted, budget, data):
    bypassed = data.draw(
        st.lists(
            st.integers(0, 2 * MAX_BYPASSES), min_size=len(wanted), max_size=len(wanted)
        )
    )  # fmt: skip
    for chunks in (pack_identity(wanted, budget), pack_greedy(wanted, bypassed, budget)):
        assert len(chunks) == len(wanted)
        assert all(0 <= size <= most for size, most in zip(chunks, wanted, strict=True))
        assert sum(chunks) == min(budget, sum(wanted))


@given(wanted=wanted_tokens, budget=st.integers(1, 100))
def test_greedy_splits_one_prompt_at_most_and_only_where_no_other_fits(wanted, budget):
    chunks = pack_greedy(wanted, [0] * len(wanted), budget)
    partial = [i for i, size in enumerate(chunks) if 0 < size < wanted[i]]
    assert len(partial) <= 1
    left = sum(chunks[i] for i in partial)
    assert all(wanted[i] > left for i, size in enumerate(chunks) if size == 0)


@given(
    first=st.integers(1, 40),
    budget=st.integers(1, 16),
    others=st.lists(st.integers(1, 16), min_size=1, max_size=6),
)
def test_greedy_passes_nobody_over_for_ever(first, budget, others):
    """The first of the queue against an endless supply of others that fit better."""
    num_bypassed = num_steps = 0
    while first > 0:
        chunks = pack_greedy([first, *others], [num_bypassed] + [0] * len(others), budget)
        num_bypassed = 0 if chunks[0] else num_bypassed + 1
        first -= chunks[0]
        num_steps += 1
        assert num_bypassed <= MAX_BYPASSES
        assert num_steps <= (MAX_BYPASSES + 1) * 40
