"""Our daemon against llama.cpp's server: the same weight type, the same client, in turn.

    python benchmarks/serving_vs_llamacpp.py --gguf SmolLM2-Q8_0.gguf [--llama-bin DIR]
        [--our-model SmolLM2-F32.gguf --our-weights int8]

Both serve the one file, or each its own quantisation of the model: our int8 for their Q8_0, made
by us from the file that theirs was made from.

Each round starts both servers anew for each number of clients, ours and the peer's in turn. The
peer has a slot for each client, no cache of prompts, and flash attention on or off, whichever was
faster in a round before those that count. Prints tables and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_server import find_or_build_server, llama_server
from machine import facts, results_path, table
from nginx_front import NginxFront
from pieces import Pieces
from servers import Command, RunningServer, ours
from serving import (
    LEVEL_HEADER,
    LEVELS,
    ONE_TOKEN_CALLERS,
    ONE_TOKEN_HEADER,
    PROCESS_HEADER,
    Shape,
    level_rows,
    load_level,
    load_one_token,
    look_at,
    one_token_rows,
    process_rows,
)

OURS, PEER = "ours", "llama-server"
PEER_DEFAULT = "llama-server, its prompt cache on (default)"
OURS_TWICE, PEER_TWICE = "ours, dp = 2", "2 × llama-server, nginx"
FIRST_SEED = 100  # of the rounds' prompts: both sides of a round get the same

Make = Callable[[], Command]


class Comparison:
    """The pieces of the benchmark, each measured once.

    Args:
        nginx: the program, if there is one.
    """

    def __init__(
        self, options: argparse.Namespace, tool: Path, shape: Shape, *, num_threads: int
    ) -> None:
        self._gguf: Path = options.gguf.resolve()
        self._our_model: Path = (options.our_model or options.gguf).resolve()
        self._our_weights: str = options.our_weights
        self._tool, self._shape, self._num_threads = tool, shape, num_threads
        self._num_rounds: int = options.rounds
        self._nginx: Path | None = options.nginx
        self._pieces = Pieces(options.state, options.budget_s)

    def level(self, level: int) -> dict[str, list[Any]]:
        """Runs of both at `level` clients, first the one and then the other ahead."""
        flash = self.flash_attention(level)
        sides: dict[str, Make] = {
            OURS: self._ours,
            PEER: lambda: self._peer(num_slots=level, flash_attention=flash),
        }

        def measure(server: RunningServer, seed: int) -> Any:
            return look_at(server, level, self._shape, seed=seed)

        return self._rounds(f"level {level}", sides, measure)

    def flash_attention(self, level: int) -> bool:
        """Whether the peer is faster with it at `level` clients."""
        rates = {}
        for is_on in (True, False):
            results = self._piece(
                f"calibrate {level} {is_on}",
                f"calibrate {level} True",
                lambda on=is_on: self._peer(num_slots=level, flash_attention=on),
                lambda server: load_level(server, level, self._shape, seed=99),
            )
            rates[is_on] = results["output_tokens_per_s"]
        return rates[True] >= rates[False]

    def one_token(self) -> dict[str, list[Any]]:
        """Requests for one token; at the peer's default setting too."""

        def peer(*, has_prompt_cache: bool) -> Command:
            return self._peer(num_slots=ONE_TOKEN_CALLERS, is_prompt_cache_on=has_prompt_cache)

        sides: dict[str, Make] = {
            OURS: self._ours,
            PEER: lambda: peer(has_prompt_cache=False),
            PEER_DEFAULT: lambda: peer(has_prompt_cache=True),
        }

        def measure(server: RunningServer, seed: int) -> Any:
            return load_one_token(server, self._shape, seed=seed)

        return self._rounds("one token", sides, measure)

    def two_workers(self, level: int) -> dict[str, list[Any]]:
        """Ours with two workers of one PE; two of theirs of one thread each, behind nginx."""
        flash = self.flash_attention(level)

        def measure(server: RunningServer, seed: int) -> Any:
            return {"load": load_level(server, level, self._shape, seed=seed)}

        devices = ("--devices", "npu:0:0,npu:0:1")
        runs = self._rounds(f"two at {level}", {OURS_TWICE: lambda: self._ours(*devices)}, measure)
        if self._nginx is not None:
            nginx = self._nginx

            def behind_nginx(seed: int) -> Any:
                slots = (level + 1) // 2
                halves = [
                    self._peer(num_slots=slots, num_threads=1, flash_attention=flash)
                    for _ in range(2)
                ]
                with NginxFront(nginx, halves) as front:
                    return measure(front.server, seed)

            keys = [f"{PEER_TWICE} at {level} round {index}" for index in range(self._num_rounds)]
            runs[PEER_TWICE] = [
                self._pieces.get(key, lambda i=i: behind_nginx(FIRST_SEED + i), like=keys[0])
                for i, key in enumerate(keys)
            ]
        return runs

    def _rounds(
        self, what: str, sides: dict[str, Make], measure: Callable[[RunningServer, int], Any]
    ) -> dict[str, list[Any]]:
        """A run of each side per round; every other round goes through them backwards."""
        runs: dict[str, list[Any]] = {name: [] for name in sides}
        for index in range(self._num_rounds):
            for name in sides if index % 2 == 0 else reversed(sides):
                runs[name].append(
                    self._piece(
                        f"{name} {what} round {index}",
                        f"{name} {what} round 0",
                        sides[name],
                        lambda server, i=index: measure(server, FIRST_SEED + i),
                    )
                )
        return runs

    def _piece(
        self, key: str, like: str, make: Make, measure: Callable[[RunningServer], Any]
    ) -> Any:
        def run() -> Any:
            with RunningServer(make()) as server:
                server.wait_for_first_token()
                return measure(server)

        return self._pieces.get(key, run, like=like)

    def _ours(self, *arguments: str) -> Command:
        weights = ("--weights", self._our_weights)
        return ours(str(self._our_model), *weights, "--log-level", "warning", *arguments)

    def _peer(self, *, num_threads: int | None = None, **settings: Any) -> Command:
        return llama_server(
            self._tool,
            self._gguf,
            num_threads=num_threads or self._num_threads,
            num_tokens=self._shape.input_len + self._shape.output_len,
            **settings,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the peer's model")
    parser.add_argument("--our-model", type=Path, help="ours (default: the same file)")
    parser.add_argument("--our-weights", default="auto", help="the type that ours is served in")
    parser.add_argument("--llama-bin", type=Path, help="a directory with llama-server")
    parser.add_argument("--nginx", type=Path, help="the program (default: in PATH)")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/furiosa/benchmarks"))
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, metavar="CLIENTS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the load, for a trial")
    parser.add_argument("--state", type=Path, help="file of the results so far")
    parser.add_argument("--budget-s", type=float, help="then stop; go on at the next call")
    options = parser.parse_args()
    options.cache_dir = options.cache_dir.expanduser()
    found = options.nginx or shutil.which("nginx")
    options.nginx = None if found is None else Path(found).resolve()
    return options


def main() -> None:
    options = parse_args()
    num_threads = len(os.sched_getaffinity(0))
    tool = find_or_build_server(options.cache_dir, options.llama_bin)
    comparison = Comparison(options, tool, Shape(share=options.share), num_threads=num_threads)
    levels = {level: comparison.level(level) for level in options.levels}
    one_token = comparison.one_token()
    top = max(options.levels)
    two = comparison.two_workers(top)
    about = facts() | {
        "model": f"{options.gguf.name}; ours: {(options.our_model or options.gguf).name}, "
        f"--weights {options.our_weights}",
        "load": f"closed loop, {Shape().input_len} tokens in, {Shape().output_len} out, greedy, a "
        f"connection per request; medians of {options.rounds} runs, each on a fresh server",
        "threads": f"{num_threads} each; the client shares their cores",
        "flash attention of llama-server": ", ".join(
            f"{'on' if comparison.flash_attention(level) else 'off'} at {level}"
            for level in options.levels
        ),
    }
    if options.nginx is None:
        about["note"] = "nginx is not installed: no row of two llama-servers behind it"
    rows = [row for level, runs in levels.items() for row in level_rows(level, runs)]
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        table(LEVEL_HEADER, rows),
        table(ONE_TOKEN_HEADER, one_token_rows(one_token)),
        table(LEVEL_HEADER, level_rows(top, two)),
        table(PROCESS_HEADER, process_rows(levels[top])),
    ]
    shown = "\n\n".join(parts)
    print("\n" + shown)
    path = results_path(f"serving-vs-llamacpp-{options.gguf.stem}")
    path.write_text(f"# Serving beside llama.cpp's server\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
