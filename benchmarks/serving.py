"""What serving benchmarks have in common: loads, and tables of two servers side by side."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from servers import RunningServer, bench

LEVELS = (1, 4, 16, 64)
NUM_REQUESTS = {1: 8, 4: 16, 16: 48, 64: 128}
INPUT_LEN = OUTPUT_LEN = 128
ONE_TOKEN_CALLERS = 64
IDLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is asked; smaller for a trial."""

    input_len: int = INPUT_LEN
    output_len: int = OUTPUT_LEN
    share: float = 1.0  # of NUM_REQUESTS and of the time for one-token requests
    one_token_s: float = 20.0

    def num_requests(self, level: int) -> int:
        return max(level, round(NUM_REQUESTS[level] * self.share))


def load_level(server: RunningServer, level: int, shape: Shape, *, seed: int) -> Any:
    """`level` callers at once, each of which asks again when it has its answer."""
    return bench(
        server,
        *("--concurrency", level, "--num-requests", shape.num_requests(level)),
        *("--input-len", shape.input_len, "--output-len", shape.output_len, "--seed", seed),
    )


def load_one_token(server: RunningServer, shape: Shape, *, seed: int) -> Any:
    """Requests of 5 tokens in and 1 out; the windows tell whether they grow slower."""
    return bench(
        server,
        *("--concurrency", ONE_TOKEN_CALLERS, "--duration", shape.one_token_s * shape.share),
        *("--input-len", 5, "--output-len", 1, "--no-stream", "--seed", seed),
    )


def look_at(server: RunningServer, level: int, shape: Shape, *, seed: int) -> Any:
    """One start of a server: the time to its first token, a load, memory, and idleness after it."""
    first_token_s = server.wait_for_first_token()
    pss_at_start = server.pss_bytes()
    results = load_level(server, level, shape, seed=seed)
    return {
        "first_token_s": first_token_s,
        "pss_at_start": pss_at_start,
        "load": results,
        "pss_after_load": server.pss_bytes(),
        "idle_cpu": server.idle_cpu(IDLE_S * shape.share) if level == max(LEVELS) else None,
    }


def middle(values: list[float]) -> float:
    return statistics.median(values)


def throughputs(runs: list[Any]) -> list[float]:
    return [run["load"]["output_tokens_per_s"] for run in runs]


def latency_cells(runs: list[Any]) -> list[str]:
    """TTFT and ITL, p50 and p99, in milliseconds: the medians of the runs."""
    cells = []
    for kind in ("ttft", "itl"):
        for share in ("p50", "p99"):
            values = [run["load"][kind][share] for run in runs]
            cells.append("–" if None in values else f"{1000 * middle(values):.0f}")
    return cells


LEVEL_HEADER = [
    "clients", "server", "tokens/s", "slowest – fastest", "ratio", "TTFT p50, ms", "p99",
    "ITL p50, ms", "p99",
]  # fmt: skip


def level_rows(level: int, runs_of: dict[str, list[Any]]) -> list[list[str]]:
    """A row per server; the ratio is the first one's throughput over this one's."""
    first = middle(throughputs(next(iter(runs_of.values()))))
    rows = []
    for name, runs in runs_of.items():
        rates = throughputs(runs)
        rows.append(
            [
                str(level),
                name,
                f"{middle(rates):.1f}",
                f"{min(rates):.1f} – {max(rates):.1f}",
                f"{first / middle(rates):.2f}",
                *latency_cells(runs),
            ]
        )
    return rows


ONE_TOKEN_HEADER = [
    "5 in, 1 out, 64 clients", "requests/s", "slowest – fastest", "ratio", "first third",
    "last third", "p50, ms", "p99",
]  # fmt: skip


def one_token_rows(runs_of: dict[str, list[Any]]) -> list[list[str]]:
    first = middle([run["requests_per_s"] for run in next(iter(runs_of.values()))])
    rows = []
    for name, runs in runs_of.items():
        rates = [run["requests_per_s"] for run in runs]
        thirds = [_thirds(run["windows"]) for run in runs]
        rows.append(
            [
                name,
                f"{middle(rates):.1f}",
                f"{min(rates):.1f} – {max(rates):.1f}",
                f"{first / middle(rates):.2f}",
                f"{middle([begin for begin, _ in thirds]):.1f}",
                f"{middle([end for _, end in thirds]):.1f}",
                *(
                    f"{1000 * middle([run['e2e'][share] for run in runs]):.0f}"
                    for share in ("p50", "p99")
                ),
            ]
        )
    return rows


def _thirds(windows: list[dict[str, float]]) -> tuple[float, float]:
    """Requests/s in the first and in the last third of the run, without its very begin and end."""
    rates = [window["requests_per_s"] for window in windows[1:-1]]
    count = max(1, len(rates) // 3)
    return statistics.mean(rates[:count]), statistics.mean(rates[-count:])


PROCESS_HEADER = [
    "process", "start to first token, s", "least – most", "PSS at start, MiB",
    "after the load", "idle CPU, % of a core",
]  # fmt: skip


def process_rows(runs_of: dict[str, list[Any]]) -> list[list[str]]:
    rows = []
    for name, runs in runs_of.items():
        starts = [run["first_token_s"] for run in runs]
        idle = [run["idle_cpu"] for run in runs if run["idle_cpu"] is not None]
        rows.append(
            [
                name,
                f"{middle(starts):.2f}",
                f"{min(starts):.2f} – {max(starts):.2f}",
                f"{middle([run['pss_at_start'] for run in runs]) / 2**20:.0f}",
                f"{middle([run['pss_after_load'] for run in runs]) / 2**20:.0f}",
                f"{100 * middle(idle):.2f}" if idle else "–",
            ]
        )
    return rows
