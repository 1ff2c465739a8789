"""What an engine costs: one copy of the weights for all workers, and nothing while it is idle."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from engines import async_engine, collect

from furiosa_llm import SamplingParams

MIB = 2**20
IDLE_S = 10.0
ALLOWED_BESIDE_KV = 60 * MIB


def pss(pid):
    """Bytes of memory of a process, what it shares divided by those who share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell the PSS")


def cpu_ticks_while_idle(pids):
    """User and system time, in clock ticks, that each process and its threads take in IDLE_S.

    Another process reads it while they sleep, this one among them: where a machine is shared,
    waking after a long sleep alone may be charged with more than a tick.
    """
    script = 'before=$(cat "$@"); sleep "$IDLE_S"; after=$(cat "$@"); echo "$before"; echo "$after"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *(f"/proc/{pid}/stat" for pid in pids)],
        env={**os.environ, "IDLE_S": str(IDLE_S)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    fields = [line.rpartition(")")[2].split() for line in done.stdout.splitlines()]
    ticks = [int(each[11]) + int(each[12]) for each in fields]
    before, after = ticks[: len(pids)], ticks[len(pids) :]
    return [b - a for a, b in zip(before, after, strict=True)]


async def pss_after_use(model, devices, num_workers):
    """Summed PSS of the workers once all of them have run something."""
    async with async_engine(model, backend="native", devices=devices) as engine:
        prompt = {"prompt_token_ids": list(range(3, 40))}
        params = SamplingParams(temperature=0.0, max_tokens=8)
        await asyncio.gather(*(collect(engine, prompt, params) for _ in range(2 * num_workers)))
        return sum(pss(pid) for pid in engine.worker_pids)


@pytest.mark.slow
async def test_two_workers_hold_one_copy_of_the_weights(smollm2_artifact, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "2x1")
    artifact = smollm2_artifact("bf16")  # 270 MB: a second copy could not hide
    kv_bytes = 256 * 16 * artifact.config.kv_bytes_per_token("bf16")
    # A file of their own: what this process has mapped of the other would count as shared with it.
    with tempfile.TemporaryDirectory() as directory:
        path = shutil.copytree(artifact.path, Path(directory) / "artifact")
        one = await pss_after_use(path, "npu:0:0", 1)
        two = await pss_after_use(path, "npu:0:0,npu:1:0", 2)
    assert one > artifact.weights_nbytes * 0.9  # the figure does count the mapped weights
    assert two <= one + kv_bytes + ALLOWED_BESIDE_KV


@pytest.mark.slow
async def test_an_idle_engine_uses_no_cpu(smollm2_artifact):
    async with async_engine(smollm2_artifact("auto").path, backend="native") as engine:
        await collect(engine, "The sea", SamplingParams(temperature=0.0, max_tokens=4))
        pids = [os.getpid(), *engine.worker_pids]
        # The event loop would wake for nothing else, so this thread may as well be blocked.
        used = cpu_ticks_while_idle(pids)
    assert max(used) <= 1  # a tick is 10 ms; one may be the rounding of what came before
