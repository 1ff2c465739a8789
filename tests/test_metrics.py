"""/metrics: the names that dashboards know, right numbers, and nothing that idles at a cost."""

import asyncio
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import tiny_artifact

from furiosa_llm.args import AsyncEngineArgs
from furiosa_llm.errors import WorkerStartError
from furiosa_llm.server.histogram import Histogram
from furiosa_llm.server.loop_lag import NUM_QUIET_TICKS, LoopLag
from furiosa_llm.server.metrics import MAX_REASONS, OTHER, Metrics
from furiosa_llm.server.metrics_collector import MetricsCollector
from furiosa_llm.server.service import Service

# Furiosa-LLM's names, as they stand in its dashboards' queries.
KEPT_NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_percent": "gauge",
    "prefix_cache_hits": "untyped",
    "prefix_cache_queries": "untyped",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "request_success_total": "counter",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
}
OUR_NAMES = {
    "worker_up": "gauge",
    "worker_epoch": "gauge",
    "worker_restarts_total": "counter",
    "worker_heartbeat_age_seconds": "gauge",
    "worker_steps_total": "counter",
    "worker_computed_tokens_total": "counter",
    "worker_output_tokens_total": "counter",
    "worker_preemptions_total": "counter",
    "requests_received_total": "counter",
    "requests_rejected_total": "counter",
    "requests_in_flight": "gauge",
    "abort_total": "counter",
    "loop_lag_seconds": "histogram",
    "kv_blocks": "gauge",
    "server_state": "gauge",
    "build_info": "gauge",
}


def service(metrics, model="/models/tiny", **options):
    return Service(AsyncEngineArgs(model=str(model)), metrics=metrics, **options)


def types_in(text):
    lines = [line.split() for line in text.splitlines() if line.startswith("# TYPE furiosa_llm_")]
    return {name.removeprefix("furiosa_llm_"): kind for _, _, name, kind in lines}


def samples_in(text):
    """{(name, its labels without the model's name, as text): value}"""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            shown = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            found[sample.name.removeprefix("furiosa_llm_"), shown] = sample.value
    return found


def text_of(metrics, **options):
    collector = MetricsCollector(service(metrics, **options), metrics, {"version": "1.2.3"})
    return collector.text().decode()


async def test_a_starting_server_has_all_that_the_front_end_knows():
    text = text_of(Metrics())
    samples = samples_in(text)
    assert samples["server_state", "state=starting"] == 1
    assert samples["server_state", "state=ready"] == 0
    assert samples["build_info", "version=1.2.3"] == 1
    assert samples["generation_tokens_total", "engine=frontend"] == 0
    assert 'model_name="tiny"' in text
    assert "worker_up" not in types_in(text)


async def test_a_request_is_counted_from_its_start_to_its_end():
    metrics = Metrics()
    metrics.request_started(endpoint="/v1/completions", num_choices=2, max_tokens=30)
    metrics.first_token(seconds=0.25, num_prompt_tokens=7)
    metrics.tokens(count=3, seconds=0.3)
    metrics.finished(reasons=("stop", "length"), num_prompt_tokens=7, num_tokens=4, seconds=0.6)
    samples = samples_in(text_of(metrics))
    at = "engine=frontend"
    assert samples["requests_received_total", f"endpoint=/v1/completions,{at}"] == 1
    assert samples["prompt_tokens_total", at] == 7
    assert samples["generation_tokens_total", at] == 4
    assert samples["request_success_total", f"{at},finished_reason=stop"] == 1
    assert samples["request_success_total", f"{at},finished_reason=length"] == 1
    assert samples["request_params_n_sum", at] == 2
    assert samples["request_params_max_tokens_sum", at] == 30
    assert samples["request_prompt_tokens_sum", at] == 7
    assert samples["request_generation_tokens_sum", at] == 4
    assert samples["time_to_first_token_seconds_sum", at] == 0.25
    assert samples["e2e_request_latency_seconds_sum", at] == 0.6
    # Three tokens in 0.3 s are three gaps of 0.1 s.
    assert samples["inter_token_latency_seconds_count", at] == 3
    assert samples["inter_token_latency_seconds_sum", at] == pytest.approx(0.3)
    assert samples["inter_token_latency_seconds_bucket", f"{at},le=0.05"] == 0
    assert samples["inter_token_latency_seconds_bucket", f"{at},le=0.1"] == 3
    assert samples["inter_token_latency_seconds_bucket", f"{at},le=+Inf"] == 3


async def test_without_max_tokens_none_is_counted():
    metrics = Metrics()
    metrics.request_started(endpoint="/v1/responses", num_choices=1, max_tokens=None)
    assert samples_in(text_of(metrics))["request_params_max_tokens_count", "engine=frontend"] == 0


async def test_refusals_and_aborts_are_counted_by_reason():
    metrics = Metrics()
    metrics.refused(status=429, reason="overloaded")
    metrics.refused(status=429, reason="overloaded")
    metrics.refused(status=404, reason="model_not_found")
    metrics.aborted(num_tokens=5)
    samples = samples_in(text_of(metrics))
    assert samples["requests_rejected_total", "engine=frontend,reason=overloaded"] == 2
    assert samples["requests_rejected_total", "engine=frontend,reason=model_not_found"] == 1
    assert samples["abort_total", "engine=frontend"] == 1


def test_the_number_of_label_values_is_bounded():
    metrics = Metrics()
    for index in range(3 * MAX_REASONS):
        metrics.refused(status=400, reason=f"reason-{index}")
    assert len(metrics.num_by_refusal) == MAX_REASONS + 1
    assert metrics.num_by_refusal[OTHER] == 2 * MAX_REASONS


async def test_an_engine_adds_its_workers(tmp_path):
    artifact = tiny_artifact(tmp_path)
    args = AsyncEngineArgs(
        model=str(artifact.path),
        backend="mock",
        devices="npu:0:0",
        paged_attention_num_blocks=64,
    )
    metrics = Metrics()
    running = Service(args, served_model_names=["tiny"], metrics=metrics)
    collector = MetricsCollector(running, metrics, {"version": "1"})
    try:
        await running.start()
        with running.admit("r1") as engine:
            async for _ in engine.generate("Hello", None, "r1"):
                pass
            text = collector.text().decode()
    finally:
        await running.stop()
    assert types_in(text) == KEPT_NAMES | OUR_NAMES
    samples = samples_in(text)
    assert samples["server_state", "state=ready"] == 1
    assert samples["requests_in_flight", "engine=frontend"] == 1
    assert samples["worker_up", "engine=0"] == 1
    assert samples["worker_epoch", "engine=0"] == 1
    assert samples["worker_output_tokens_total", "engine=0"] == 16
    assert samples["worker_steps_total", "engine=0"] >= 16
    used, free = (samples["kv_blocks", f"engine=0,state={state}"] for state in ("used", "free"))
    assert used + free == 64
    assert samples["kv_cache_usage_percent", "engine=0"] == used / 64
    assert samples["num_requests_waiting", "engine=frontend"] == 0
    assert samples["worker_heartbeat_age_seconds", "engine=0"] >= 0
    assert "r1" not in text  # no request's id is a label


async def test_a_server_that_could_not_start_says_so():
    def fail(args, report):
        raise WorkerStartError("no")

    metrics = Metrics()
    failed = service(metrics, build=fail)
    with pytest.raises(WorkerStartError):
        await failed.start()
    text = MetricsCollector(failed, metrics, {"version": "1"}).text().decode()
    assert samples_in(text)["server_state", "state=failed"] == 1


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        pytest.param(0.5, "1.0", id="below the first"),
        pytest.param(1, "1.0", id="on a bound it counts for that bound"),
        pytest.param(1.5, "2.0", id="between two"),
        pytest.param(9, "+Inf", id="above all"),
    ],
)
def test_a_histogram_counts_a_value_for_the_first_bound_not_below_it(value, bound):
    histogram = Histogram((1, 2, 4))
    histogram.add(value, 2)
    first = next(name for name, count in histogram.cumulative() if count)
    assert (first, histogram.count, histogram.sum) == (bound, 2, 2 * value)
    counts = [count for _, count in histogram.cumulative()]
    assert counts == sorted(counts)
    assert math.isinf(float(histogram.cumulative()[-1][0]))


class FakeLoop:
    """Time that is told, and the timers due at it."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def call_at(self, when, call, *args):
        self.timers.append((when, call, args))
        return object()

    def run_until(self, when):
        self.now = when
        due, self.timers = self.timers, []
        for _, call, args in due:
            call(*args)


def test_lag_is_how_late_a_timer_runs_and_ends_when_nothing_happens(monkeypatch):
    loop, lag = FakeLoop(), LoopLag()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    lag.note()
    lag.note()
    assert len(loop.timers) == 1
    loop.run_until(loop.timers[0][0] + 0.3)
    assert lag.seconds.sum == pytest.approx(0.3)
    for _ in range(NUM_QUIET_TICKS - 1):
        assert lag.is_running
        loop.run_until(loop.timers[0][0])
    assert not lag.is_running
    assert not loop.timers
    lag.note()
    assert lag.is_running
