"""How the prefill chunks of one step share its token budget. Pure functions over plain numbers.

A candidate is a sequence with `wanted` prefill tokens left, given in the order it is to be served
by. Both packings use the budget up as far as there is anything to use it for, and split at most
one candidate that comes first in their order, so that a budget never goes to many half-prompts.

- IDENTITY serves the order as it stands: the first candidate entirely, then the next.
- GREEDY serves first what fits entirely, largest first (best-fit decreasing), so that more prompts
  end within the step and yield their first token; what is left goes to the earliest that got
  nothing. A candidate that was passed over `MAX_BYPASSES` times in a row goes before all that were
  not, in order, so a long prompt waits a bounded number of steps behind short ones.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_BYPASSES = 8
"""Steps in a row that GREEDY may prefer later candidates to one and the same."""


def pack_identity(wanted: Sequence[int], budget: int) -> list[int]:
    """Tokens for each candidate, in order, until the budget is used up."""
    chunks: list[int] = []
    for num_wanted in wanted:
        chunks.append(min(num_wanted, budget))
        budget -= chunks[-1]
    return chunks


def pack_greedy(wanted: Sequence[int], num_bypassed: Sequence[int], budget: int) -> list[int]:
    """Tokens for each candidate: overdue ones in order, then best fit, then the earliest left."""
    chunks = [0] * len(wanted)
    for index, num_wanted in enumerate(wanted):
        if num_bypassed[index] >= MAX_BYPASSES:
            chunks[index] = min(num_wanted, budget)
            budget -= chunks[index]
    rest = [index for index in range(len(wanted)) if chunks[index] == 0]
    for index in sorted(rest, key=lambda index: -wanted[index]):  # stable: ties in order
        if wanted[index] <= budget:
            chunks[index] = wanted[index]
            budget -= wanted[index]
    for index in rest:
        if chunks[index] == 0:
            chunks[index] = min(wanted[index], budget)
            budget -= chunks[index]
    return chunks
