"""Same request, same tokens: whatever the batch, the devices, the chunks, the pool, or a crash."""

import asyncio
import itertools

import pytest
from engines import async_engine, collect, kill
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams

MAX_TOKENS = 24
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True),
    "seeded": SamplingParams(
        temperature=0.9, top_p=0.95, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True
    ),
    "penalised": SamplingParams(
        temperature=0.7, repetition_penalty=1.3, seed=3, max_tokens=MAX_TOKENS, ignore_eos=True
    ),
}
LENGTHS = (3, 17, 40, 64)  # below, across, and at the borders of blocks and chunks
ENGINES = {
    "one PE, one step in flight": {"devices": "npu:0:0", "npu_queue_limit": 1},
    "two PEs": {"devices": "npu:0:0-1"},
    "three steps in flight": {"devices": "npu:0:0", "npu_queue_limit": 3},
    "dp 2": {"devices": "npu:0:0,npu:1:0"},
    "dp 4": {"devices": "npu:0:*,npu:1:*,npu:2:*,npu:3:*"},
    "chunks of 8": {"devices": "npu:0:0", "max_num_batched_tokens": 8},
    "chunks of 33, packed": {
        "devices": "npu:0:0",
        "max_num_batched_tokens": 33,
        "packing_type": "GREEDY",
    },
    "offline": {"devices": "npu:0:0", "is_offline": True},
    "blocks of 8": {"devices": "npu:0:0", "block_size": 8},
    "a pool so small that it preempts": {
        "devices": "npu:0:0",
        "block_size": 8,
        "paged_attention_num_blocks": 12,
        "max_model_len": 96,
        "spare_blocks_ratio": 0.0,
    },
}


@pytest.fixture(autouse=True)
def topology(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "4x2")


@pytest.fixture(scope="module", params=["fp32", "int8", "int4", "smollm2"])
def model(request, tmp_path_factory, smollm2_artifact):
    """Three tiny models, and the real one with the weights it comes with (int4 and int8)."""
    if request.param == "smollm2":
        return smollm2_artifact("auto").path
    return tiny_artifact(tmp_path_factory.mktemp("model"), "qwen3", request.param).path


def prompt(length):
    return {"prompt_token_ids": [3 + (7 * i * length) % 250 for i in range(length)]}


async def run_all(engine, *, do=None):
    """The tokens by (params, prompt length), all run at once."""
    cases = list(itertools.product(PARAMS, LENGTHS))
    runs = [
        collect(engine, prompt(length), PARAMS[name], at=4 if i == 0 else None, do=do or int)
        for i, (name, length) in enumerate(cases)
    ]
    outputs = await asyncio.gather(*runs)
    return {c: o[-1].outputs[0].token_ids for c, o in zip(cases, outputs, strict=True)}


@pytest.fixture(scope="module")
def alone(model):
    """The same by running each request with nothing beside it."""

    async def run():
        async with async_engine(model, backend="native") as engine:
            return {
                (name, length): (await collect(engine, prompt(length), params))[-1]
                .outputs[0]
                .token_ids
                for (name, params), length in itertools.product(PARAMS.items(), LENGTHS)
            }

    return asyncio.run(run())


@pytest.mark.parametrize("changed", ENGINES.values(), ids=ENGINES.keys())
async def test_tokens_do_not_depend_on_how_they_are_made(model, alone, changed):
    async with async_engine(model, backend="native", **changed) as engine:
        assert await run_all(engine) == alone
        if "paged_attention_num_blocks" in changed:
            assert engine.num_preemptions > 0  # else this case has shown nothing


async def test_tokens_survive_a_killed_worker(model, alone):
    async with async_engine(model, backend="native", devices="npu:0:0,npu:1:0") as engine:
        for victim in (0, 1):
            pid = engine.worker_pids[victim]
            assert await run_all(engine, do=lambda pid=pid: kill(pid)) == alone
