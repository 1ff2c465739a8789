"""The figures of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from furiosa_llm.loadgen.record import Record

NUM_WINDOWS = 10


@dataclass(frozen=True, slots=True)
class Latency:
    """How a latency is distributed, in seconds; all NaN if it never occurred."""

    num: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Latency:
        if not values_s:
            return cls(0, *[math.nan] * 5)
        ordered = sorted(values_s)
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated between two of them."""
    assert ordered
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Window:
    """One of the equal pieces of a run's time: a server that grows slower shows here."""

    begin_s: float  # since the run's begin
    requests_per_s: float  # those that ended in it
    tokens_per_s: float  # of those requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to. Latencies and rates count only requests that went well."""

    num_requests: int
    num_ok: int
    errors: dict[str, int]  # kind -> how many, most frequent first
    error_details: dict[str, str]  # kind -> the words of its first one
    elapsed_s: float  # from the first due time to the last answer's end
    num_prompt_tokens: int
    num_output_tokens: int
    num_short: int  # answers with fewer tokens than asked for
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Latency  # due time to the first piece
    itl: Latency  # between pieces
    tpot: Latency  # per request: time per output token after the first
    e2e: Latency  # due time to the answer's end
    send_lag: Latency  # due time to sending: large where the client could not keep up
    windows: list[Window]
    client_cpu_s: float

    @classmethod
    def of(
        cls, records: Sequence[Record], *, wanted_tokens: int, client_cpu_s: float = 0.0
    ) -> Summary:
        """Sum up the requests that have ended; others, of a run cut short, are left out.

        Args:
            wanted_tokens: how many each answer should have.
        """
        ended = [r for r in records if r.end_s > 0]
        ok = [r for r in ended if r.is_ok]
        begin_s = min((r.due_s for r in ended), default=0.0)
        elapsed_s = max((r.end_s for r in ended), default=0.0) - begin_s
        num_output = sum(r.num_output_tokens for r in ok)
        num_prompt = sum(r.num_prompt_tokens or 0 for r in ok)
        errors = Counter(r.error for r in ended if r.error is not None)
        return cls(
            num_requests=len(ended),
            num_ok=len(ok),
            errors=dict(errors.most_common()),
            error_details={r.error: r.detail for r in reversed(ended) if r.error is not None},
            elapsed_s=elapsed_s,
            num_prompt_tokens=num_prompt,
            num_output_tokens=num_output,
            num_short=sum(r.num_output_tokens < wanted_tokens for r in ok),
            requests_per_s=_rate(len(ok), elapsed_s),
            output_tokens_per_s=_rate(num_output, elapsed_s),
            total_tokens_per_s=_rate(num_prompt + num_output, elapsed_s),
            ttft=Latency.of([r.token_s[0] - r.due_s for r in ok if r.token_s]),
            itl=Latency.of([b - a for r in ok for a, b in pairwise(r.token_s)]),
            tpot=Latency.of(
                [
                    (r.token_s[-1] - r.token_s[0]) / (r.num_output_tokens - 1)
                    for r in ok
                    if r.token_s and r.num_output_tokens > 1
                ]
            ),
            e2e=Latency.of([r.end_s - r.due_s for r in ok]),
            send_lag=Latency.of([r.sent_s - r.due_s for r in ended if r.sent_s]),
            windows=_windows(ok, begin_s, elapsed_s),
            client_cpu_s=client_cpu_s,
        )


def _rate(count: int, elapsed_s: float) -> float:
    return count / elapsed_s if elapsed_s > 0 else 0.0


def _windows(ok: Sequence[Record], begin_s: float, elapsed_s: float) -> list[Window]:
    width_s = elapsed_s / NUM_WINDOWS
    if width_s <= 0:
        return []
    requests, tokens = [0] * NUM_WINDOWS, [0] * NUM_WINDOWS
    for record in ok:
        index = min(int((record.end_s - begin_s) / width_s), NUM_WINDOWS - 1)
        requests[index] += 1
        tokens[index] += record.num_output_tokens
    return [
        Window(index * width_s, requests[index] / width_s, tokens[index] / width_s)
        for index in range(NUM_WINDOWS)
    ]
