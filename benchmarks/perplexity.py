"""Perplexity of each weight type on a fixed text, against float32.

    python benchmarks/perplexity.py [--model MODEL] [--weights fp32 bf16 int8 int4]
        [--kv-cache-dtype bf16]
        [--llama-perplexity PATH --peer int8=Q8_0.gguf int4=Q4_0.gguf] [--quantized MODEL.gguf]

Windowed as llama.cpp's perplexity tool does by default, so that the figures compare: windows of
512 tokens that do not overlap, the first half of each only read, each token after it (255 a
window) scored given all before it in the window. With `--llama-perplexity` that tool is run on the
files of `--peer` and its figures stand beside ours. `--quantized` adds a row for a file whose own
blocks are imported number for number; both sides read it.

Perplexity is a noisy judge of small errors: rounding helps the text's own next token about as often
as it hurts. So the Kullback-Leibler divergence from float32's distribution stands beside it, over
the first windows: it counts every change as a loss, and its standard error is far smaller.

Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import facts, results_path, table
from numpy.typing import NDArray
from tokenizers import Tokenizer

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.step_plan import StepPlan, StepRow
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.resolve import resolve_model
from furiosa_llm.workers.batch import BatchBuilder
from furiosa_llm.workers.executor import Executor, StepBatch
from furiosa_llm.workers.kernels.native import NativeExecutor
from furiosa_llm.workers.kernels.reference import ReferenceExecutor

TEXT = Path(__file__).parent / "data" / "alice.txt"
WINDOW_LEN = 512
NUM_UNSCORED = WINDOW_LEN // 2 + 1  # tokens read before the first scored one
BLOCK_SIZE = 16
BLOCKS_PER_WINDOW = WINDOW_LEN // BLOCK_SIZE
KL_WINDOWS = 16  # that divergence is measured on: 0.8 GB of log-probabilities of 49,152 tokens

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def windows_of(artifact: Artifact, text: str) -> Int32:
    """The text's tokens in whole windows, (windows, WINDOW_LEN)."""
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    token_ids = np.array(tokenizer.encode(text).ids, np.int32)
    num_windows = len(token_ids) // WINDOW_LEN
    return token_ids[: num_windows * WINDOW_LEN].reshape(num_windows, WINDOW_LEN)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of the text, in one fixed order of the scored tokens."""

    losses: Float64  # the negative log-likelihood of each
    log_probs: Float32  # (positions, the first windows, vocabulary): whole distributions

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())

    def divergence_from(self, base: Scores) -> str:
        """The mean KL divergence of these distributions from `base`, with its standard error."""
        found = np.concatenate(
            [
                (np.exp(p) * (p - q)).sum(axis=1)
                for p, q in zip(base.log_probs, self.log_probs, strict=True)
            ]
        )
        return f"{found.mean():.5f} ± {found.std() / math.sqrt(len(found)):.5f}"


def score(executor: Executor, windows: Int32) -> Scores:
    """Score the text.

    The windows are sequences of one batch, fed one token a step once their unscored part is read.
    """
    for index in range(len(windows)):
        first_logits = executor.logits(step(windows[index, None, :NUM_UNSCORED], index, 0))
        if index == 0:
            logits = np.empty((len(windows), first_logits.shape[1]), np.float32)
        logits[index] = first_logits[0]
    losses, log_probs = [], []
    for position in range(NUM_UNSCORED, WINDOW_LEN):
        distributions = log_softmax(logits)
        losses.append(-distributions[np.arange(len(windows)), windows[:, position]])
        log_probs.append(distributions[:KL_WINDOWS].astype(np.float32))
        if position < WINDOW_LEN - 1:
            logits = executor.logits(step(windows[:, position, None], 0, position))
    return Scores(np.concatenate(losses), np.stack(log_probs))


def log_softmax(logits: Float32) -> Float64:
    """Of each row: (rows, vocabulary)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def ratio(losses: Float64, base: Float64) -> str:
    """One perplexity over another, with the standard error of that, from token to token."""
    differences = losses - base
    value = math.exp(differences.mean())
    error = value * differences.std() / math.sqrt(len(differences))
    return f"{value:.4f} ± {error:.4f}"


def step(token_ids: Int32, first_window: int, context_len: int) -> StepBatch:
    """A step that appends `token_ids` (rows, n) to the windows from `first_window` on."""
    rows = tuple(
        StepRow(
            sequence_id=window,
            start=context_len,
            token_ids=tuple(tokens),
            block_ids=tuple(range(window * BLOCKS_PER_WINDOW, (window + 1) * BLOCKS_PER_WINDOW)),
            params=SequenceParams(max_tokens=1),
        )
        for window, tokens in enumerate(token_ids.tolist(), start=first_window)
    )
    return BatchBuilder().build(StepPlan(0, rows)).batch


def make_executor(artifact: Artifact, num_windows: int, kv_cache_dtype: str) -> Executor:
    """The native executor on all cores, or the numpy one where there is none."""
    num_blocks = num_windows * BLOCKS_PER_WINDOW
    try:
        return NativeExecutor(
            artifact,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            kv_cache_dtype=kv_cache_dtype,
            cpus=tuple((cpu,) for cpu in sorted(os.sched_getaffinity(0))),
            max_num_batched_tokens=max(NUM_UNSCORED, num_windows),
        )
    except FuriosaLLMError as error:
        print(f"numpy instead of native: {error}")
        return ReferenceExecutor(
            artifact, num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_cache_dtype=kv_cache_dtype
        )


class LlamaPerplexity:
    """llama.cpp's tool on the same text.

    Args:
        base: the float32 GGUF whose distributions divergence is measured from.
    """

    def __init__(self, program: Path, base: str, directory: Path) -> None:
        self._program = program
        self._base = directory / "base.kld"
        self._run("-m", base, "--chunks", str(KL_WINDOWS), "--kl-divergence-base", str(self._base))

    def perplexity(self, gguf: str) -> str:
        """On the whole text."""
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", self._run("-m", gguf))
        if found is None:
            raise SystemExit(f"{self._program} printed no final estimate for {gguf}")
        return found[1]

    def divergence(self, gguf: str) -> str:
        """On the first windows."""
        said = self._run(
            "-m",
            gguf,
            "--chunks",
            str(KL_WINDOWS),
            "--kl-divergence-base",
            str(self._base),
            "--kl-divergence",
        )
        found = re.search(r"Mean +KLD: +(-?[0-9.]+) ± +([0-9.]+)", said)
        if found is None:
            raise SystemExit(f"{self._program} printed no mean divergence for {gguf}")
        return f"{float(found[1]):.5f} ± {float(found[2]):.5f}"

    def _run(self, *options: str) -> str:
        run = subprocess.run(
            [self._program, "-f", TEXT, "-c", str(WINDOW_LEN), *options],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout + run.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--weights", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument(
        "--kv-cache-dtype", default="fp32", help="of all rows but the first, which is the base"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/furiosa/llm"))
    parser.add_argument("--llama-perplexity", type=Path, help="llama.cpp's perplexity tool")
    parser.add_argument(
        "--peer", nargs="+", default=[], metavar="WEIGHTS=GGUF", help="files for that tool"
    )
    parser.add_argument("--quantized", type=Path, help="a GGUF file to take as it comes")
    arguments = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in arguments.peer)
    if bool(peers) != bool(arguments.llama_perplexity):
        parser.error("--peer and --llama-perplexity go together")

    sources = [(weights, arguments.model, weights) for weights in arguments.weights]
    if arguments.quantized is not None:
        label = f"{arguments.quantized.name} as it comes"
        sources.append((label, str(arguments.quantized), "auto"))
        peers[label] = str(arguments.quantized)

    rows = []
    base: Scores | None = None
    with tempfile.TemporaryDirectory() as directory:
        peer_tool = None
        if peers:
            base_file = peers[arguments.weights[0]]
            peer_tool = LlamaPerplexity(arguments.llama_perplexity, base_file, Path(directory))
        for label, model, weights in sources:
            resolved = resolve_model(model, cache_dir=arguments.cache_dir, weights=weights)
            artifact = Artifact.open(resolved.path)
            windows = windows_of(artifact, TEXT.read_text(encoding="utf-8"))
            kv_cache_dtype = "fp32" if base is None else arguments.kv_cache_dtype
            executor = make_executor(artifact, len(windows), kv_cache_dtype)
            scores = score(executor, windows)
            executor.close()
            if base is None:
                base = scores
            over_base = ratio(scores.losses, base.losses)
            divergence = scores.divergence_from(base)
            row = [
                label,
                kv_cache_dtype,
                executor.isa,
                f"{scores.perplexity:.4f}",
                over_base,
                divergence,
            ]
            if peer_tool is not None:
                peer = peers.get(label)
                row += (
                    [Path(peer).stem, peer_tool.perplexity(peer), peer_tool.divergence(peer)]
                    if peer
                    else ["", "", ""]
                )
            rows.append(row)
            print(" ".join(row), flush=True)
    header = [
        "weights",
        "KV cache",
        "kernel",
        "perplexity",
        f"over {arguments.weights[0]}",
        "divergence",
    ]
    if peers:
        header += ["llama.cpp's file", "its perplexity", "its divergence"]
    num_scored = len(windows) * (WINDOW_LEN - NUM_UNSCORED)
    report = "\n".join(
        [
            f"# Perplexity of {Path(arguments.model).name}",
            "",
            f"{TEXT.name}, {len(windows)} windows of {WINDOW_LEN} tokens, {num_scored} scored. "
            "± is one standard error, from token to token. Divergence: mean KL from float32's "
            f"distribution, in nats, over the first {KL_WINDOWS} windows.",
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
