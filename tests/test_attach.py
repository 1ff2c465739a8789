"""Several front-ends over the same workers: real processes, some of which die."""

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import async_engine, collect, ids_of, kill
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_artifact

from furiosa_llm import AsyncLLMEngine, SamplingParams
from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.errors import EngineShutDownError, FuriosaLLMError, InvalidRequestError

PROMPTS = [{"prompt_token_ids": [3 + i, 20 + i, 50 + i]} for i in range(4)]
PARAMS = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
TESTS = Path(__file__).parent


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


@contextlib.asynccontextmanager
async def attached(ticket):
    engine = await asyncio.to_thread(AsyncLLMEngine.attach, ticket)
    async with engine:
        yield engine


async def until(condition):
    """Wait for what another process is about to do."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# Reads a ticket, runs the prompts over and over, prints one line per answer; until killed.
FRONT_END = """
import asyncio, sys
from test_attach import PROMPTS, PARAMS, attached, run_all
from furiosa_llm.engine.attach_ticket import AttachTicket
async def main():
    async with attached(AttachTicket.from_json(sys.stdin.readline())) as engine:
        while True:
            print(await run_all(engine), flush=True)
asyncio.run(main())
"""


@contextlib.contextmanager
def front_end_process(ticket):
    process = subprocess.Popen(
        [sys.executable, "-c", FRONT_END],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(ticket.to_json() + "\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


async def test_front_ends_share_workers_and_each_gets_its_own_answers(model):
    async with async_engine(model, devices="npu:0:0,npu:1:0") as owner:
        expected = await run_all(owner)
        ticket, other = owner.share(2)
        async with attached(ticket) as engine, attached(other) as third:
            assert set(engine.worker_pids) <= {*owner.worker_pids, None}
            answers = await asyncio.gather(*map(run_all, (owner, engine, third, engine)))
            assert answers == [expected] * 4
            await engine.check_health()
            for refused in (engine.restart_workers(), asyncio.to_thread(engine.share)):
                with pytest.raises(FuriosaLLMError, match="owns them"):
                    await refused
        assert await run_all(owner) == expected


async def test_a_front_end_that_dies_leaves_nothing_in_the_workers(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "2000")
    async with async_engine(model) as owner:
        expected = await run_all(owner)
        (ticket,) = owner.share()
        for _ in range(2):  # the ticket serves its successor
            with front_end_process(ticket) as process:
                line = await asyncio.to_thread(process.stdout.readline)
                assert line == f"{expected}\n"
            async with asyncio.timeout(30):
                while True:
                    assert await run_all(owner) == expected
                    (worker,) = owner.status().workers
                    if (worker.num_running, worker.num_free_blocks) == (0, worker.num_blocks):
                        break
        assert owner.status().workers[0].restarts == ()


async def test_the_owner_and_those_attached_outlive_a_worker(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "2000")
    async with async_engine(model, devices="npu:0:0,npu:1:0") as owner:
        expected = await run_all(owner)
        (ticket,) = owner.share()
        async with attached(ticket) as engine:
            await until(lambda: None not in engine.worker_pids)
            for disturb in (
                lambda: asyncio.to_thread(kill, owner.worker_pids[0]),
                lambda: asyncio.to_thread(kill, owner.worker_pids[1]),
                owner.restart_workers,
                owner.restart_workers,
            ):
                running = [asyncio.create_task(run_all(each)) for each in (owner, engine)]
                await until(lambda: engine.status().num_requests)
                await disturb()
                assert await asyncio.gather(*running) == [expected] * 2
                await until(lambda: engine.worker_pids == owner.worker_pids)
            assert engine.worker_pids == owner.worker_pids
            restarts = dict(engine.status().workers[0].restarts)
            assert restarts == {"signal": 1, "reload": 2}


async def test_what_another_front_end_has_filled_is_waited_for(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "2000")
    async with async_engine(model, max_processing_samples=2) as owner:
        (ticket,) = owner.share()
        async with attached(ticket) as engine:
            streams = [owner.generate(p, ENDLESS, f"full-{i}") for i, p in enumerate(PROMPTS[:2])]
            for stream in streams:
                await anext(stream)
            waiting = asyncio.create_task(run_all(engine))
            await until(lambda: engine.status().num_waiting)  # it was refused, and waits
            for stream in streams:
                await stream.aclose()
            assert await waiting == await run_all(owner)


async def test_the_end_of_the_owner_ends_those_attached(model):
    owner = async_engine(model)
    (ticket,) = owner.share()
    async with attached(ticket) as engine:
        assert (await run_all(engine))[0]
        await owner.shutdown()
        await until(lambda: engine.worker_pids == [None])
    gone = dataclasses.replace(ticket, owner_pid=2**22 - 1)
    with pytest.raises(EngineShutDownError, match="has ended"):
        await asyncio.to_thread(AsyncLLMEngine.attach, gone)


# --- tickets --------------------------------------------------------------------------------------


async def test_a_ticket_survives_the_way_as_json(model):
    async with async_engine(model, devices="npu:0:0,npu:1:0", seed=5) as owner:
        (ticket,) = owner.share()
        assert AttachTicket.from_json(ticket.to_json()) == ticket
        assert ticket.seed == 5
        with pytest.raises(FuriosaLLMError, match="1023 front-ends"):
            owner.share(1023)
        text = ticket.to_json()
        for wrong in (
            text[:-1], text + "}", text.replace('"version": 1', '"version": 2'),
            text.replace('"owner_pid": ', '"owner_pid": "x", "old": '),
            text.replace('"front_end": 1', '"front_end": 0'),
            text.replace('"seed": 5', '"seed": "5"'),
            text.replace('"devices": [', '"devices": ["", '),
        ):  # fmt: skip
            with pytest.raises(InvalidRequestError, match="is not an attach ticket"):
                AttachTicket.from_json(wrong)


@given(st.text() | st.sampled_from(["{}", "[]", "null", "1", '{"version": 1}']))
def test_whatever_is_no_ticket_is_refused(text):
    with pytest.raises(InvalidRequestError):
        AttachTicket.from_json(text)
