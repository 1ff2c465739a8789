"""Data-parallel scaling: one PE, two PEs in one worker, and two workers of one PE each.

    python benchmarks/scaling.py [--model MODEL] [--weights int8 ...] [--pes 2] [--quick]

Through `AsyncLLMEngine`, front-end included, with the requests of throughput.py. Batch 1 runs the
requests one after the other, batch 64 all at once. Every engine is a fresh process; the first batch
warms up. What the front-end itself needs shares the PEs' cores. Prints a table and writes
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import facts, results_path, table
from other_load import OtherLoad
from throughput import run_batch

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
BATCH_SIZES = (1, 64)


async def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process does: {"isa": ..., batch size: [tokens/s of each run]}."""
    choose = random.Random(0)
    figures: dict[str, Any] = {}
    async with AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**asked["engine"])) as engine:
        figures["isa"] = engine.isa
        high = engine.tokenizer.vocab_size - 1

        def prompts(count: int) -> list[list[int]]:
            return [
                [choose.randint(100, high) for _ in range(asked["num_in"])] for _ in range(count)
            ]

        await run_batch(engine, prompts(4), asked["num_out"], "warm-up")
        for size in BATCH_SIZES:
            rates = []
            for repeat in range(asked["repeats"]):
                run = await run_batch(engine, prompts(size), asked["num_out"], f"b{size}r{repeat}")
                rates.append(run.tokens_per_s)
            figures[str(size)] = rates
    return figures


def settings(num_pes: int) -> dict[str, dict[str, Any]]:
    """Name -> devices and sizes: the first is what the others are compared with."""
    return {
        "1 worker × 1 PE": {"devices": "npu:0:0"},
        f"1 worker × {num_pes} PEs": {"devices": f"npu:0:0-{num_pes - 1}"},
        f"{num_pes} workers × 1 PE": {
            "devices": f"npu:0:0-{num_pes - 1}",
            "data_parallel_size": num_pes,
        },
    }


def run_fresh(asked: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", nargs="+", default=["int8"])
    parser.add_argument("--pes", type=int, default=2, help="how many at most (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs (default: 3)")
    parser.add_argument("--num-in", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--num-out", type=int, default=64, help="output tokens (default: 64)")
    parser.add_argument("--quick", action="store_true", help="one run of a quarter of the tokens")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < options.pes:
        parser.error(f"--pes {options.pes} on {len(os.sched_getaffinity(0))} cores")
    if options.quick:
        options.repeats, options.num_in, options.num_out = 1, 32, 16
    about = facts()
    rows, isas = [], set()
    with OtherLoad() as other:
        for weights in options.weights:
            base: dict[int, float] = {}
            for name, engine in settings(options.pes).items():
                asked = {
                    "engine": {"model": options.model, "weights": weights, **engine},
                    "num_in": options.num_in,
                    "num_out": options.num_out,
                    "repeats": options.repeats,
                }
                figures = run_fresh(asked)
                isas.add(figures["isa"])
                row = [weights, name]
                for size in BATCH_SIZES:
                    rates = figures[str(size)]
                    median = statistics.median(rates)
                    base.setdefault(size, median)
                    row.append(f"{median:.1f}")
                    row.append(f"{min(rates):.1f} – {max(rates):.1f}")
                    row.append(f"{median / base[size]:.2f}")
                rows.append(row)
                print("  ".join(row), flush=True)
    about |= {
        "model": Path(options.model).name,
        "engine": f"{', '.join(sorted(isas))} kernels",
        "requests": f"{options.num_in} tokens in, {options.num_out} out, greedy; median of "
        f"{options.repeats} runs",
        "other processes meanwhile": f"{other.cores:.2f} cores busy",
    }
    header = ["weights", "setting"]
    for size in BATCH_SIZES:
        header += [f"batch {size}, tokens/s", "slowest – fastest", "over one PE"]
    shown = "\n".join(
        [*(f"- {key}: {value}" for key, value in about.items()), "", table(header, rows)]
    )
    print("\n" + shown)
    if not options.quick:
        path = results_path("scaling")
        path.write_text(f"# Data-parallel scaling\n\n{shown}\n", encoding="utf-8")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(asyncio.run(measure(json.loads(sys.argv[2])))))
    else:
        main()
