"""Probes, the states of a service, and what is answered in each."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest
from http_server import running_server
from tiny_models import tiny_artifact

from furiosa_llm.engine.status import EngineStatus, WorkerStatus
from furiosa_llm.errors import ArtifactError, OverloadedError, WorkerDiedError
from furiosa_llm.server.limits import Limits
from furiosa_llm.server.readiness import MAX_AGE_S, STALL_S, Readiness, Stillness
from furiosa_llm.server.service import ServiceState, build_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


WORKER = WorkerStatus(
    worker_id=0, devices="npu:0:0", pid=1, epoch=1, is_up=True, phase="ready", num_dispatched=1,
    num_running=1, num_waiting=0, num_free_blocks=1, num_blocks=2, restarts=(), num_preemptions=0,
    num_steps=10, num_computed_tokens=0, num_output_tokens=0, last_message_s=0.0,
)  # fmt: skip


def status_of(worker):
    return EngineStatus((worker,), 16, 1, 1, 0, 10, None)


def test_the_port_answers_before_the_model_is_there(model):
    gate = threading.Event()

    def slow_build(args, report):
        report("packing", 1, 4)
        gate.wait(60)
        return build_engine(args, report)

    with running_server(model, build=slow_build, is_started=False) as server:
        starting = asyncio.run_coroutine_threadsafe(server.service.start(), server.loop)
        with server.client() as client:
            while server.service.phase != "packing":
                client.get("/livez").raise_for_status()
            started = client.get("/startupz")
            assert started.status_code == 503
            assert started.json()["phase"] == "packing"
            assert started.json()["progress"] == {"done": 1, "total": 4}
            assert client.get("/readyz").json() == {"status": "not ready", "reason": "starting"}
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "service_unavailable"
            for path in ("/v1/models", "/v1/models/tiny", "/tokenizer_info"):
                assert client.get(path).status_code == 503
            assert client.get("/version").status_code == 200
            assert client.get("/nothing").status_code == 404
            gate.set()
            starting.result(60)
            assert client.get("/startupz").json()["status"] == "ready"
            assert client.get("/readyz").status_code == 200


def test_a_start_that_fails_says_why(model):
    def broken(args, report):
        raise ArtifactError("the artifact is damaged")

    with running_server(model, build=broken, is_started=False) as server:
        with pytest.raises(ArtifactError):
            server.run(server.service.start)
        with server.client() as client:
            assert client.get("/startupz").json() == {
                "status": "failed", "phase": "failed", "reason": "the artifact is damaged",
            }  # fmt: skip
            assert client.get("/livez").status_code == 200
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert "damaged" not in refused.text  # a path may be in it: the log has it


def test_draining_lets_requests_end_and_refuses_new_ones(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "400")
    with running_server(model) as server, server.client() as client:
        body = {"prompt": "x", "stream": True, "max_tokens": 60, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.loop.call_soon_threadsafe(server.service.begin_drain)
            refused = client.post("/v1/completions", json={"prompt": "x"})
            while refused.status_code == 200:  # the loop had not come to it
                refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert client.get("/readyz").json()["reason"] == "draining"
            assert list(lines)[-2] == "data: [DONE]"
        assert server.run(lambda: server.service.drained(10))


def test_a_full_queue_is_429_with_retry_after(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    limits = Limits(max_queue=0)
    with running_server(model, limits=limits, max_num_seqs=1) as server, server.client() as client:
        body = {"prompt": "x", "stream": True, "max_tokens": 200, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept: httpx leaves when it is collected
            next(lines)
            refused = client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        while server.service.num_in_flight:  # the stream was left: its place becomes free
            client.get("/livez")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


async def test_admission_counts_sequences(model):
    with running_server(model, limits=Limits(max_queue=2), max_num_seqs=2) as server:

        async def fill():
            admit = server.service.admit
            with admit("a", 3), admit("b"):
                with pytest.raises(OverloadedError), admit("c"):
                    raise AssertionError("admitted")
                assert server.service.num_in_flight == 2
            with admit("alone", 100):  # larger than all there is: it runs by itself
                assert not await server.service.drained(0)
            assert await server.service.drained(0)

        server.run(fill)


def test_when_the_workers_are_gone_it_is_not_ready_and_says_503(model):
    with running_server(model) as server, server.client() as client:
        server.run(server.service.engine.shutdown)
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        assert server.service.state is ServiceState.FAILED


class FakeEngine:
    """Answers a ping as it is told to."""

    def __init__(self):
        self.num_pings = 0
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.worker = replace(WORKER, num_dispatched=0)

    async def check_health(self, timeout_s):
        self.num_pings += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    def status(self):
        return status_of(self.worker)


class FakeService:
    state = ServiceState.READY

    def __init__(self):
        self.engine = FakeEngine()


async def test_one_check_serves_all_who_ask_and_is_kept_for_a_while():
    now = 100.0
    service = FakeService()
    readiness = Readiness(service, lambda: now)
    service.engine.gate.clear()
    asked = [asyncio.create_task(readiness.reason_against()) for _ in range(5)]
    await asyncio.sleep(0)
    service.engine.gate.set()
    assert await asyncio.gather(*asked) == [None] * 5
    assert service.engine.num_pings == 1
    service.engine.error = WorkerDiedError("a worker has not answered")
    assert await readiness.reason_against() is None
    now += MAX_AGE_S + 0.01
    assert await readiness.reason_against() == "a worker has not answered"
    service.engine.error = None
    now += MAX_AGE_S + 0.01
    assert await readiness.reason_against() is None


async def test_one_who_stops_asking_does_not_end_the_check_for_others():
    service = FakeService()
    readiness = Readiness(service)
    service.engine.gate.clear()
    first, second = (asyncio.create_task(readiness.reason_against()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    service.engine.gate.set()
    assert await second is None


@pytest.mark.parametrize(
    ("change", "is_still"),
    [
        pytest.param({}, True, id="holds sequences and makes no step"),
        pytest.param({"num_steps": 11}, False, id="steps"),
        pytest.param({"num_dispatched": 0}, False, id="has nothing to do"),
        pytest.param({"is_up": False}, False, id="is down: the others serve"),
        pytest.param({"epoch": 2, "num_steps": 0}, False, id="was replaced"),
    ],
)
def test_stillness(change, is_still):
    stillness = Stillness()
    assert stillness.look(status_of(WORKER), 0.0) is None
    assert stillness.look(status_of(WORKER), STALL_S / 2) is None
    found = stillness.look(status_of(replace(WORKER, **change)), STALL_S)
    assert (found is not None) is is_still


def test_work_that_has_just_come_is_not_still_however_long_ago_the_last_look_was():
    stillness = Stillness()
    assert stillness.look(status_of(replace(WORKER, num_dispatched=0)), 0.0) is None
    assert stillness.look(status_of(WORKER), 1000.0) is None
