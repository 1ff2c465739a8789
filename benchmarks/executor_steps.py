"""Our side of vs_llamacpp.py: whole steps of the native executor, sampling included.

    python benchmarks/executor_steps.py '{"artifact": PATH, "num_sequences": 4, "num_in": 64, ...}'

A fresh process that opens an artifact, runs one shape and prints one JSON line. This is the level
at which llama.cpp's own tools measure, with no scheduler and no socket; but each step's arrays are
made from a plan as a worker makes them, and sampling (the likeliest token) is done, which theirs
leave out. KV is bf16 where theirs is f16.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.step_plan import StepPlan, StepRow
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.sizes import weight_type
from furiosa_llm.workers.batch import BatchBuilder
from furiosa_llm.workers.executor import StepBatch
from furiosa_llm.workers.kernels.native import NativeExecutor

BLOCK_SIZE = 16
CHUNK = 512  # tokens of one prefill step; llama.cpp's -ub, at its default
KV_CACHE_DTYPE, KV_NBYTES = "bf16", 2


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run of one shape; prefill and decode are timed apart."""

    isa: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    num_steps: int  # of the decode
    nbytes_per_step: float  # weights and KV that a decode step reads
    ops_per_token: dict[str, int]  # of any token in the layers' products, by weight type
    ops_per_sample: dict[str, int]  # what a sampled token adds, the LM head's among them
    attention_ops_per_token: float  # scores and sums of values, over the mean context


class Sequences:
    """Some sequences of equal length, each with a contiguous run of blocks, sampled greedily."""

    def __init__(self, num_sequences: int, max_len: int) -> None:
        self._num_sequences = num_sequences
        self._params = SequenceParams(max_tokens=max_len)
        per_sequence = -(-max_len // BLOCK_SIZE)
        self.num_blocks = num_sequences * per_sequence
        self._block_tables = [
            tuple(range(first, first + per_sequence))
            for first in range(0, self.num_blocks, per_sequence)
        ]
        self._builder = BatchBuilder()

    def step(self, start: int, token_ids: dict[int, list[int]], *, samples: bool) -> StepBatch:
        """Append tokens to sequences (index -> tokens) that hold `start` tokens each."""
        rows = tuple(
            StepRow(
                sequence_id=index,
                start=start,
                token_ids=tuple(tokens),
                block_ids=self._block_tables[index],
                params=self._params if samples else None,
            )
            for index, tokens in token_ids.items()
        )
        return self._builder.build(StepPlan(0, rows)).batch

    def prefill(self, prompts: list[list[int]]) -> Iterator[tuple[list[int], StepBatch]]:
        """The steps of all prompts, CHUNK tokens each; the sequences whose prompt a step ends."""
        num_in = len(prompts[0])
        num_rows = max(1, CHUNK // num_in)
        for first in range(0, self._num_sequences, num_rows):
            indices = list(range(first, min(first + num_rows, self._num_sequences)))
            for start in range(0, num_in, CHUNK):
                end = min(start + CHUNK, num_in)
                tokens = {index: prompts[index][start:end] for index in indices}
                is_end = end == num_in
                yield indices if is_end else [], self.step(start, tokens, samples=is_end)


def run(
    artifact: Artifact, *, num_sequences: int, num_in: int, num_out: int, num_threads: int
) -> Measured:
    """Prefill all prompts, then `num_out` steps of one token for each sequence."""
    sequences = Sequences(num_sequences, num_in + num_out)
    executor = NativeExecutor(
        artifact,
        num_blocks=sequences.num_blocks,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=KV_CACHE_DTYPE,
        cpus=tuple((cpu,) for cpu in sorted(os.sched_getaffinity(0))[:num_threads]),
        max_num_batched_tokens=max(CHUNK, num_sequences),
    )
    shape = (num_sequences, num_in)
    prompts = np.random.default_rng(0).integers(100, artifact.config.vocab_size, shape).tolist()
    # The first touch of weights, buffers and cache is not timed, on either side.
    for _, batch in sequences.prefill(prompts):
        executor.execute(batch)
    latest: dict[int, list[int]] = {}
    begin_s = time.perf_counter()
    for ended, batch in sequences.prefill(prompts):
        sampled = executor.execute(batch).token_ids.tolist()
        latest |= {index: [token] for index, token in zip(ended, sampled, strict=True)}
    prefilled_s = time.perf_counter()
    for position in range(num_in, num_in + num_out):
        batch = sequences.step(position, latest, samples=True)
        sampled = executor.execute(batch).token_ids.tolist()
        latest = {index: [token] for index, token in zip(latest, sampled, strict=True)}
    end_s = time.perf_counter()
    executor.close()
    return Measured(
        isa=executor.isa,
        prefill_tokens_per_s=num_sequences * num_in / (prefilled_s - begin_s),
        decode_tokens_per_s=num_sequences * num_out / (end_s - prefilled_s) if num_out else 0.0,
        num_steps=num_out,
        nbytes_per_step=_weights_nbytes(artifact)
        + num_sequences * (num_in + num_out / 2) * _kv_nbytes(artifact),
        ops_per_token=_ops(artifact, set(_layer_matrices(artifact)) - _of_sampled(artifact)),
        ops_per_sample=_ops(artifact, {*_of_sampled(artifact), _head_matrix(artifact)}),
        attention_ops_per_token=_attention_ops(artifact, num_in, num_out),
    )


def _layer_matrices(artifact: Artifact) -> list[str]:
    names = [name for name in artifact.names if name.startswith("layers.")]
    return [name for name in names if artifact.tensor(name).rows > 1]


def _of_sampled(artifact: Artifact) -> set[str]:
    """The matrices past the last layer's keys and values: only sampled tokens get there."""
    last = f"layers.{artifact.config.num_layers - 1}."
    return {last + name for name in ("o", "gate_up", "down")}


def _head_matrix(artifact: Artifact) -> str:
    return "lm_head" if "lm_head" in artifact.names else "embed"


def _weights_nbytes(artifact: Artifact) -> int:
    names = [*_layer_matrices(artifact), _head_matrix(artifact)]
    return sum(artifact.tensor(name).data.nbytes for name in names)


def _kv_nbytes(artifact: Artifact) -> int:
    """Of one token: keys and values of all layers."""
    config = artifact.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_NBYTES


def _attention_ops(artifact: Artifact, num_in: int, num_out: int) -> float:
    """Of one token. A prompt's tokens attend to half of it, and not in the last layer."""
    config = artifact.config
    positions = num_in + num_out / 2 if num_out else num_in / 2
    num_layers = config.num_layers if num_out else config.num_layers - 1
    return 4 * num_layers * config.num_heads * config.head_dim * positions


def _ops(artifact: Artifact, names: Iterable[str]) -> dict[str, int]:
    ops: dict[str, int] = {}
    for name in names:
        tensor = artifact.tensor(name)
        kind = weight_type(tensor.dtype)
        ops[kind] = ops.get(kind, 0) + 2 * tensor.rows * tensor.cols
    return ops


def main() -> None:
    asked = json.loads(sys.argv[1])
    artifact = Artifact.open(Path(asked.pop("artifact")))
    print(json.dumps(asdict(run(artifact, **asked))))


if __name__ == "__main__":
    main()
