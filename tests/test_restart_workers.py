"""A rolling restart: every worker is a new process, and no request notices."""

import asyncio

import pytest
from engines import async_engine, collect, ids_of, kill
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams
from furiosa_llm.engine.health import Health, HealthCheck
from furiosa_llm.engine.rolling_restart import RollingRestart
from furiosa_llm.engine.supervisor import RestartPolicy
from furiosa_llm.errors import EngineShutDownError, WorkerDiedError, WorkerStartError

PROMPTS = [{"prompt_token_ids": [3 + i, 20 + i, 50 + i]} for i in range(6)]
PARAMS = SamplingParams(
    temperature=1.0, seed=11, max_tokens=60, ignore_eos=True, frequency_penalty=0.5
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(autouse=True)
def topology(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "4x2")


async def run_all(engine):
    return [
        ids_of(outputs)
        for outputs in await asyncio.gather(*(collect(engine, p, PARAMS) for p in PROMPTS))
    ]


@pytest.mark.parametrize(
    ("backend", "devices"),
    [("mock", "npu:0:0,npu:1:0"), ("native", "npu:0:0,npu:1:0"), ("mock", "npu:0:0")],
    ids=["two workers", "two workers of the real kernel", "the only worker"],
)
async def test_streams_go_on_with_the_same_tokens(model, monkeypatch, backend, devices):
    async with async_engine(model, backend=backend) as engine:
        undisturbed = await run_all(engine)
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "1000")  # so that it meets them amid
    async with async_engine(model, backend=backend, devices=devices) as engine:
        before = engine.worker_pids
        running = asyncio.create_task(run_all(engine))
        await asyncio.sleep(0)
        for _ in range(2):  # more often than the crashes that a request would be failed for
            await engine.restart_workers()
        assert await running == undisturbed
        assert await run_all(engine) == undisturbed
        assert not set(before) & set(engine.worker_pids)
        for worker in engine.status().workers:
            assert (worker.phase, worker.epoch) == ("ready", 3)
            assert worker.restarts == (("reload", 2),)


async def test_two_restarts_at_once_are_done_one_after_the_other(model):
    async with async_engine(model, devices="npu:0:0,npu:1:0") as engine:
        await asyncio.gather(engine.restart_workers(), engine.restart_workers())
        assert [worker.epoch for worker in engine.status().workers] == [3, 3]


async def test_a_worker_in_a_long_step_is_not_waited_for_in_vain(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "0.001")
    monkeypatch.setattr("furiosa_llm.engine.worker_pool.LEAVE_TIMEOUT_S", 0.05)
    async with async_engine(model, npu_queue_limit=1) as engine:
        stuck = asyncio.create_task(collect(engine, PROMPTS[0], PARAMS))
        async with asyncio.timeout(30):
            while not engine.status().num_requests:
                await asyncio.sleep(0.001)
            await engine.restart_workers()
        assert engine.status().workers[0].restarts == (("reload", 1),)
        stuck.cancel()


async def test_a_restart_that_meets_the_end_of_the_engine_is_told(model):
    engine = async_engine(model)
    await engine.shutdown()
    with pytest.raises(EngineShutDownError):
        await engine.restart_workers()


async def test_health_without_a_worker_is_answered_at_once(model, monkeypatch):
    monkeypatch.setattr(
        "furiosa_llm.engine.worker_pool.RestartPolicy", lambda: RestartPolicy(first_delay_s=1e6)
    )
    async with async_engine(model) as engine:
        await engine.check_health()
        for expected in [(2, "ready"), (2, "down")]:  # the second time it has to wait
            kill(engine.worker_pids[0])
            async with asyncio.timeout(30):
                worker = None
                while worker != expected:
                    await asyncio.sleep(0.001)
                    (status,) = engine.status().workers
                    worker = (status.epoch, status.phase)
        with pytest.raises(WorkerDiedError, match="no worker is up"):
            await asyncio.to_thread(engine._core.check_health, 1e6)


def test_a_check_waits_for_those_that_are_up():
    health, check = Health(), HealthCheck()
    nonce = health.begin(check, [0, 1, 2])
    health.pong(nonce + 1, 0)  # of another check
    health.pong(nonce, 0)
    health.worker_down(1, num_up=2)
    assert not check.done.is_set()
    health.pong(nonce, 2)
    assert check.done.is_set()
    assert check.problem == ""


@pytest.mark.parametrize(
    "end", [lambda h: h.worker_down(0, num_up=0), lambda h: h.fail("it was shut down")]
)
def test_a_check_that_nobody_can_answer_fails(end):
    health, check = Health(), HealthCheck()
    health.begin(check, [0])
    end(health)
    assert check.done.is_set()
    assert check.problem


def test_the_next_worker_is_restarted_when_the_one_before_is_up():
    restart = RollingRestart([0, 1])
    assert restart.begin() == 0
    assert restart.worker_up(1) is None  # another one
    assert restart.worker_up(0) == 1
    assert not restart.done.is_set()
    assert restart.worker_up(1) is None
    assert restart.done.is_set()
    assert restart.error is None


def test_a_worker_that_stays_down_ends_the_restart():
    restart = RollingRestart([0, 1])
    restart.begin()
    restart.worker_lost(1, "not its turn")
    assert not restart.done.is_set()
    restart.worker_lost(0, "six crashes")
    assert restart.done.is_set()
    assert isinstance(restart.error, WorkerStartError)
    assert "worker 0" in str(restart.error)
    assert "six crashes" in str(restart.error)
