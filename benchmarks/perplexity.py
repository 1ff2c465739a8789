"""Perplexity of each weight type on a fixed text, against float32.

    python benchmarks/perplexity.py [--model MODEL] [--weights fp32 bf16 int8 int4]
        [--llama-perplexity PATH --peer int8=Q8_0.gguf int4=Q4_0.gguf]

Windowed as llama.cpp's perplexity tool does by default, so that the figures compare: windows of
512 tokens that do not overlap, the first half of each only read, each token after it (255 a
window) scored given all before it in the window. With `--llama-perplexity` that tool is run on the
files of `--peer` and its figures stand beside ours. Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
from machine import facts, results_path, table
from numpy.typing import NDArray
from tokenizers import Tokenizer

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.resolve import resolve_model
from furiosa_llm.workers.executor import Executor, StepBatch
from furiosa_llm.workers.kernels.native import NativeExecutor
from furiosa_llm.workers.kernels.reference import ReferenceExecutor

TEXT = Path(__file__).parent / "data" / "alice.txt"
WINDOW_LEN = 512
NUM_UNSCORED = WINDOW_LEN // 2 + 1  # tokens read before the first scored one
BLOCK_SIZE = 16
BLOCKS_PER_WINDOW = WINDOW_LEN // BLOCK_SIZE

Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]


def windows_of(artifact: Artifact, text: str) -> Int32:
    """The text's tokens in whole windows, (windows, WINDOW_LEN)."""
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    token_ids = np.array(tokenizer.encode(text).ids, np.int32)
    num_windows = len(token_ids) // WINDOW_LEN
    return token_ids[: num_windows * WINDOW_LEN].reshape(num_windows, WINDOW_LEN)


def surprise(executor: Executor, windows: Int32) -> Float64:
    """The negative log-likelihood of every scored token, always in the same order.

    The windows are sequences of one batch, fed one token a step once their unscored part is read.
    """
    for index in range(len(windows)):
        first_logits = executor.logits(step(windows[index, None, :NUM_UNSCORED], index, 0))
        if index == 0:
            logits = np.empty((len(windows), first_logits.shape[1]), np.float32)
        logits[index] = first_logits[0]
    losses = []
    for position in range(NUM_UNSCORED, WINDOW_LEN):
        losses.append(negative_log_likelihood(logits, windows[:, position]))
        if position < WINDOW_LEN - 1:
            logits = executor.logits(step(windows[:, position, None], 0, position))
    return np.concatenate(losses)


def negative_log_likelihood(logits: NDArray[np.float32], token_ids: Int32) -> Float64:
    """Of one token for each row: (rows,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(wide).sum(axis=1))
    losses: Float64 = log_sums - wide[np.arange(len(wide)), token_ids]
    return losses


def ratio(losses: Float64, base: Float64) -> str:
    """One perplexity over another, with the standard error of that, from token to token."""
    differences = losses - base
    value = math.exp(differences.mean())
    error = value * differences.std() / math.sqrt(len(differences))
    return f"{value:.4f} ± {error:.4f}"


def step(token_ids: Int32, first_window: int, context_len: int) -> StepBatch:
    """A step that appends `token_ids` (rows, n) to the windows from `first_window` on."""
    rows, row_len = token_ids.shape
    first_block, num_blocks = first_window * BLOCKS_PER_WINDOW, rows * BLOCKS_PER_WINDOW

    def filled(value: float, dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.full(rows, value, dtype)

    return StepBatch(
        token_ids=np.ascontiguousarray(token_ids).reshape(-1),
        row_offsets=np.arange(rows + 1, dtype=np.int32) * np.int32(row_len),
        context_lens=np.full(rows, context_len, np.int32),
        block_ids=np.arange(first_block, first_block + num_blocks, dtype=np.int32),
        block_offsets=np.arange(rows + 1, dtype=np.int32) * np.int32(BLOCKS_PER_WINDOW),
        sample_rows=np.arange(rows, dtype=np.int32),
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        choice_index=np.zeros(rows, np.int32),
        num_logprobs=np.full(rows, -1, np.int32),
        history_ids=np.empty(0, np.int32),
        history_offsets=np.zeros(rows + 1, np.int32),
        suppressed_ids=np.empty(0, np.int32),
        suppressed_offsets=np.zeros(rows + 1, np.int32),
    )


def make_executor(artifact: Artifact, num_windows: int) -> Executor:
    """The native executor on all cores, or the numpy one where there is none."""
    num_blocks = num_windows * BLOCKS_PER_WINDOW
    try:
        return NativeExecutor(
            artifact,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            kv_cache_dtype="fp32",
            cpus=tuple((cpu,) for cpu in sorted(os.sched_getaffinity(0))),
            max_num_batched_tokens=max(NUM_UNSCORED, num_windows),
        )
    except FuriosaLLMError as error:
        print(f"numpy instead of native: {error}")
        return ReferenceExecutor(
            artifact, num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_cache_dtype="fp32"
        )


def llama_perplexity(program: Path, gguf: str) -> float:
    """What llama.cpp's tool says of a GGUF file on the same text."""
    run = subprocess.run(
        [program, "-m", gguf, "-f", TEXT, "-c", str(WINDOW_LEN)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", run.stdout + run.stderr)
    if found is None:
        raise SystemExit(f"{program} printed no final estimate for {gguf}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--weights", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/furiosa/llm"))
    parser.add_argument("--llama-perplexity", type=Path, help="llama.cpp's perplexity tool")
    parser.add_argument(
        "--peer", nargs="+", default=[], metavar="WEIGHTS=GGUF", help="files for that tool"
    )
    arguments = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in arguments.peer)
    if bool(peers) != bool(arguments.llama_perplexity):
        parser.error("--peer and --llama-perplexity go together")

    rows = []
    base: Float64 | None = None
    for weights in arguments.weights:
        resolved = resolve_model(arguments.model, cache_dir=arguments.cache_dir, weights=weights)
        artifact = Artifact.open(resolved.path)
        windows = windows_of(artifact, TEXT.read_text(encoding="utf-8"))
        executor = make_executor(artifact, len(windows))
        losses = surprise(executor, windows)
        executor.close()
        if base is None:
            base = losses
        row = [weights, executor.isa, f"{math.exp(losses.mean()):.4f}", ratio(losses, base)]
        if peers:
            peer = peers.get(weights)
            row += (
                [Path(peer).stem, f"{llama_perplexity(arguments.llama_perplexity, peer):.4f}"]
                if peer
                else ["", ""]
            )
        rows.append(row)
        print(" ".join(row), flush=True)
    header = ["weights", "kernel", "perplexity", f"over {arguments.weights[0]}"]
    if peers:
        header += ["llama.cpp's file", "its perplexity"]
    num_scored = len(windows) * (WINDOW_LEN - NUM_UNSCORED)
    report = "\n".join(
        [
            f"# Perplexity of {Path(arguments.model).name}",
            "",
            f"{TEXT.name}, {len(windows)} windows of {WINDOW_LEN} tokens, {num_scored} scored. "
            "± is one standard error of the ratio, from token to token.",
            "",
            table(header, rows),
            "",
            *(f"- {name}: {value}" for name, value in facts().items()),
            "",
        ]
    )
    print(report)
    results_path("perplexity").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
