"""Engines for tests: small, on a made-up topology, with the mock backend unless told otherwise."""

import contextlib
import itertools
import os
import signal

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, EngineArgs, LLMEngine

DEFAULTS = {"backend": "mock", "devices": "npu:0:0", "paged_attention_num_blocks": 256}
_ids = itertools.count()


def async_engine(model, **changed):
    """An AsyncLLMEngine on the artifact directory `model`."""
    return AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(model=str(model), **(DEFAULTS | changed))
    )


def llm_engine(model, **changed):
    """An LLMEngine on the artifact directory `model`."""
    return LLMEngine.from_engine_args(EngineArgs(model=str(model), **(DEFAULTS | changed)))


async def collect(engine, prompt, params, request_id=None, *, at=None, do=None):
    """All outputs of a request; once `at` tokens have come, `do()` is called, once."""
    request_id = f"collected-{next(_ids)}" if request_id is None else request_id
    outputs = []
    async for output in engine.generate(prompt, params, request_id):
        outputs.append(output)
        if at is not None and output.num_output_tokens >= at:
            at = None
            do()
    return outputs


def ids_of(outputs):
    """The token ids of a finished single-choice request with cumulative outputs."""
    assert outputs[-1].finished
    return outputs[-1].outputs[0].token_ids


def kill(pid):
    """SIGKILL a worker of ours, if it is not down already."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
