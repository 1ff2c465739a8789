"""The matcher against a naive search over the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.text.stop_strings import StopStringMatcher

STOPS = st.lists(st.text("ab\né", min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text("ab\né", max_size=6), max_size=12)


def naive(text, stops):
    """The end and the stop of the match that is complete first; the longest of several."""
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[:end].endswith(stop)
    ]
    return min(ends, default=None)


def run(pieces, stops, include=False):
    """What each piece released (the flush as the last), and the stop that matched."""
    matcher = StopStringMatcher(stops, include_stop_str=include)
    released = []
    for piece in pieces:
        text, stop = matcher.append(piece)
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_agrees_with_a_naive_search(pieces, stops, include):
    text = "".join(pieces)
    released, stop = run(pieces, stops, include)
    found = naive(text, stops)
    if found is None:
        assert (stop, "".join(released)) == (None, text)
    else:
        end, _, expected = found
        assert stop == expected
        assert "".join(released) == text[: end if include else end - len(expected)]


@given(pieces=PIECES, stops=STOPS)
def test_holds_back_only_what_may_begin_a_stop_string(pieces, stops):
    matcher, seen, out = StopStringMatcher(stops), "", ""
    for piece in pieces:
        text, stop = matcher.append(piece)
        if stop is not None:
            return
        seen, out = seen + piece, out + text
        held = seen[len(out) :]
        longest = max(
            (n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])), default=0
        )
        assert len(held) == longest


@pytest.mark.parametrize(
    ("stops", "pieces", "released", "stop"),
    [
        pytest.param(["\n\n"], ["a\n", "\nb"], ["a", ""], "\n\n", id="over a border"),
        pytest.param(["END"], ["E", "N", "x"], ["", "", "ENx", ""], None, id="false alarm"),
        pytest.param(["aab"], ["aa", "ab"], ["", "a"], "aab", id="overlapping itself"),
        pytest.param(["abcd", "bc"], ["abcd"], ["a"], "bc", id="complete first wins"),
        pytest.param(["c", "abc"], ["abc"], [""], "abc", id="same end: the longest wins"),
        pytest.param(["END"], ["EN"], ["", "EN"], None, id="flushed at the end"),
        pytest.param([], ["any", ""], ["any", "", ""], None, id="no stop strings"),
    ],
)
def test_examples(stops, pieces, released, stop):
    assert run(pieces, stops) == (released, stop)


def test_the_match_may_be_kept():
    assert run(["one. t", "wo"], [". "], include=True) == (["one. "], ". ")
