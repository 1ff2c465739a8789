"""/metrics: the names that dashboards know, right numbers, and nothing that idles at a cost."""

import asyncio
import math
import time

import pytest
from engines import async_engine, collect, kill
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams
from furiosa_llm.args import AsyncEngineArgs
from furiosa_llm.errors import WorkerStartError
from furiosa_llm.histogram import Histogram
from furiosa_llm.server.front_end_counts import FrontEndCounts
from furiosa_llm.server.front_end_report import CountsLedger
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
    "requests_migrated_total": "counter",
    "queue_time_seconds": "histogram",
    "step_seconds": "histogram",
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
    collector = MetricsCollector(service(metrics, **options), {"version": "1.2.3"})
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
    running = Service(args, served_model_names=["tiny"], metrics=Metrics())
    collector = MetricsCollector(running, {"version": "1"})
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
    # One value per step, and one wait of the one sequence.
    assert samples["step_seconds_count", "engine=0"] == samples["worker_steps_total", "engine=0"]
    assert samples["step_seconds_sum", "engine=0"] > 0
    assert samples["queue_time_seconds_count", "engine=frontend"] == 1
    assert samples["queue_time_seconds_sum", "engine=frontend"] > 0
    assert samples["requests_migrated_total", "engine=frontend,reason=death"] == 0
    used, free = (samples["kv_blocks", f"engine=0,state={state}"] for state in ("used", "free"))
    assert used + free == 64
    assert samples["kv_cache_usage_percent", "engine=0"] == used / 64
    assert samples["num_requests_waiting", "engine=frontend"] == 0
    assert samples["worker_heartbeat_age_seconds", "engine=0"] >= 0
    assert "r1" not in text  # no request's id is a label


async def test_what_a_dead_worker_held_is_counted_as_migrated(tmp_path, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "400")
    model = tiny_artifact(tmp_path).path
    params = SamplingParams(max_tokens=40, min_tokens=40, n=2, seed=1)
    async with async_engine(model) as engine:

        async def run(do):
            return await collect(engine, "Hello", params, at=20, do=do)

        await run(lambda: kill(engine.worker_pids[0]))
        # One request, though both of its sequences moved, and began anew in the successor.
        assert engine.counts.num_migrated == {"death": 1, "reload": 0}
        assert engine.counts.queue_s.counts().count == 2
        await engine.restart_workers()
        assert engine.counts.num_migrated == {"death": 1, "reload": 0}  # nothing ran there
        reloads = []
        await run(lambda: reloads.append(asyncio.create_task(engine.restart_workers())))
        await reloads[0]
        assert engine.counts.num_migrated == {"death": 1, "reload": 1}


async def test_time_in_the_queue_is_what_others_ahead_take(tmp_path, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    model = tiny_artifact(tmp_path).path
    params = SamplingParams(max_tokens=20, min_tokens=20)
    async with async_engine(model, max_num_seqs=1) as engine:
        began_s = time.monotonic()
        await asyncio.gather(*(collect(engine, "Hello", params) for _ in range(2)))
        whole_s = time.monotonic() - began_s
        waits = engine.counts.queue_s.counts()
    assert waits.count == 2
    # One waits for the other, whose 20 steps are paced to 5 ms each; and none for longer than both.
    assert 19 / 200 < waits.sum < 2 * whole_s


def counts(num_in_flight=0, **totals):
    return FrontEndCounts(num_in_flight, 0, totals, {"by": dict(totals)}, {})


def test_counts_of_processes_do_not_fall_when_one_ends():
    ledger = CountsLedger()
    first, second = counts(num_in_flight=3, abort=5), counts(num_in_flight=1, abort=7)
    ledger.note(1, 100, first)
    ledger.note(2, 200, second)
    assert ledger.total([first, second]) == counts(num_in_flight=4, abort=12)
    # 100 has died: until its successor answers, what it said last stands, but nothing is in flight.
    assert ledger.last(1) == counts(abort=5)
    assert ledger.total([ledger.last(1), second]) == counts(num_in_flight=1, abort=12)
    successor = counts(num_in_flight=1, abort=1, prompt_tokens=4)
    ledger.note(1, 101, successor)
    assert ledger.total([successor, second]).totals == {"abort": 13, "prompt_tokens": 4}
    assert ledger.total([successor, second]).num_in_flight == 2


async def test_a_server_that_could_not_start_says_so():
    def fail(args, report):
        raise WorkerStartError("no")

    metrics = Metrics()
    failed = service(metrics, build=fail)
    with pytest.raises(WorkerStartError):
        await failed.start()
    text = MetricsCollector(failed, {"version": "1"}).text().decode()
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
    found = histogram.counts()
    first = next(name for name, count in found.cumulative() if count)
    assert (first, found.count, found.sum) == (bound, 2, 2 * value)
    counts = [count for _, count in found.cumulative()]
    assert counts == sorted(counts)
    assert math.isinf(float(found.cumulative()[-1][0]))


def test_histograms_of_two_processes_add_up():
    left, right = Histogram((1, 2)), Histogram((1, 2))
    left.add(0.5)
    right.add(1.5)
    right.add(9)
    assert (left.counts() + right.counts()).cumulative() == [("1.0", 1), ("2.0", 2), ("+Inf", 3)]
    assert (left.counts() + right.counts()).sum == 11


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
    assert lag.seconds.counts().sum == pytest.approx(0.3)
    for _ in range(NUM_QUIET_TICKS - 1):
        assert lag.is_running
        loop.run_until(loop.timers[0][0])
    assert not lag.is_running
    assert not loop.timers
    lag.note()
    assert lag.is_running
