"""Stop strings, found while the text arrives in pieces.

One Aho-Corasick automaton over all stop strings of a request. Its state is the longest end of the
text so far that begins a stop string, so the state's depth is exactly what must be held back, and
each character is looked at once on average however many stop strings there are.

Which match wins: the one that is complete first; of several that end at the same character, the
longest. Both depend on the text alone and never on how it was cut into pieces.

Source: Aho and Corasick 1975, "Efficient string matching".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStringMatcher:
    """Passes text through until one of `stops` is complete.

    Args:
        stops: the strings, none of them empty; without any, all text passes at once.
        include_stop_str: whether the released text ends with the matched string or before it.
    """

    def __init__(self, stops: Sequence[str], *, include_stop_str: bool = False) -> None:
        assert all(stops), "SamplingParams drops empty stop strings"
        self._include_stop_str = include_stop_str
        self._children, self._fallback, self._depth, self._matched = _automaton(stops)
        self._state = 0
        self._held = ""  # always the text that the state stands for
        self._is_done = False

    def append(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns: the text that is now certain to be output, and the stop string that was completed
            or None. After a match the matcher is at its end: the rest of `text` is dropped, and
            nothing may be appended.
        """
        assert not self._is_done, "the text has already been stopped"
        if len(self._children) == 1:
            return text, None
        state = self._state
        for index, char in enumerate(text):
            while state and char not in self._children[state]:
                state = self._fallback[state]
            state = self._children[state].get(char, 0)
            stop = self._matched[state]
            if stop is not None:
                self._is_done = True
                seen = self._held + text[: index + 1]
                self._held = ""
                return (seen if self._include_stop_str else seen[: -len(stop)]), stop
        self._state = state
        seen = self._held + text
        num_free = len(seen) - self._depth[state]
        self._held = seen[num_free:]
        return seen[:num_free], None

    def flush(self) -> str:
        """The text still held back, once it is known that nothing more will come."""
        held, self._held, self._state = self._held, "", 0
        return held


def _automaton(
    stops: Sequence[str],
) -> tuple[list[dict[str, int]], list[int], list[int], list[str | None]]:
    """Per state: its children, its fallback, its depth, and the longest stop that ends in it."""
    children: list[dict[str, int]] = [{}]
    depth = [0]
    matched: list[str | None] = [None]
    for stop in stops:
        state = 0
        for char in stop:
            if char not in children[state]:
                children[state][char] = len(children)
                children.append({})
                depth.append(depth[state] + 1)
                matched.append(None)
            state = children[state][char]
        matched[state] = stop
    fallback = [0] * len(children)
    queue = deque(children[0].values())
    while queue:  # breadth first: a state's fallback is less deep, hence already complete
        state = queue.popleft()
        for char, child in children[state].items():
            other = fallback[state]
            while other and char not in children[other]:
                other = fallback[other]
            fallback[child] = children[other].get(char, 0)
            if matched[child] is None:  # else its own string, which is the longer one
                matched[child] = matched[fallback[child]]
            queue.append(child)
    return children, fallback, depth, matched
