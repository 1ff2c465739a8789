"""Start-up: from the start of a fresh process to the first token, from a built artifact.

    python benchmarks/startup.py [--model MODEL] [any engine flag]

Each run is a process of its own that starts an engine, asks for one token and leaves. The first run
reads the files into the page cache and is not counted. How long the client library takes to import
is timed likewise. Prints the figures and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from machine import facts, results_path, table

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
STAGES = ("interpreter and imports", "engine ready", "first token", "engine down")
CLIENT_IMPORT = """
import time
wall_s, cpu_s = time.perf_counter(), time.process_time()
from furiosa_llm.client import Client
print(time.perf_counter() - wall_s, time.process_time() - cpu_s)
"""


async def one_token(arguments: list[str], begun_s: float) -> None:
    """What the fresh process does. Prints, as JSON, the seconds since `begun_s` at each stage."""
    from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser())
    engine_args = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments))
    stages_s = [time.time() - begun_s]
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        stages_s.append(time.time() - begun_s)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        async for _ in engine.generate("Hello", params, "only"):
            stages_s.append(time.time() - begun_s)
    stages_s.append(time.time() - begun_s)
    print(json.dumps(stages_s))


def run_fresh(arguments: list[str]) -> list[float]:
    """Seconds from the start of a process to each of STAGES."""
    command = [sys.executable, __file__, "--one-token", repr(time.time()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    stages_s: list[float] = json.loads(done.stdout.splitlines()[-1])
    assert len(stages_s) == len(STAGES), f"{len(stages_s)} stages were passed"
    return stages_s


def import_client() -> list[float]:
    """Seconds to import the client library in a fresh process: elapsed, and of processor time."""
    command = [sys.executable, "-c", CLIENT_IMPORT]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return list(map(float, done.stdout.split()))


def summary(names: Sequence[str], runs: list[list[float]]) -> list[list[str]]:
    """Of each name, the median, the least and the most of its values in the runs."""
    return [
        [name, *(f"{value:.3f}" for value in (statistics.median(times), min(times), max(times)))]
        for name, times in zip(names, zip(*runs, strict=True), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="measured runs (default: 5)")
    options, arguments = parser.parse_known_args()
    arguments = ["--model", DEFAULT_MODEL, *arguments]  # a later --model wins
    about = facts()
    attempts = range(options.repeats + 1)  # the first is not counted
    stages = summary(STAGES, [run_fresh(arguments) for _ in attempts][1:])
    imports = summary(("elapsed", "processor time"), [import_client() for _ in attempts][1:])
    about |= {"arguments": " ".join(arguments), "runs": f"{options.repeats} after one to warm up"}
    spread = ["median", "least", "most"]
    shown = "\n".join(
        [
            *(f"- {key}: {value}" for key, value in about.items()),
            "",
            table(["seconds from process start to", *spread], stages),
            "",
            table(["importing furiosa_llm.client.Client, s", *spread], imports),
        ]
    )
    print(shown)
    path = results_path("startup")
    path.write_text(f"# Start-up\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-token"]:
        asyncio.run(one_token(sys.argv[3:], float(sys.argv[2])))
    else:
        main()
