"""What the front-end itself costs: tokens from a mock worker, as fast as one core takes them.

    python benchmarks/front_end.py [--model MODEL] [--streams 1 64 256] [--seconds 3]

The worker makes up tokens without any wait, on a core of its own; this process, engine thread and
event loop and all, is kept on one other core. Prompts are token ids; every token goes the whole way
through AsyncLLMEngine: wire, router, detokeniser, output, event loop, generator.

- Peak: tokens that the readers of that many streams get per second, with DELTA and with CUMULATIVE
  outputs (whose size grows with the answer: `--num-out` tokens).
- Latency: the worker is paced to half of the peak, so that a step is due at known times. A token's
  added latency is how late its reader has it, compared to the reader's least late token.

Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

from machine import facts, results_path, table

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, RequestOutputKind, SamplingParams
from furiosa_llm.collector import settle
from furiosa_llm.topology import discover_topology

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
SPEED_VARIABLE = "FURIOSA_SERVE_MOCK_TOKENS_PER_S"
ALL_CPUS = os.sched_getaffinity(0)
PROMPT = {"prompt_token_ids": list(range(1000, 1016))}


def make_engine(model: str, tokens_per_s: float) -> AsyncLLMEngine:
    """A mock engine whose worker is on the last core, and this process on the first."""
    os.environ[SPEED_VARIABLE] = str(tokens_per_s)
    os.sched_setaffinity(0, ALL_CPUS)
    topology = discover_topology()
    last = topology.cards[-1].pes[-1]
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(model=model, backend="mock", devices=str(last), seed=1)
    )
    settle()  # as the daemon does when it is ready
    first_cpu = min(topology.cards[0].pes[0].cpus)
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {first_cpu})
    return engine


async def peak(
    engine: AsyncLLMEngine, num_streams: int, kind: RequestOutputKind, num_out: int, seconds: float
) -> tuple[float, float]:
    """(tokens, outputs) per second that the readers get, over a good `seconds`."""
    params = SamplingParams(max_tokens=num_out, ignore_eos=True, output_kind=kind)
    counts = [0, 0]
    deadline_s = time.perf_counter() + seconds

    async def read(stream: int) -> None:
        number = 0
        while time.perf_counter() < deadline_s:
            request_id = f"{kind.name}-{num_streams}-{stream}-{number}"
            finished = False
            async for output in engine.generate(PROMPT, params, request_id):
                counts[1] += 1
                finished = output.finished
            assert finished
            counts[0] += num_out
            number += 1

    begin_s = time.perf_counter()
    await asyncio.gather(*(read(stream) for stream in range(num_streams)))
    elapsed_s = time.perf_counter() - begin_s
    return counts[0] / elapsed_s, counts[1] / elapsed_s


async def added_latency_ms(
    engine: AsyncLLMEngine, num_streams: int, tokens_per_s: float, seconds: float
) -> tuple[float, float]:
    """(median, p99) of how late a token is, beside the least late one of its stream."""
    step_s = num_streams / tokens_per_s
    num_out = max(20, int(seconds / step_s))
    params = SamplingParams(
        max_tokens=num_out, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    late_s: list[float] = []

    async def read(stream: int) -> None:
        offsets_s: list[float] = []
        async for output in engine.generate(PROMPT, params, f"paced-{num_streams}-{stream}"):
            now_s = time.perf_counter()
            first = len(offsets_s)
            for index in range(first, first + output.num_output_tokens):
                offsets_s.append(now_s - index * step_s)
        settled_s = offsets_s[len(offsets_s) // 10 :]  # once all streams run
        least_s = min(settled_s)
        late_s.extend(offset_s - least_s for offset_s in settled_s)

    await asyncio.gather(*(read(stream) for stream in range(num_streams)))
    late_s.sort()
    return 1000 * late_s[len(late_s) // 2], 1000 * late_s[int(len(late_s) * 0.99)]


async def measure(options: argparse.Namespace) -> list[list[str]]:
    """The table's rows, one per number of streams."""
    rows = []
    for num_streams in options.streams:
        with make_engine(options.model, 0) as engine:
            await peak(engine, num_streams, RequestOutputKind.DELTA, options.num_out, 0.5)
            delta, outputs = await peak(
                engine, num_streams, RequestOutputKind.DELTA, options.num_out, options.seconds
            )
            cumulative, _ = await peak(
                engine, num_streams, RequestOutputKind.CUMULATIVE, options.num_out, options.seconds
            )
        with make_engine(options.model, delta / 2) as engine:
            half = await added_latency_ms(engine, num_streams, delta / 2, options.seconds)
        rows.append(
            [
                str(num_streams),
                f"{delta:,.0f}",
                f"{outputs:,.0f}",
                f"{cumulative:,.0f}",
                f"{half[0]:.2f}",
                f"{half[1]:.2f}",
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    return rows


HEADER = [
    "streams", "DELTA, tokens/s", "its outputs/s", "CUMULATIVE, tokens/s",
    "added latency at half the DELTA rate, median, ms", "p99, ms",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--num-out", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement, at least")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    options = parser.parse_args()
    about = facts() | {
        "model": f"{options.model}'s tokenizer, mock backend",
        "front-end": f"one core, {options.loop}; answers of {options.num_out} tokens",
        "seconds per measurement": f"{options.seconds:g}",
    }
    if options.loop == "uvloop":
        import uvloop

        rows = uvloop.run(measure(options))
    else:
        rows = asyncio.run(measure(options))
    shown = "\n".join(
        [*(f"- {key}: {value}" for key, value in about.items()), "", table(HEADER, rows)]
    )
    print("\n" + shown)
    path = results_path("front-end")
    path.write_text(f"# The front-end's own ceiling\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
