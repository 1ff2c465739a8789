"""A frame of `furiosa-serve top`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from furiosa_llm.top.history import History
from furiosa_llm.top.reading import Reading, WorkerReading

if TYPE_CHECKING:
    from rich.console import RenderableType

_LATENCIES = (
    ("time to first token", "furiosa_llm_time_to_first_token"),
    ("inter-token latency", "furiosa_llm_inter_token_latency"),
    ("end to end", "furiosa_llm_e2e_request_latency"),
)
_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "failed": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 8
_SPARK_WIDTH = 30


def frame(history: History, *, problem: str | None = None) -> RenderableType:
    """What is shown of the readings so far.

    Args:
        problem: why there is no newer reading, if that is so.
    """
    last = history.last
    parts: list[RenderableType] = [_head(last)]
    if problem is not None:
        parts.append(Text(f"out of date: {problem}", style="red"))
    if last.failure:
        parts.append(Text(last.failure, style="red"))
    parts += [_rates(history), _latencies(history), _workers(history)]
    return Group(*parts)


def _head(last: Reading) -> Text:
    head = Text()
    head.append(last.model or "no model yet", style="bold")
    for word in (last.weights, last.isa):
        head.append(f" {word}" if word else "")
    head.append("  ")
    head.append(last.state, style=_STATE_STYLES.get(last.state, ""))
    if last.state == "starting" and last.phase:
        head.append(f" ({last.phase})")
    head.append(f"  up {_duration(last.uptime_s)}  {last.where}")
    return head


def _rates(history: History) -> Table:
    last = history.last
    running = sum(worker.num_running for worker in last.workers)
    waiting = last.num_waiting + sum(worker.num_waiting for worker in last.workers)
    tokens = history.rates(_output_tokens)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "requests", f"{last.num_in_flight} in flight; sequences {running} running, "
        f"{waiting} waiting"
    )  # fmt: skip
    grid.add_row(
        "tokens/s", f"{_shown(tokens[-1] if tokens else None)} out, "
        f"{_shown(history.rate(_computed_tokens))} computed  {_spark(tokens)}"
    )  # fmt: skip
    return grid


def _latencies(history: History) -> RenderableType:
    if history.last.metrics is None:
        return Text("latencies: /metrics cannot be read (see --api-key-file)", style="dim")
    period = f"last {history.span_s:.0f} s" if history.span_s else "since its start"
    table = Table(f"ms, {period}", box=None, header_style="dim")
    for name in ("p50", "p90", "p99", "count"):
        table.add_column(name, justify="right")
    for title, name in _LATENCIES:
        buckets = history.latency(name)
        if buckets is not None:
            shares = [_milliseconds(buckets.percentile(share)) for share in (0.5, 0.9, 0.99)]
            table.add_row(title, *shares, f"{buckets.total:.0f}")
    return table


def _workers(history: History) -> Table:
    # 80 columns hold it, with short headings.
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("id")
    table.add_column("devices", no_wrap=True)
    table.add_column("state")
    for name in ("run", "wait"):
        table.add_column(name, justify="right")
    table.add_column("KV blocks", no_wrap=True)
    for name in ("out/s", "comp/s", "step/s", "preempt", "restart"):
        table.add_column(name, justify="right")
    for worker in history.last.workers:
        counts = (_of_output, _of_computed, _of_steps)
        table.add_row(
            str(worker.worker_id),
            Text(worker.devices),
            Text(worker.phase, style=_STATE_STYLES.get(worker.phase, "red")),
            str(worker.num_running),
            str(worker.num_waiting),
            _bar(worker.num_used_blocks, worker.num_blocks),
            *(_shown(history.worker_rate(worker.worker_id, count)) for count in counts),
            str(worker.num_preemptions),
            str(worker.num_restarts),
        )
    return table


def _of_output(worker: WorkerReading) -> int:
    return worker.num_output_tokens


def _of_computed(worker: WorkerReading) -> int:
    return worker.num_computed_tokens


def _of_steps(worker: WorkerReading) -> int:
    return worker.num_steps


def _output_tokens(reading: Reading) -> int:
    return sum(worker.num_output_tokens for worker in reading.workers)


def _computed_tokens(reading: Reading) -> int:
    return sum(worker.num_computed_tokens for worker in reading.workers)


def _shown(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    return "beyond" if math.isinf(seconds) else f"{1000 * seconds:.1f}"


def _bar(used: int, total: int) -> Text:
    if not total:
        return Text("–")
    share = used / total
    filled = min(_BAR_WIDTH, math.ceil(share * _BAR_WIDTH))
    bar = Text("█" * filled, style="red" if share > 0.9 else "green")
    bar.append("░" * (_BAR_WIDTH - filled), style="dim")
    bar.append(f"{math.ceil(100 * share):4d}%")
    return bar


def _spark(values: Sequence[float]) -> str:
    """The newest values as bars, the highest of them full."""
    newest = values[-_SPARK_WIDTH:]
    top = max(newest, default=0.0)
    if not top:
        return ""
    return "".join(_BARS[min(len(_BARS) - 1, int(v / top * len(_BARS)))] for v in newest)


def _duration(seconds: float) -> str:
    minutes, left_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left_s} s" if minutes else f"{left_s} s"
