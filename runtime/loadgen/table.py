"""A run's figures for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from furiosa_llm.loadgen.summary import Latency, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

# A client that sends this much too late, or is this busy, no longer measures the server alone.
MAX_SEND_LAG_S = 0.01
MAX_CLIENT_LOAD = 0.8


def render(summary: Summary) -> RenderableType:
    """Counts and rates, latencies, errors, and what makes the figures doubtful."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rates = Table.grid(padding=(0, 2))
    rates.add_column(style="bold")
    for name, value in _rates(summary):
        rates.add_row(name, value)
    latencies = Table("milliseconds", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("mean", "p50", "p90", "p99", "max"):
        latencies.add_column(name, justify="right")
    for name, latency in (
        ("time to first token", summary.ttft),
        ("inter-token latency", summary.itl),
        ("time per output token", summary.tpot),
        ("end to end", summary.e2e),
    ):
        latencies.add_row(name, *_milliseconds(latency))
    parts: list[RenderableType] = [rates, latencies]
    if summary.errors:
        errors = Table(
            "error", "requests", "the first one's words", box=SIMPLE_HEAD, pad_edge=False
        )
        for kind, count in summary.errors.items():
            errors.add_row(Text(kind), str(count), Text(summary.error_details[kind]))
        parts.append(errors)
    parts += [Text(f"note: {doubt}", style="yellow") for doubt in doubts(summary)]
    return Group(*parts)


def doubts(summary: Summary) -> list[str]:
    """What a reader of the figures must know before trusting them."""
    found = []
    if summary.num_short:
        found.append(
            f"{summary.num_short} answers have fewer tokens than asked for: does the server know "
            "ignore_eos, and does the answer fit its context?"
        )
    if summary.send_lag.num and summary.send_lag.p99 > MAX_SEND_LAG_S:
        found.append(
            f"1 % of the requests were sent {1000 * summary.send_lag.p99:.0f} ms late or later: "
            "this client was too busy, or this machine was"
        )
    if summary.elapsed_s and summary.client_cpu_s / summary.elapsed_s > MAX_CLIENT_LOAD:
        found.append(
            f"this client used {100 * summary.client_cpu_s / summary.elapsed_s:.0f} % of a core: "
            "it may be what limits the figures"
        )
    return found


def _rates(summary: Summary) -> list[tuple[str, str]]:
    failed = summary.num_requests - summary.num_ok
    return [
        ("requests", f"{summary.num_ok} answered, {failed} failed in {summary.elapsed_s:.2f} s"),
        ("requests/s", f"{summary.requests_per_s:.2f}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:.1f}"),
        ("all tokens/s", f"{summary.total_tokens_per_s:.1f}"),
        (
            "tokens",
            f"{_mean(summary.num_prompt_tokens, summary.num_ok)} in, "
            f"{_mean(summary.num_output_tokens, summary.num_ok)} out per request",
        ),
    ]


def _mean(total: int, count: int) -> str:
    return f"{total / count:.1f}" if count else "–"


def _milliseconds(latency: Latency) -> list[str]:
    values = (latency.mean, latency.p50, latency.p90, latency.p99, latency.max)
    return ["–" if math.isnan(v) else f"{1000 * v:.2f}" for v in values]
