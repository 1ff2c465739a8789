"""Latency histograms out of a /metrics page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

# One sample of a histogram's buckets: name_bucket{labels,le="0.5",labels} 12
_BUCKET = re.compile(r'^(\w+)_bucket\{[^}]*?le="([^"]+)"[^}]*\} (\S+)', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram: how many values were at most each bound."""

    counts: Mapping[float, float]  # bound -> values up to it, bounds rising, the last infinite

    @property
    def total(self) -> float:
        return max(self.counts.values(), default=0.0)

    def since(self, earlier: Buckets | None) -> Buckets:
        """The values that came after `earlier`; all, if that belongs to another server's life."""
        if earlier is None or earlier.total > self.total:
            return self
        before = earlier.counts
        return Buckets({bound: n - before.get(bound, 0.0) for bound, n in self.counts.items()})

    def percentile(self, share: float) -> float:
        """The value below which `share` of the values lie; NaN if there are none.

        Within a bucket they are taken to be spread evenly. Beyond the last finite bound nothing is
        known but that: infinity.
        """
        wanted = share * self.total
        if not self.total:
            return math.nan
        low, below = 0.0, 0.0
        for bound, count in self.counts.items():
            if count >= wanted and count > below:
                if math.isinf(bound):
                    return math.inf
                return low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return math.inf


Metrics = Mapping[str, Buckets]
"""By the metric's name, without the unit and the suffix: "furiosa_llm_time_to_first_token"."""


def read_histograms(page: str) -> Metrics:
    """All histograms of a page in Prometheus' text format, their labels summed up."""
    found: dict[str, dict[float, float]] = {}
    for name, bound, count in _BUCKET.findall(page):
        try:
            key, value = float(bound), float(count)
        except ValueError:
            continue  # a page that is not ours
        counts = found.setdefault(name.removesuffix("_seconds"), {})
        counts[key] = counts.get(key, 0.0) + value
    return {name: Buckets(dict(sorted(counts.items()))) for name, counts in found.items()}
