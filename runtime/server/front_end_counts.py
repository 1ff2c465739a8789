"""What one front-end process has counted of its requests; those of several add up.

Plain values, so that they travel between processes as JSON.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from furiosa_llm.engine.counts import EngineCounts
from furiosa_llm.histogram import HistogramCounts
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.service import Service


@dataclass(frozen=True, slots=True)
class FrontEndCounts:
    """At one moment. All but `num_in_flight` and `num_waiting`, which are as of now, only grow.

    Attributes:
        num_waiting: sequences that no worker has room for.
        totals: by metric.
        by_label: by metric, then by the value of its label.
        histograms: by metric.
    """

    num_in_flight: int
    num_waiting: int
    totals: dict[str, int]
    by_label: dict[str, dict[str, int]]
    histograms: dict[str, HistogramCounts]

    def __add__(self, other: FrontEndCounts) -> FrontEndCounts:
        """Both together."""
        histograms = dict(self.histograms)
        for name, counts in other.histograms.items():
            histograms[name] = histograms[name] + counts if name in histograms else counts
        return FrontEndCounts(
            num_in_flight=self.num_in_flight + other.num_in_flight,
            num_waiting=self.num_waiting + other.num_waiting,
            totals=_sum(self.totals, other.totals),
            by_label={
                name: _sum(self.by_label.get(name, {}), other.by_label.get(name, {}))
                for name in {**self.by_label, **other.by_label}
            },
            histograms=histograms,
        )

    def ended(self) -> FrontEndCounts:
        """What is left of it when its process serves no more: nothing is in flight there."""
        return FrontEndCounts(0, 0, self.totals, self.by_label, self.histograms)


NO_COUNTS = FrontEndCounts(0, 0, {}, {}, {})


def counts_of(service: Service) -> FrontEndCounts:
    """Those of this process."""
    # Where somebody else listens to the service, what the engine says is still shown.
    metrics = service.metrics if isinstance(service.metrics, Metrics) else Metrics()
    running = service.engine_or_none
    engine = EngineCounts(0) if running is None else running.counts
    return FrontEndCounts(
        num_in_flight=service.num_in_flight,
        num_waiting=0 if running is None else running.status().num_waiting,
        totals={
            "prompt_tokens": metrics.num_prompt_tokens,
            "generation_tokens": metrics.num_generation_tokens,
            "abort": metrics.num_aborted,
        },
        by_label={
            "request_success": dict(metrics.num_by_finish_reason),
            "requests_rejected": dict(metrics.num_by_refusal),
            "requests_received": dict(metrics.num_by_endpoint),
            "requests_migrated": dict(engine.num_migrated),
        },
        histograms={
            "request_prompt_tokens": metrics.prompt_tokens.counts(),
            "request_generation_tokens": metrics.generation_tokens.counts(),
            "request_params_n": metrics.params_n.counts(),
            "request_params_max_tokens": metrics.params_max_tokens.counts(),
            "queue_time_seconds": engine.queue_s.counts(),
            "time_to_first_token_seconds": metrics.first_token_s.counts(),
            "inter_token_latency_seconds": metrics.inter_token_s.counts(),
            "e2e_request_latency_seconds": metrics.request_s.counts(),
            "loop_lag_seconds": metrics.loop_lag.seconds.counts(),
        },
    )


def _sum(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    # Not `+` of Counters: that leaves out what is zero, and a metric that is 0 is to be seen.
    found = Counter(left)
    found.update(right)
    return dict(found)
