"""What the HTTP server itself can do: a model that takes no time behind it.

    python benchmarks/front_end_http.py [--source SmolLM2.gguf --llama-bin DIR]

The mock backend makes tokens out of nothing, so that all the time is the front-end's, the wire's
and the worker's loop's. The front-end has one core, the client the other; the worker shares either
the front-end's core or the client's. With --source and --llama-bin, llama.cpp's server runs a
model of one layer of 32 beside it. Prints tables and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lateness import lateness, shares_of
from llama_server import TOOL, llama_server
from machine import facts, results_path, table
from pieces import Pieces
from servers import Command, RunningServer, bench, ours
from tiny_gguf import write_tiny

from furiosa_llm.loadgen.bench import run_loop
from furiosa_llm.loadgen.http_target import HttpRequests, HttpTarget
from furiosa_llm.loadgen.http_url import HttpUrl
from furiosa_llm.loadgen.prompts import token_id_prompts
from furiosa_llm.loadgen.run import Extent, Run

MODEL = "SmolLM2-135M-Instruct"
SERVER_CPU, CLIENT_CPU = frozenset({0}), frozenset({1})
NUM_STREAMS, INPUT_LEN, OUTPUT_LEN = 256, 16, 128
STEADY_OUTPUT_LEN = 1024  # longer answers for latencies, which count while all streams run
ONE_TOKEN_S = 8.0
PACE = 10_000  # tokens/s, for latencies
VOCAB = ("--vocab-size", 500)  # the small model's


@dataclass(frozen=True, slots=True)
class Setup:
    """A server and where its processes run."""

    name: str
    command: Command
    is_front_end_alone: bool = False  # on its core; the rest of the server is on the client's


def mock(name: str, *, tokens_per_s: float = 0.0, is_front_end_alone: bool = False) -> Setup:
    pe = "npu:0:1" if is_front_end_alone else "npu:0:0"
    command = ours(MODEL, "--backend", "mock", "--devices", pe, "--log-level", "warning")
    command.environment["FURIOSA_SERVE_MOCK_TOKENS_PER_S"] = str(tokens_per_s)
    return Setup(name, command, is_front_end_alone)


class Placed(RunningServer):
    """A server whose processes are where the setup says."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.command)
        self._is_front_end_alone = setup.is_front_end_alone

    def __enter__(self) -> Self:
        try:
            self.wait_for_first_token()
            self._place()
        except BaseException:
            self.stop()
            raise
        return self

    def _place(self) -> None:
        front_end, *workers = self.processes()
        move(front_end, SERVER_CPU)
        for worker in workers:
            move(worker, CLIENT_CPU if self._is_front_end_alone else SERVER_CPU)

    def load(self, *arguments: Any) -> dict[str, Any]:
        """Bench results, and under "cpu_s" the processor time of the front-end and of the rest."""
        before = self.cpu_s()
        results: dict[str, Any] = bench(self, *VOCAB, *arguments, cpus=CLIENT_CPU)
        took = {pid: at_s - before.get(pid, 0.0) for pid, at_s in self.cpu_s().items()}
        front_end = took.pop(self.processes()[0])
        results["cpu_s"] = [front_end, sum(took.values())]
        return results


def move(pid: int, cpus: frozenset[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cpus)


def streams(setup: Setup, num_rounds: int, *, num_waves: int = 2) -> list[dict[str, Any]]:
    """Full answers to NUM_STREAMS callers at once."""
    with Placed(setup) as server:
        return [
            server.load(
                *("--concurrency", NUM_STREAMS, "--num-requests", num_waves * NUM_STREAMS),
                *("--input-len", INPUT_LEN, "--output-len", OUTPUT_LEN, "--seed", seed),
            )
            for seed in range(num_rounds)
        ]


def late_pieces(setup: Setup) -> dict[str, float]:
    """How late pieces are within their steps while all streams run, and how many come a second."""
    with Placed(setup) as server:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, CLIENT_CPU)
        run = Run()
        run_loop(_steady_load(server, run))
        os.sched_setaffinity(0, before)
    begin_s = max(record.token_s[0] for record in run.records)
    end_s = min(record.end_s for record in run.records)
    times = [t for r in run.records for t in r.token_s if begin_s < t < end_s]
    return shares_of(lateness(times)) | {"tokens_per_s": len(times) / (end_s - begin_s)}


async def _steady_load(server: RunningServer, run: Run) -> None:
    requests = HttpRequests(endpoint="completions", model="model", max_tokens=STEADY_OUTPUT_LEN)
    target = HttpTarget(HttpUrl.parse("url", server.url), requests, keep_alive=False)
    prompts = token_id_prompts(INPUT_LEN, seed=0)
    await run.closed(target, prompts, Extent(NUM_STREAMS), concurrency=NUM_STREAMS)
    await target.close()


def one_token(setup: Setup) -> dict[str, dict[str, Any]]:
    """Requests of 5 tokens in and 1 out from 64 callers."""
    asked = ("--concurrency", 64, "--duration", ONE_TOKEN_S, "--input-len", 5, "--output-len", 1)
    with Placed(setup) as server:
        return {
            "streamed": server.load(*asked, "--seed", 1),
            "whole": server.load(*asked, "--no-stream", "--seed", 2),
        }


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(runs, key=lambda run: float(run["output_tokens_per_s"]))[len(runs) // 2]


def stream_rows(done: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for name, runs in done.items():
        run, rates = median_of(runs), [r["output_tokens_per_s"] for r in runs]
        tokens = run["num_output_tokens"]
        shares = [*run["cpu_s"], run["client_cpu_s"]]
        rows.append(
            [
                name,
                f"{run['output_tokens_per_s']:.0f}",
                f"{min(rates):.0f} – {max(rates):.0f}",
                *(f"{1e6 * cpu_s / tokens:.1f}" if cpu_s else "–" for cpu_s in shares),
                f"{1000 * run['ttft']['p50']:.0f}",
                f"{1000 * run['itl']['p50']:.1f}",
                f"{1000 * run['itl']['p99']:.1f}",
            ]
        )
    return rows


def one_token_rows(done: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    return [
        [
            name,
            f"{runs['streamed']['requests_per_s']:.0f}",
            f"{runs['whole']['requests_per_s']:.0f}",
            f"{1e6 * runs['whole']['cpu_s'][0] / runs['whole']['num_ok']:.0f}",
            f"{1000 * runs['whole']['e2e']['p50']:.0f}",
            f"{1000 * runs['whole']['e2e']['p99']:.0f}",
        ]
        for name, runs in done.items()
    ]


def latency_rows(done: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    rows = []
    for name, runs in done.items():
        run = sorted(runs, key=lambda run: run["p99"])[len(runs) // 2]
        late = [f"{1000 * run[key]:.1f}" for key in ("p50", "p99", "max")]
        rows.append([name, f"{run['tokens_per_s']:.0f}", *late])
    return rows


STREAM_HEADER = [
    f"{NUM_STREAMS} streams", "tokens/s", "slowest – fastest", "front-end µs/token",
    "rest of server", "client", "TTFT p50, ms", "ITL p50", "ITL p99",
]  # fmt: skip
LATENCY_HEADER = [
    f"{PACE:,} tokens/s, in steps of {1000 * NUM_STREAMS / PACE:.1f} ms", "pieces/s",
    "late in a step: p50, ms", "p99", "most",
]  # fmt: skip
ONE_TOKEN_HEADER = [
    "5 in, 1 out, 64 callers", "requests/s streamed", "whole", "front-end µs/request", "p50, ms",
    "p99",
]  # fmt: skip


def measure(options: argparse.Namespace, pieces: Pieces) -> tuple[dict[str, Any], ...]:
    together, alone = "ours, all on one core", "ours, worker on the client's core"
    full: dict[str, Any] = {}
    paced: dict[str, Any] = {}
    one: dict[str, Any] = {}
    for name, is_alone in ((together, False), (alone, True)):
        full[name] = pieces.get(
            f"streams {name}",
            lambda n=name, a=is_alone: streams(mock(n, is_front_end_alone=a), options.rounds),
        )
        paced[name] = pieces.get(
            f"latency {name}",
            lambda n=name, a=is_alone: [
                late_pieces(mock(n, tokens_per_s=PACE, is_front_end_alone=a))
                for _ in range(options.rounds)
            ],
        )
        one[name] = pieces.get(
            f"one {name}", lambda n=name, a=is_alone: one_token(mock(n, is_front_end_alone=a))
        )
    if options.source is not None and options.llama_bin is not None:
        peer = "llama-server, tiny model, one core"
        tiny = Path(options.cache_dir).expanduser() / "tiny.gguf"
        if not tiny.exists():
            tiny.parent.mkdir(parents=True, exist_ok=True)
            write_tiny(options.source, tiny)

        def setup(num_slots: int) -> Setup:
            command = llama_server(
                options.llama_bin / TOOL, tiny, num_threads=1, num_slots=num_slots,
                num_tokens=INPUT_LEN + OUTPUT_LEN, cpus=SERVER_CPU,
            )  # fmt: skip
            return Setup(peer, command)

        full[peer] = pieces.get(
            f"streams {peer}", lambda: streams(setup(NUM_STREAMS), 1, num_waves=1)
        )
        one[peer] = pieces.get(f"one {peer}", lambda: one_token(setup(64)))
    return full, paced, one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--source", type=Path, help="a GGUF file whose tokenizer is taken")
    parser.add_argument("--llama-bin", type=Path, help="a directory with llama-server")
    parser.add_argument("--cache-dir", default="~/.cache/furiosa/benchmarks")
    parser.add_argument("--state", type=Path, help="file of the results so far")
    parser.add_argument("--budget-s", type=float, help="then stop; go on at the next call")
    options = parser.parse_args()
    assert {0, 1} <= os.sched_getaffinity(0), "this takes cores 0 and 1"
    about = facts()
    full, paced, one = measure(options, Pieces(options.state, options.budget_s))
    about["load"] = (
        f"{INPUT_LEN} tokens in, {OUTPUT_LEN} out, a connection per request; "
        f"median of {options.rounds} runs"
    )
    shown = "\n\n".join(
        [
            "\n".join(f"- {key}: {value}" for key, value in about.items()),
            table(STREAM_HEADER, stream_rows(full)),
            table(LATENCY_HEADER, latency_rows(paced)),
            table(ONE_TOKEN_HEADER, one_token_rows(one)),
        ]
    )
    print("\n" + shown)
    path = results_path("front-end-http")
    path.write_text(f"# The HTTP front-end alone\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
