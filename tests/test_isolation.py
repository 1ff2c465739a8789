"""A worker's death: nobody else notices, and its own requests end with the same tokens."""

import asyncio
import dataclasses
import os

import pytest
import zmq
from engines import async_engine, collect, ids_of, kill
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams
from furiosa_llm.engine.request import Choice
from furiosa_llm.errors import FuriosaLLMError, QuarantinedError
from furiosa_llm.wire.codec import encode
from furiosa_llm.wire.messages import StartFailed, Tokens, WorkerLoad
from furiosa_llm.wire.sockets import connect_dealer

PROMPTS = [{"prompt_token_ids": [3 + i, 20 + i, 50 + i]} for i in range(4)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.0, max_tokens=40, ignore_eos=True, presence_penalty=0.5, frequency_penalty=1.5,
    logit_bias={7: 2.0, 9: -100.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(autouse=True)
def topology(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "4x2")


async def run_all(engine, params, *, do=None):
    """The tokens of every prompt; `do()` is called when the first request has ten of them."""
    runs = [
        collect(engine, prompt, params, at=10 if do and i == 0 else None, do=do)
        for i, prompt in enumerate(PROMPTS)
    ]
    return [ids_of(outputs) for outputs in await asyncio.gather(*runs)]


@pytest.mark.parametrize(
    ("backend", "params"),
    [
        pytest.param("mock", GREEDY, id="mock, greedy"),
        pytest.param("mock", SEEDED, id="mock, seeded"),
        pytest.param("native", GREEDY, id="native, greedy"),
        pytest.param("native", SEEDED, id="native, seeded"),
        pytest.param("native", PENALISED, id="native, penalised"),
    ],
)
async def test_killed_workers_requests_end_with_the_same_tokens(
    model, monkeypatch, backend, params
):
    async with async_engine(model, backend=backend) as engine:
        undisturbed = await run_all(engine, params)
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "400")  # slow enough to be killed amid
    async with async_engine(model, backend=backend, devices="npu:0:0,npu:1:0") as engine:
        before = engine.worker_pids
        for victim in (0, 1):  # whichever ran the first request was one of them
            pid = engine.worker_pids[victim]
            assert await run_all(engine, params, do=lambda pid=pid: kill(pid)) == undisturbed
            assert await run_all(engine, params) == undisturbed
        await engine.check_health()
        after = engine.worker_pids
        assert None not in after
        assert not set(before) & set(after)


async def test_the_only_worker_dies_and_is_replaced(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "400")
    async with async_engine(model) as engine:
        undisturbed = await run_all(engine, GREEDY)
        (pid,) = engine.worker_pids
        assert await run_all(engine, GREEDY, do=lambda: kill(pid)) == undisturbed


async def test_a_request_that_was_in_two_crashes_is_not_tried_again(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "100")
    async with async_engine(model) as engine:
        killed = set()

        async def run_poison():
            async for _ in engine.generate(PROMPTS[0], GREEDY, "poison"):
                killed.update(pid for pid in engine.worker_pids if pid is not None)
                for pid in engine.worker_pids:
                    kill(pid)

        with pytest.raises(QuarantinedError, match=r"'poison'.*2 workers"):
            await run_poison()
        assert len(killed) == 2
        assert len(ids_of(await collect(engine, PROMPTS[0], GREEDY))) == 40


async def test_whatever_comes_over_the_socket_harms_nobody(model, caplog):
    """Garbage, and real messages that pretend to be of the worker, of its past or of nobody."""
    async with async_engine(model) as engine:
        endpoint = engine._core._pool.endpoint
        tokens = Tokens(0, 1, 1, (1,), (5,), (1,), (), WorkerLoad(0, 0, 0, 0, 0, 0, 0))
        forged = [
            tokens,
            dataclasses.replace(tokens, epoch=99),
            dataclasses.replace(tokens, worker_id=7),
            StartFailed(0, 1, 0, "internal_error", "no"),
        ]
        with zmq.Context() as context:
            stranger = connect_dealer(context, endpoint, 5, 5)
            for data in [b"", b"\xff" * 100, b"\xc1", bytes(10_000), *map(encode, forged)]:
                stranger.send(data)
                stranger.send_multipart([data, data])
            outputs = await collect(engine, PROMPTS[0], GREEDY)
            while "malformed" not in caplog.text:  # the stranger's connection takes its time
                outputs = await collect(engine, PROMPTS[0], GREEDY)
            await engine.check_health()
            stranger.close()
        assert len(ids_of(outputs)) == 40
        assert ids_of(await collect(engine, PROMPTS[0], GREEDY)) == ids_of(outputs)


def test_workers_end_with_their_engine(model):
    async def run():
        engine = async_engine(model, devices="npu:0:0,npu:1:0")
        pids = engine.worker_pids
        await engine.shutdown()
        return pids

    pids = asyncio.run(run())
    assert len(pids) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


async def test_only_what_ran_in_a_crash_is_blamed_for_it(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    async with async_engine(model, max_num_seqs=1) as engine:
        poison = engine.generate(PROMPTS[0], GREEDY, "poison")
        await anext(poison)
        behind = asyncio.create_task(collect(engine, PROMPTS[1], GREEDY, "behind"))
        await asyncio.sleep(0)  # until it is queued; there is room for one sequence in a step

        async def kill_until_refused():
            while True:
                for pid in engine.worker_pids:
                    kill(pid)
                await anext(poison)

        with pytest.raises(QuarantinedError, match="'poison'"):
            await kill_until_refused()
        assert len(ids_of(await behind)) == 40


async def test_a_defect_that_one_request_meets_ends_that_request_alone(model, monkeypatch):
    append = Choice.append

    def fail_for_one(choice, *rest):
        if choice.request.request_id == "unlucky":
            raise RuntimeError("a defect")
        append(choice, *rest)

    monkeypatch.setattr(Choice, "append", fail_for_one)
    async with async_engine(model) as engine:
        runs = [collect(engine, PROMPTS[0], GREEDY, name) for name in ("unlucky", "lucky")]
        unlucky, lucky = await asyncio.gather(*runs, return_exceptions=True)
        assert isinstance(unlucky, FuriosaLLMError)
        assert "RuntimeError: a defect" in str(unlucky)
        assert len(ids_of(lucky)) == 40
        assert len(ids_of(await collect(engine, PROMPTS[0], GREEDY))) == 40
