"""Steps whose rows all ask for the likeliest token, of which the native kernel keeps no logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from step_batches import Row, Sampling, step_batch
from test_native_matmul import packed_tensor
from tiny_models import VOCAB_SIZE, tiny_artifact

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.executor import StepBatch
from furiosa_llm.workers.kernels import native_library
from furiosa_llm.workers.kernels.native import NativeExecutor

NUM_ROWS = 150  # more than a matrix product takes at a time


def one_token_rows(*, num_rows: int = NUM_ROWS, sampling: Sampling | None = None) -> StepBatch:
    sampling = sampling or Sampling()
    return step_batch([Row(0, [(7 * i + 3) % 300], [i], sampling) for i in range(num_rows)])


def executor_of(artifact: Artifact, *, isa: str | None = None, num_pes: int = 2) -> NativeExecutor:
    return NativeExecutor(
        artifact,
        num_blocks=NUM_ROWS,
        block_size=16,
        kv_cache_dtype="fp32",
        cpus=((),) * num_pes,
        max_num_batched_tokens=NUM_ROWS,
        isa=isa,
    )


def patch_head(monkeypatch: pytest.MonkeyPatch, artifact: Artifact, head: np.ndarray) -> None:
    packed = packed_tensor(head.astype(np.float32), "fp32")
    tensor_of = artifact.tensor
    monkeypatch.setattr(
        Artifact, "tensor", lambda _, name: packed if name == "lm_head" else tensor_of(name)
    )


@pytest.mark.parametrize("isa", native_library.available_isas())
@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("num_rows", [1, 3, 20, NUM_ROWS])
def test_it_is_the_highest_logit(tmp_path: Path, isa: str, weights: str, num_rows: int) -> None:
    executor = executor_of(tiny_artifact(tmp_path, "llama", weights), isa=isa)
    batch = one_token_rows(num_rows=num_rows)
    logits = executor.logits(batch)
    tokens = executor.execute(batch).token_ids
    assert np.array_equal(tokens, logits.argmax(axis=1))
    assert num_rows < 20 or len(set(tokens.tolist())) > 5
    executor.close()


def test_a_row_that_asks_for_more_changes_no_token(tmp_path: Path) -> None:
    executor = executor_of(tiny_artifact(tmp_path, "llama", "fp32"))
    batch = one_token_rows()
    likeliest = executor.execute(batch).token_ids.copy()
    num_logprobs = np.full(NUM_ROWS, -1, np.int32)
    num_logprobs[7] = 0
    assert np.array_equal(
        executor.execute(replace(batch, num_logprobs=num_logprobs)).token_ids, likeliest
    )
    executor.close()


@pytest.mark.parametrize("num_pes", [1, 2, 5])
def test_of_equal_logits_the_first_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_pes: int
) -> None:
    """Wherever the PEs' shares of the vocabulary begin."""
    artifact = tiny_artifact(tmp_path, "llama", "fp32")
    head = artifact.tensor("lm_head").unpack()
    patch_head(monkeypatch, artifact, np.tile(head[:37], (11, 1))[:VOCAB_SIZE])
    executor = executor_of(artifact, num_pes=num_pes)
    batch = one_token_rows()
    for _ in range(5):  # which PE is how fast differs
        tokens = executor.execute(batch).token_ids
        assert np.array_equal(tokens, executor.logits(batch).argmax(axis=1))
        assert tokens.max() < 37
    executor.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 200, VOCAB_SIZE - 1])
def test_logits_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, place: int
) -> None:
    artifact = tiny_artifact(tmp_path, "llama", "fp32")
    head = artifact.tensor("lm_head").unpack()
    head[place] = bad
    patch_head(monkeypatch, artifact, head)
    executor = executor_of(artifact)
    with pytest.raises(FuriosaLLMError, match="row 0: the model's logits are NaN or infinite"):
        executor.execute(one_token_rows())
    executor.close()
