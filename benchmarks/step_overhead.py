"""What Python takes of a decode step: the time between two native calls.

    python benchmarks/step_overhead.py [--model MODEL] [--weights int8] [--batches 1 16 64]

Scheduler, step queue and native executor as a worker has them, in one process: planning, the step's
arrays, the call, the commit; without the socket, whose messages a worker sends between two looks at
the queue. With one step in flight all of that stands between two calls; with two (the default) the
next step is planned while the current one runs. Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from bench_models import our_artifact
from comparison import WEIGHTS
from limits import CACHE_DIR
from machine import facts, results_path, table
from other_load import OtherLoad

from furiosa_llm.collector import settle
from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.scheduler import Scheduler
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.kernels import native
from furiosa_llm.workers.step_queue import InlineSteps, ThreadedSteps

PROMPT_LEN, BLOCK_SIZE = 64, 16
HEADER = ["sequences", "steps in flight", "step, ms", "between calls, µs", "of a step"]


class TimedLibrary:
    """The native library, with the begin and end of each step's call noted."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.spans: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def fs_engine_step(self, *arguments: Any) -> int:
        begin_s = time.perf_counter()
        status: int = self._library.fs_engine_step(*arguments)
        self.spans.append((begin_s, time.perf_counter()))
        return status


def decode(
    artifact: Artifact, *, num_sequences: int, queue_limit: int, num_steps: int
) -> tuple[float, float]:
    """(seconds of a step, seconds of it between native calls), medians over full decode steps."""
    max_len = PROMPT_LEN + num_steps
    config = SchedulerConfig(
        num_blocks=num_sequences * -(-max_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=max_len,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=2048,
        max_processing_samples=num_sequences,
        queue_limit=queue_limit,
    )
    timed = TimedLibrary(native.library())
    with patch.object(native, "library", return_value=timed):
        executor = native.NativeExecutor(
            artifact,
            num_blocks=config.num_blocks,
            block_size=BLOCK_SIZE,
            kv_cache_dtype="bf16",
            cpus=tuple((cpu,) for cpu in sorted(os.sched_getaffinity(0))),
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
    steps = (
        InlineSteps(executor) if queue_limit == 1 else ThreadedSteps(executor, limit=queue_limit)
    )
    scheduler = Scheduler(config)
    rng = np.random.default_rng(0)
    for sequence_id in range(num_sequences):
        prompt = rng.integers(100, artifact.config.vocab_size, PROMPT_LEN).tolist()
        params = SequenceParams(max_tokens=num_steps)
        assert scheduler.add(sequence_id, prompt, PROMPT_LEN, params) is None
    settle()  # as a worker does
    is_full: list[bool] = []  # by step: all sequences decode
    while scheduler.has_unfinished:
        while (plan := scheduler.plan()) is not None:
            is_full.append(len(plan.rows) == num_sequences == plan.num_tokens)
            steps.submit(plan)
        finished = steps.take_finished()
        if finished is None:
            select.select([steps.wakeup_fd], [], [])
        else:
            scheduler.commit(finished.plan.step_id, finished.result.token_ids.tolist())
    executor.close()
    both_full = [a and b for a, b in pairwise(is_full)]
    pairs = [p for p, counts in zip(pairwise(timed.spans), both_full, strict=True) if counts]
    step_s = statistics.median(after[0] - before[0] for before, after in pairs)
    return step_s, statistics.median(after[0] - before[1] for before, after in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M", help="of bench_models.py")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=["int8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], metavar="SEQUENCES")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR)
    options = parser.parse_args()
    parts = ["\n".join(f"- {key}: {value}" for key, value in facts().items())]
    with OtherLoad() as other:
        for weights in options.weights:
            path = our_artifact(options.model, weights, options.cache_dir.expanduser(), None)
            artifact = Artifact.open(path)
            rows = []
            for num_sequences in options.batches:
                for queue_limit in (1, 2):
                    step_s, between_s = decode(
                        artifact,
                        num_sequences=num_sequences,
                        queue_limit=queue_limit,
                        num_steps=options.steps,
                    )
                    rows.append(
                        [
                            str(num_sequences),
                            str(queue_limit),
                            f"{1e3 * step_s:.2f}",
                            f"{1e6 * between_s:.0f}",
                            f"{100 * between_s / step_s:.1f} %",
                        ]
                    )
                    print("  ".join([weights, *rows[-1]]), flush=True)
            parts.append(f"## {options.model}, {weights}\n\n" + table(HEADER, rows))
    parts[0] += f"\n- other processes meanwhile: {other.cores:.2f} cores busy"
    shown = "\n\n".join(parts)
    print("\n" + shown)
    path = results_path("step-overhead")
    path.write_text(f"# Python's share of a step\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
