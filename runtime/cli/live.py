"""Several answers at once on one terminal, each readable.

All requests run at the same time, and one answer is shown live, the first that is not shown yet.
The others gather meanwhile, so that when their turn comes what they have appears at once and the
rest as it is made. Interleaving the answers as they come would be unreadable.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from furiosa_llm.outputs import RequestOutput
    from furiosa_llm.sampling_params import SamplingParams


class Engine(Protocol):
    """What is asked: an AsyncLLMEngine, or a daemon."""

    def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, /
    ) -> AsyncIterator[RequestOutput]: ...


@dataclass(slots=True)
class Figures:
    """What a run of requests came to. Times in seconds of a monotonic clock."""

    begin_s: float
    end_s: float = 0.0
    num_requests: int = 0
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # since the begin, per request

    def line(self) -> str:
        elapsed_s = max(self.end_s - self.begin_s, 1e-9)
        line = (
            f"{self.num_requests} request{'s' if self.num_requests != 1 else ''}, "
            f"{self.num_tokens} tokens in {elapsed_s:.2f} s: "
            f"{self.num_tokens / elapsed_s:.1f} tokens/s"
        )
        if self.first_token_s:
            line += f", first token after {median(self.first_token_s):.3f} s"
            line += " (median)" if len(self.first_token_s) > 1 else ""
        return line


async def show_answers(
    engine: Engine,
    prompts: Sequence[Any],
    params: SamplingParams,
    *,
    begin: Callable[[int], None],
    write: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Figures:
    """Run all prompts at once and show their answers in order.

    Args:
        prompts: whatever the engine takes.
        params: with `output_kind` DELTA and `n` 1.
        begin: called with the index of the prompt whose answer comes next.
        write: called with each piece of that answer.
    Raises: the first error of a request, when its turn to be shown comes; the others are aborted.
    """
    figures = Figures(begin_s=clock())
    queues: list[asyncio.Queue[str | None]] = [asyncio.Queue() for _ in prompts]

    async def run(index: int) -> None:
        is_first = True
        try:
            async for text, num_tokens in _pieces(engine, prompts[index], params, f"cli-{index}"):
                if num_tokens and is_first:
                    figures.first_token_s.append(clock() - figures.begin_s)
                    is_first = False
                figures.num_tokens += num_tokens
                queues[index].put_nowait(text)
        finally:
            figures.num_requests += 1
            figures.end_s = clock()
            queues[index].put_nowait(None)

    tasks = [asyncio.create_task(run(index)) for index in range(len(prompts))]
    try:
        for index, task in enumerate(tasks):
            begin(index)
            while (text := await queues[index].get()) is not None:
                write(text)
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return figures


async def _pieces(
    engine: Engine, prompt: Any, params: SamplingParams, request_id: str
) -> AsyncIterator[tuple[str, int]]:
    """(new text, number of new tokens) as they are made."""
    async for output in engine.generate(prompt, params, request_id):
        for completion in output.outputs:
            yield completion.text, len(completion.token_ids)
