"""Load time of a 1-billion-parameter artifact: from process start until it can serve.

    python benchmarks/load.py [--weights int8 int4 bf16] [--models 1B-shaped] [--repeats 5]

The artifact (random weights of Llama-3.2-1B's shape, made once in the cache) is read into the page
cache first; then each run is a fresh process. "worker" is what one worker does: interpreter,
opening the artifact, engine, KV cache and threads; "engine ready" and "first token" are
startup.py's stages of a whole engine, its tokenizer of 128,256 tokens included. Writes
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_models import MODELS, our_artifact
from comparison import WEIGHTS
from limits import CACHE_DIR
from machine import facts, results_path, table
from other_load import OtherLoad
from startup import STAGES, run_fresh

BAR_S = 1.0
BLOCK_SIZE, KV_NBYTES = 16, 2 << 30
COLUMNS = ("worker", "engine ready", "first token")


def worker_ready(path: Path, begun_s: float) -> None:
    """What the fresh process does: print the seconds since `begun_s` when a worker could serve."""
    from furiosa_llm.workers.artifact.artifact import Artifact
    from furiosa_llm.workers.kernels.native import NativeExecutor

    artifact = Artifact.open(path)
    config = artifact.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    executor = NativeExecutor(
        artifact,
        num_blocks=KV_NBYTES // (per_token * BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        kv_cache_dtype="bf16",
        cpus=tuple((cpu,) for cpu in sorted(os.sched_getaffinity(0))),
        max_num_batched_tokens=2048,
    )
    print(time.time() - begun_s)
    executor.close()


def fresh_worker_s(path: Path) -> float:
    command = [sys.executable, __file__, "--worker", str(path), repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return float(done.stdout.splitlines()[-1])


def warm_page_cache(path: Path) -> None:
    with (path / "weights.bin").open("rb") as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["1B-shaped"])
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=["int4", "int8"])
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR)
    options = parser.parse_args()
    about = facts()
    rows = []
    with OtherLoad() as other:
        for model in options.models:
            for weights in options.weights:
                path = our_artifact(model, weights, options.cache_dir.expanduser(), None)
                warm_page_cache(path)
                size = (path / "weights.bin").stat().st_size
                times: dict[str, list[float]] = {column: [] for column in COLUMNS}
                for _ in range(options.repeats):
                    times["worker"].append(fresh_worker_s(path))
                    stages = dict(zip(STAGES, run_fresh(["--model", str(path)]), strict=True))
                    for column in COLUMNS[1:]:
                        times[column].append(stages[column])
                row = [model, weights, f"{size / 1e9:.2f}"]
                for column in COLUMNS:
                    median = statistics.median(times[column])
                    row.append(
                        f"{median:.3f} ({min(times[column]):.3f} – {max(times[column]):.3f})"
                    )
                rows.append([*row, f"{BAR_S:g}"])
                print("  ".join(row), flush=True)
    about["other processes meanwhile"] = f"{other.cores:.2f} cores busy"
    header = ["model", "weights", "GB", *(f"{column}, s" for column in COLUMNS), "bar, s"]
    shown = "\n".join(
        [
            *(f"- {key}: {value}" for key, value in about.items()),
            "",
            f"Seconds since process start, medians of {options.repeats} (least – most).",
            "",
            table(header, rows),
        ]
    )
    print("\n" + shown)
    path = results_path("load")
    path.write_text(f"# Load time\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker_ready(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
