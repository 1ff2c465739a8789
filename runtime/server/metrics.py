"""What the front-end counts of requests while it serves them.

The hooks are on the path of every chunk, so they only add to plain numbers; `metrics_page.py` turns
these into Prometheus' format when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from furiosa_llm.histogram import Histogram
from furiosa_llm.server.loop_lag import LoopLag
from furiosa_llm.server.metrics_hooks import MetricsHooks

TOKEN_BOUNDS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
CHOICE_BOUNDS = tuple(2**e for e in range(11))
SHORT_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
LONG_BOUNDS_S = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0,
    7.5, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0,
)  # fmt: skip

OTHER = "other"
MAX_REASONS = 64
"""Refusals name one of our own error codes; should one ever come from outside, it ends here."""


class Metrics(MetricsHooks):
    """Counters and histograms since the process began. One event loop writes and reads them."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_aborted = 0
        self.num_by_finish_reason: Counter[str] = Counter(stop=0, length=0)
        self.num_by_endpoint: Counter[str] = Counter()
        self.num_by_refusal: Counter[str] = Counter()
        self.prompt_tokens = Histogram(TOKEN_BOUNDS)
        self.generation_tokens = Histogram(TOKEN_BOUNDS)
        self.params_n = Histogram(CHOICE_BOUNDS)
        self.params_max_tokens = Histogram(TOKEN_BOUNDS)
        self.first_token_s = Histogram(LONG_BOUNDS_S)
        self.inter_token_s = Histogram(SHORT_BOUNDS_S)
        self.request_s = Histogram(LONG_BOUNDS_S)
        self.loop_lag = LoopLag()

    def request_started(self, *, endpoint: str, num_choices: int, max_tokens: int | None) -> None:
        self.num_by_endpoint[endpoint] += 1
        self.params_n.add(num_choices)
        if max_tokens is not None:
            self.params_max_tokens.add(max_tokens)
        self.loop_lag.note()

    def first_token(self, *, seconds: float | None, num_prompt_tokens: int, count: int = 1) -> None:
        if seconds is not None:
            self.first_token_s.add(seconds)
        self.num_prompt_tokens += num_prompt_tokens
        self.num_generation_tokens += count

    def tokens(self, *, count: int, seconds: float) -> None:
        self.num_generation_tokens += count
        self.inter_token_s.add(seconds / count, count)
        self.loop_lag.note()

    def finished(
        self,
        *,
        reasons: Sequence[str],
        num_prompt_tokens: int,
        num_tokens: int,
        seconds: float,
    ) -> None:
        self.num_by_finish_reason.update(reasons)
        self.prompt_tokens.add(num_prompt_tokens)
        self.generation_tokens.add(num_tokens)
        self.request_s.add(seconds)

    def aborted(self, *, num_tokens: int) -> None:
        self.num_aborted += 1

    def refused(self, *, status: int, reason: str) -> None:
        known = self.num_by_refusal
        self.num_by_refusal[reason if reason in known or len(known) < MAX_REASONS else OTHER] += 1
