"""What the front-end itself costs: tokens from a mock worker, as fast as one core takes them.

    python benchmarks/front_end.py [--model MODEL] [--streams 1 64 256] [--seconds 3]

The worker makes up tokens without any wait, on a core of its own; this process, engine thread and
event loop and all, is kept on one other core. Prompts are token ids; every token goes the whole way
through AsyncLLMEngine: wire, router, detokeniser, output, event loop, generator.

- Peak: tokens that the readers of that many streams get per second, with DELTA and with CUMULATIVE
  outputs (whose size grows with the answer: `--num-out` tokens).
- Latency: the worker is paced to PACE tokens/s. A token's added latency is how late its reader has
  it, compared to the first one that got a token of the same step.

Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

from lateness import lateness, shares_of
from machine import facts, results_path, table

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, RequestOutputKind, SamplingParams
from furiosa_llm.collector import settle
from furiosa_llm.topology import discover_topology

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
SPEED_VARIABLE = "FURIOSA_SERVE_MOCK_TOKENS_PER_S"
ALL_CPUS = os.sched_getaffinity(0)
PACE = 20_000  # tokens/s, for latencies
FEWEST_PACED = 200  # streams, whose steps are then 10 ms and more at PACE
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


async def added_latency(
    engine: AsyncLLMEngine, num_streams: int, tokens_per_s: float, seconds: float
) -> dict[str, float]:
    """How late tokens are within their steps while all streams run, in seconds."""
    num_out = max(20, int(seconds * tokens_per_s / num_streams))
    params = SamplingParams(
        max_tokens=num_out, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def read(stream: int) -> list[float]:
        outputs = engine.generate(PROMPT, params, f"paced-{num_streams}-{stream}")
        return [time.perf_counter() async for _ in outputs]

    streams = await asyncio.gather(*(read(stream) for stream in range(num_streams)))
    begin_s, end_s = max(times[0] for times in streams), min(times[-1] for times in streams)
    return shares_of(lateness(t for times in streams for t in times if begin_s < t < end_s))


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
        late_ms = ["–"] * 3
        if num_streams >= FEWEST_PACED:
            with make_engine(options.model, PACE) as engine:
                late = await added_latency(engine, num_streams, PACE, options.seconds)
            late_ms = [f"{1000 * late[key]:.2f}" for key in ("p50", "p99", "max")]
        rows.append(
            [
                str(num_streams),
                f"{delta:,.0f}",
                f"{outputs:,.0f}",
                f"{cumulative:,.0f}",
                *late_ms,
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    return rows


HEADER = [
    "streams", "DELTA, tokens/s", "its outputs/s", "CUMULATIVE, tokens/s",
    f"late at {PACE:,} tokens/s: p50, ms", "p99", "most",
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
