"""Our daemon against vLLM's CPU build: bf16 on both sides, and our int8 beside them.

    python benchmarks/serving_vs_vllm.py --gguf SmolLM2-BF16.gguf [--python VENV/bin/python]

vLLM is installed into a virtual environment in the cache if need be, and reads the same weights as
a checkpoint, which is written from the GGUF file. Each round starts the servers anew, one after the
other (vLLM takes minutes), and puts all loads on each. Where vLLM does not start, the result file
says so. Prints tables and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_to_checkpoint import convert
from machine import facts, results_path, table
from pieces import Pieces
from servers import Command, RunningServer, ServerFailedError, ours
from serving import (
    IDLE_S,
    LEVEL_HEADER,
    LEVELS,
    ONE_TOKEN_HEADER,
    PROCESS_HEADER,
    Shape,
    level_rows,
    load_level,
    load_one_token,
    one_token_rows,
    process_rows,
)
from vllm_server import PACKAGE, VERSION, find_or_install, vllm_server

OURS, OURS_TWICE, OURS_INT8 = "ours, bf16", "ours, bf16, dp = 2", "ours, int8"
PEER = "vLLM, bf16"
TWO_WORKERS = ("--devices", "npu:0:0,npu:0:1")  # of a PE each, where the others have one of two
MAX_MODEL_LEN = 2048
FIRST_SEED = 100  # of the rounds' prompts: all sides of a round get the same


class Comparison:
    """The pieces of the benchmark, each measured once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._pieces = Pieces(options.state, options.budget_s)
        self._shape = Shape(share=options.share)
        self._num_rounds: int = options.rounds
        self._levels: list[int] = options.levels
        self._gguf: Path = options.gguf.resolve()
        cache_dir: Path = options.cache_dir
        self._python = options.python or find_or_install(cache_dir, options.torch_wheel)
        self._checkpoint = cache_dir / f"{options.gguf.stem}-checkpoint"
        if not (self._checkpoint / "tokenizer.json").exists():
            convert(self._gguf, self._checkpoint)
        self.failure: str | None = None  # why the peer does not run here

    def run(self) -> dict[str, list[Any]]:
        """A run of each side per round; every other round goes through them backwards."""
        sides: dict[str, Callable[[], Command]] = {
            OURS: lambda: self._ours("bf16"),
            OURS_TWICE: lambda: self._ours("bf16", *TWO_WORKERS),
            OURS_INT8: lambda: self._ours("int8"),
            PEER: self._peer,
        }
        for name in (OURS, OURS_INT8):  # builds the artifact, if there is none yet
            with RunningServer(sides[name]()) as server:
                server.wait_for_first_token()
        runs: dict[str, list[Any]] = {name: [] for name in sides}
        for index in range(self._num_rounds):
            for name in sides if index % 2 == 0 else reversed(sides):
                if name == PEER and self.failure is not None:
                    continue

                def run(name: str = name, seed: int = FIRST_SEED + index) -> Any:
                    with RunningServer(sides[name]()) as server:
                        return self._look_at(server, seed)

                try:
                    result = self._pieces.get(f"{name} round {index}", run, like=f"{name} round 0")
                except ServerFailedError as error:
                    if name != PEER:
                        raise
                    self.failure = str(error)
                else:
                    runs[name].append(result)
        return {name: found for name, found in runs.items() if found}

    def _look_at(self, server: RunningServer, seed: int) -> Any:
        """One start of a server: its first token, all loads, its memory, idleness after them."""
        first_token_s = server.wait_for_first_token()
        pss_at_start = server.pss_bytes()
        loads = {}
        for level in self._levels:
            # The first answers to so many callers may be compiled for, or allocated for.
            load_level(server, level, Shape(16, 2, 0.0), seed=seed + 1000)
            loads[str(level)] = load_level(server, level, self._shape, seed=seed)
            print(f"  {level} clients: {loads[str(level)]['output_tokens_per_s']:.1f} tokens/s")
        load_one_token(server, Shape(share=0.1), seed=seed + 1000)
        return {
            "first_token_s": first_token_s,
            "pss_at_start": pss_at_start,
            "loads": loads,
            "one_token": load_one_token(server, self._shape, seed=seed),
            "pss_after_load": server.pss_bytes(),
            "idle_cpu": server.idle_cpu(IDLE_S * self._shape.share),
        }

    def _ours(self, weights: str, *options: str) -> Command:
        return ours(str(self._gguf), "--weights", weights, "--log-level", "warning", *options)

    def _peer(self) -> Command:
        return vllm_server(
            self._python,
            self._checkpoint,
            num_threads=len(os.sched_getaffinity(0)),
            max_model_len=MAX_MODEL_LEN,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the model in bf16")
    parser.add_argument("--python", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--torch-wheel", help="torch's CPU build, where the index has another")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/furiosa/benchmarks"))
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), metavar="CLIENTS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the load, for a trial")
    parser.add_argument("--state", type=Path, help="file of the results so far")
    parser.add_argument("--budget-s", type=float, help="then stop; go on at the next call")
    options = parser.parse_args()
    options.cache_dir = options.cache_dir.expanduser()
    return options


def at(runs_of: dict[str, list[Any]], level: int) -> dict[str, list[Any]]:
    """The runs' loads at `level` clients, as `level_rows` takes them."""
    return {
        name: [{"load": run["loads"][str(level)]} for run in runs] for name, runs in runs_of.items()
    }


def main() -> None:
    options = parse_args()
    comparison = Comparison(options)
    num = options.rounds
    runs = "one run of each" if num == 1 else f"medians of {num} runs, each on a fresh server"
    about = facts() | {
        "model": options.gguf.name,
        "peer": f"{PACKAGE} {VERSION}",
        "load": f"closed loop, {Shape().input_len} tokens in, {Shape().output_len} out, greedy, a "
        f"connection per request; {runs}",
        "threads": f"{len(os.sched_getaffinity(0))} each; the client shares their cores",
    }
    runs_of = comparison.run()
    if comparison.failure is not None:
        last = comparison.failure.strip().splitlines()[-1]
        about["note"] = f"{PACKAGE} does not run on this machine: {last}"
    shown = "\n\n".join(
        [
            "\n".join(f"- {key}: {value}" for key, value in about.items()),
            table(
                LEVEL_HEADER,
                [row for level in options.levels for row in level_rows(level, at(runs_of, level))],
            ),
            table(
                ONE_TOKEN_HEADER,
                one_token_rows({n: [run["one_token"] for run in r] for n, r in runs_of.items()}),
            ),
            table(PROCESS_HEADER, process_rows(runs_of)),
        ]
    )
    print("\n" + shown)
    path = results_path("serving-vs-vllm")
    path.write_text(f"# Serving beside vLLM's CPU build\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
