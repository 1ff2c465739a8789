"""What an engine says of itself: while it starts, while it works, when a worker is replaced."""

import asyncio

import pytest
from engines import async_engine, collect, ids_of, kill
from tiny_models import make_checkpoint, tiny_artifact

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from furiosa_llm.engine.loads import LoadLedger
from furiosa_llm.engine.startup import StartupProgress, WorkerStartup
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.wire.messages import WorkerLoad

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(autouse=True)
def topology(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "4x2")


async def until(condition):
    """Wait for what another process is about to say."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_idle_engine(model):
    async with async_engine(model, devices="npu:0:*,npu:1:0", max_processing_samples=8) as engine:
        status = engine.status()
        assert [w.devices for w in status.workers] == ["npu:0:0-1", "npu:1:0"]
        assert [w.pid for w in status.workers] == engine.worker_pids
        assert (status.num_requests, status.num_sequences, status.num_waiting) == (0, 0, 0)
        assert status.max_sequences >= 16
        assert status.block_size == 16
        assert status.ended_by is None
        assert status.num_workers_up == 2
        for worker in status.workers:
            assert (worker.epoch, worker.is_up, worker.phase) == (1, True, "ready")
            assert worker.num_free_blocks == worker.num_blocks == 256
            assert (worker.num_running, worker.num_steps, worker.num_restarts) == (0, 0, 0)
            assert worker.last_message_s >= 0
    status = engine.status()
    assert "shut down" in status.ended_by
    assert [w.pid for w in status.workers] == [None, None]
    assert status.num_workers_up == 0


async def test_a_request_shows_while_it_runs_and_counts_when_it_has_ended(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    async with async_engine(model) as engine:
        stream = engine.generate(PROMPT, LONG, "long")
        await anext(stream)
        status = engine.status()
        (worker,) = status.workers
        assert (status.num_requests, status.num_sequences) == (1, 1)
        assert (worker.num_dispatched, worker.num_running, worker.num_waiting) == (1, 1, 0)
        assert worker.num_free_blocks < worker.num_blocks
        assert worker.num_output_tokens >= 1
        assert worker.num_computed_tokens >= 4
        await stream.aclose()
        assert engine.status().num_requests == 0
        # No step follows the abort, and yet the worker says that it is idle.
        await until(lambda: engine.status().workers[0].num_running == 0)
        (worker,) = engine.status().workers
        assert worker.num_free_blocks == worker.num_blocks
        assert worker.num_dispatched == 0
        assert worker.num_steps < 200


async def test_counters_go_on_when_a_worker_is_replaced(model):
    async with async_engine(model) as engine:
        await collect(engine, PROMPT, PARAMS)
        before = engine.status().workers[0]
        assert before.num_output_tokens == 12
        kill(before.pid)
        assert len(ids_of(await collect(engine, PROMPT, PARAMS))) == 12
        after = engine.status().workers[0]
        assert (after.epoch, after.restarts) == (2, (("signal", 1),))
        assert after.pid != before.pid
        assert after.num_output_tokens == 24
        assert after.num_free_blocks == after.num_blocks


async def test_sequences_that_no_worker_has_room_for_are_counted(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    async with async_engine(model, max_processing_samples=1) as engine:
        request = SamplingParams(temperature=1.0, n=3, max_tokens=200, ignore_eos=True)
        stream = engine.generate(PROMPT, request, "three")
        await anext(stream)
        assert engine.status().num_sequences == 3
        assert engine.status().num_waiting == 2
        await stream.aclose()
        await until(lambda: engine.status().num_waiting == 0)


async def test_a_start_can_be_watched_from_its_phases_to_ready(tmp_path, monkeypatch):
    startup, seen = StartupProgress(), []
    record = startup.enter

    def enter(phase, done=0, total=0):
        record(phase, done, total)
        seen.append(startup.status)

    monkeypatch.setattr(startup, "enter", enter)
    assert startup.status.phase == "finding model"
    args = AsyncEngineArgs(
        model=str(make_checkpoint(tmp_path / "checkpoint")),
        cache_dir=tmp_path / "cache",
        backend="mock",
        devices="npu:0:0,npu:1:0",
    )
    engine = await asyncio.to_thread(
        AsyncLLMEngine.from_engine_args, args, progress=lambda *_: None, startup=startup
    )
    await engine.shutdown()
    phases = list(dict.fromkeys(status.phase for status in seen))
    assert phases == ["packing", "loading tokenizer", "starting workers", "ready"]
    packing = [status for status in seen if status.phase == "packing"]
    assert packing[-1].done == packing[-1].total > 0
    assert [w.phase for w in packing[0].workers] == ["waiting", "waiting"]
    assert startup.status.workers == (
        WorkerStartup(0, "npu:0:0", "ready"),
        WorkerStartup(1, "npu:1:0", "ready"),
    )


def test_a_start_that_fails_says_which_worker_did(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "nonsense")
    startup = StartupProgress()
    args = AsyncEngineArgs(model=str(model), backend="native", devices="npu:0:0")
    with pytest.raises(FuriosaLLMError, match="nonsense"):
        AsyncLLMEngine.from_engine_args(args, startup=startup)
    assert startup.status.phase == "failed"
    assert startup.status.workers == (WorkerStartup(0, "npu:0:0", "failed"),)


def test_the_ledger_adds_up_the_lives_of_a_worker():
    loads = LoadLedger()
    assert loads.total(0) == WorkerLoad(0, 0, 0, 0, 0, 0, 0)
    loads.up(0, 64)
    assert loads.total(0) == WorkerLoad(0, 0, 64, 0, 0, 0, 0)
    loads.note(0, WorkerLoad(3, 1, 10, 2, 7, 90, 20))
    loads.down(0)
    assert loads.total(0) == WorkerLoad(0, 0, 0, 2, 7, 90, 20)
    loads.up(0, 64)
    loads.note(0, WorkerLoad(1, 0, 60, 1, 2, 5, 2))
    assert loads.total(0) == WorkerLoad(1, 0, 60, 3, 9, 95, 22)
    loads.down(0)
    assert loads.total(0) == WorkerLoad(0, 0, 0, 3, 9, 95, 22)
