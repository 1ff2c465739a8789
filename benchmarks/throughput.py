"""Offline throughput: batches of equal requests, 128 tokens in and 128 out.

    python benchmarks/throughput.py [--model MODEL] [--weights int8] [any engine flag]

The prompts are random token ids and go in as such, so that nothing is tokenised; end-of-sequence
tokens are ignored, so that every request makes all its tokens. Each batch size is run several
times, and the run of median throughput is reported. Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass

from machine import facts, results_path, table

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, RequestOutputKind, SamplingParams

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Run:
    """One batch, once."""

    elapsed_s: float
    num_output_tokens: int
    first_token_s: list[float]  # per request, since the batch was sent

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s


async def run_batch(
    engine: AsyncLLMEngine, prompts: list[list[int]], num_out: int, name: str
) -> Run:
    """Send all prompts at once and wait for all answers."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_out, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    first_token_s: list[float] = []
    begin_s = time.perf_counter()

    async def one(index: int) -> int:
        num_tokens = 0
        prompt = {"prompt_token_ids": prompts[index]}
        async for output in engine.generate(prompt, params, f"{name}-{index}"):
            num_new = output.num_output_tokens
            if num_new and not num_tokens:
                first_token_s.append(time.perf_counter() - begin_s)
            num_tokens += num_new
        return num_tokens

    counts = await asyncio.gather(*(one(index) for index in range(len(prompts))))
    elapsed_s = time.perf_counter() - begin_s
    assert set(counts) == {num_out}, f"answers of {sorted(set(counts))} tokens, not {num_out}"
    return Run(elapsed_s, sum(counts), first_token_s)


async def measure(engine: AsyncLLMEngine, options: argparse.Namespace) -> list[list[str]]:
    """The table's rows, one per batch size."""
    choose = random.Random(0)
    # The first ids of a vocabulary are often special tokens.
    low, high = 100, engine.tokenizer.vocab_size - 1
    rows = []
    for size in options.batch_sizes:
        runs = []
        for repeat in range(options.repeats + 1):
            # New prompts each time, so that a cache of prefixes, where there is one, has no part.
            prompts = [
                [choose.randint(low, high) for _ in range(options.num_in)] for _ in range(size)
            ]
            runs.append(await run_batch(engine, prompts, options.num_out, f"b{size}r{repeat}"))
        runs = sorted(runs[1:], key=lambda run: run.tokens_per_s)  # the first one warms up
        middle = runs[len(runs) // 2]
        first = sorted(middle.first_token_s)
        rows.append(
            [
                str(size),
                f"{middle.tokens_per_s:.1f}",
                f"{runs[0].tokens_per_s:.1f} – {runs[-1].tokens_per_s:.1f}",
                f"{size * (options.num_in + options.num_out) / middle.elapsed_s:.1f}",
                f"{1000 * statistics.median(first):.0f}",
                f"{1000 * first[-1]:.0f}",
                f"{middle.elapsed_s:.2f}",
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    return rows


HEADER = [
    "batch", "output tokens/s", "slowest – fastest", "all tokens/s", "median TTFT, ms",
    "last TTFT, ms", "batch, s",
]  # fmt: skip


def parse_args() -> tuple[argparse.Namespace, AsyncEngineArgs]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--num-in", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--num-out", type=int, default=128, help="output tokens (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs (default: 3)")
    AsyncEngineArgs.add_cli_args(parser)
    namespace = parser.parse_args(["--model", DEFAULT_MODEL, *sys.argv[1:]])  # a later one wins
    return namespace, AsyncEngineArgs.from_cli_args(namespace)


async def main() -> None:
    options, engine_args = parse_args()
    about = facts()
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        about |= {
            "model": f"{engine_args.model}, {engine.weights} weights",
            "engine": f"{engine.isa} kernels, devices {engine_args.devices or 'default'}",
            "requests": f"{options.num_in} tokens in, {options.num_out} out, greedy; "
            f"median of {options.repeats} runs after one to warm up",
        }
        name = f"throughput-{engine.weights}-{engine.isa}"
        rows = await measure(engine, options)
    shown = "\n".join(
        [*(f"- {key}: {value}" for key, value in about.items()), "", table(HEADER, rows)]
    )
    print("\n" + shown)
    path = results_path(name)
    path.write_text(f"# Offline throughput\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    asyncio.run(main())
