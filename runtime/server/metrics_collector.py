"""What a scrape finds: the front-end's counts and the workers' state, as Prometheus families.

Names are Furiosa-LLM's where it has them, so that its dashboards work, and ours begin alike. The
label `engine` is a worker's id, or "frontend" for what is seen of requests, which may move from
worker to worker. No label ever holds what a caller chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.status import WorkerStatus
from furiosa_llm.histogram import HistogramCounts
from furiosa_llm.server.front_end_counts import FrontEndCounts, counts_of
from furiosa_llm.server.service import Service, ServiceState

PREFIX = "furiosa_llm_"
FRONT_END = "frontend"

Labels = dict[str, str]
Samples = Iterable[tuple[Labels, float]]

_OF_WORKERS: tuple[tuple[str, str, str, Callable[[WorkerStatus], float | None]], ...] = (
    ("gauge", "num_requests_running", "Sequences that hold KV blocks.", lambda w: w.num_running),
    (
        "gauge", "kv_cache_usage_percent", "Share of the KV blocks that is in use, 0 to 1.",
        lambda w: _num_used_blocks(w) / w.num_blocks,
    ),
    ("gauge", "worker_up", "1 if the worker takes requests.", lambda w: w.is_up),
    ("gauge", "worker_epoch", "Processes that the worker has had.", lambda w: w.epoch),
    (
        "gauge", "worker_heartbeat_age_seconds",
        "Since the worker last said anything; an idle one is silent.", lambda w: w.last_message_s,
    ),
    ("counter", "worker_steps", "Forward steps.", lambda w: w.num_steps),
    (
        "counter", "worker_computed_tokens",
        "Tokens through the model, of prompts and answers; recomputed ones once more.",
        lambda w: w.num_computed_tokens,
    ),
    ("counter", "worker_output_tokens", "Tokens made.", lambda w: w.num_output_tokens),
    (
        "counter", "worker_preemptions", "Sequences that had to make room for an older one.",
        lambda w: w.num_preemptions,
    ),
)  # fmt: skip
"""(type, name, help, value); no sample where the value is None."""


_HISTOGRAMS = {
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens made for a request.",
    "request_params_n": "Choices that a request asked for.",
    "request_params_max_tokens": "max_tokens, where given.",
    "queue_time_seconds": "From a sequence's arrival until its first step began.",
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between a request's tokens.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "loop_lag_seconds": "How late the event loop runs what is due, while it is busy.",
}
_TOTALS = {
    "prompt_tokens": "Prompt tokens of requests that got a token.",
    "generation_tokens": "Tokens made for callers.",
    "abort": "Requests whose client left before the end.",
}
_BY_LABEL = {
    "request_success": ("finished_reason", "Choices that ended, by why."),
    "requests_rejected": ("reason", "Requests answered by an error, by its code."),
    "requests_received": ("endpoint", "Requests that went to the engine."),
    "requests_migrated": (
        "reason", "Requests that went on elsewhere, since their worker died or was reloaded.",
    ),
}  # fmt: skip
"""Of `FrontEndCounts`: what each of its metrics means, and what its label is called."""


class MetricsCollector(Collector):
    """Of one service; every scrape asks it anew.

    Args:
        build_info: labels of build_info, the version and such.
    """

    def __init__(self, service: Service, build_info: Mapping[str, str]) -> None:
        self._service = service
        self._build_info = dict(build_info)
        self._counts: FrontEndCounts | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self, counts: FrontEndCounts | None = None) -> bytes:
        """Everything, in version 0.0.4 of the text format.

        Args:
            counts: of all front-ends; None: this process is the only one.
        """
        self._counts = counts
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would collect everything at registration otherwise."""
        return ()

    def collect(self) -> Iterator[Metric]:
        counts = counts_of(self._service) if self._counts is None else self._counts
        yield from self._of_service()
        yield from self._of_front_ends(counts)
        engine = self._service.engine_or_none
        if engine is not None:
            yield from self._of_engine(engine, counts.num_waiting)

    def _of_service(self) -> Iterator[Metric]:
        yield _family("gauge", "build_info", "What runs; always 1.", [(self._build_info, 1)])
        now = self._service.state
        states: Samples = [({"state": s.value}, s is now) for s in ServiceState]
        yield _family("gauge", "server_state", "1 for the state that the server is in.", states)

    def _of_front_ends(self, counts: FrontEndCounts) -> Iterator[Metric]:
        at = self._labels()
        in_flight = [(at, counts.num_in_flight)]
        yield _family("gauge", "requests_in_flight", "Requests being served.", in_flight)
        for name, help in _HISTOGRAMS.items():
            yield _histogram_family(name, help, [(at, counts.histograms[name])])
        for name, help in _TOTALS.items():
            yield _family("counter", name, help, [(at, counts.totals[name])])
        for name, (label, help) in _BY_LABEL.items():
            values = counts.by_label[name].items()
            yield _family("counter", name, help, [(at | {label: key}, n) for key, n in values])

    def _of_engine(self, engine: AsyncLLMEngine, num_waiting: int) -> Iterator[Metric]:
        status = engine.status()
        workers = [(self._labels(str(worker.worker_id)), worker) for worker in status.workers]
        for kind, name, help, value_of in _OF_WORKERS:
            values = ((labels, value_of(worker)) for labels, worker in workers)
            known = [(labels, value) for labels, value in values if value is not None]
            yield _family(kind, name, help, known)
        steps = zip(workers, engine.counts.step_s, strict=True)
        steps_s = [(labels, histogram.counts()) for (labels, _), histogram in steps]
        yield _histogram_family("step_seconds", "How long the kernels take for a step.", steps_s)
        yield _family(
            "gauge", "num_requests_waiting",
            "Sequences without KV blocks: at a worker, or in the front-end for want of one.",
            [(self._labels(), num_waiting)] + [(at, w.num_waiting) for at, w in workers],
        )  # fmt: skip
        blocks: list[tuple[Labels, float]] = []
        restarts: list[tuple[Labels, float]] = []
        for labels, worker in workers:
            blocks.append((labels | {"state": "used"}, _num_used_blocks(worker)))
            blocks.append((labels | {"state": "free"}, worker.num_free_blocks))
            restarts += [(labels | {"reason": why}, count) for why, count in worker.restarts]
        for name in ("prefix_cache_queries", "prefix_cache_hits"):
            # Untyped: a counter would be called ..._total, and dashboards know these without.
            help = "Of prompt tokens; always 0, since this version keeps no prefix cache."
            yield _family("unknown", name, help, [(self._labels(), 0)])
        yield _family("gauge", "kv_blocks", "KV blocks, by state.", blocks)
        yield _family("counter", "worker_restarts", "Processes that ended, by why.", restarts)

    def _labels(self, engine: str = FRONT_END) -> Labels:
        return {"model_name": self._service.model_name, "engine": engine}


def _num_used_blocks(worker: WorkerStatus) -> int:
    return worker.num_blocks - worker.num_free_blocks if worker.is_up else 0


def _family(kind: str, name: str, help: str, samples: Samples) -> Metric:
    metric = Metric(PREFIX + name, help, kind)
    suffix = "_total" if kind == "counter" else ""
    for labels, value in samples:
        metric.add_sample(metric.name + suffix, labels, float(value))
    return metric


def _histogram_family(
    name: str, help: str, histograms: Iterable[tuple[Labels, HistogramCounts]]
) -> Metric:
    metric = Metric(PREFIX + name, help, "histogram")
    for labels, histogram in histograms:
        for bound, count in histogram.cumulative():
            metric.add_sample(metric.name + "_bucket", labels | {"le": bound}, count)
        metric.add_sample(metric.name + "_count", labels, histogram.count)
        metric.add_sample(metric.name + "_sum", labels, histogram.sum)
    return metric
