"""The numpy executor: its parts against plain definitions, its bits against itself."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from step_batches import Row, Sampling, step_batch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_artifact

from furiosa_llm.errors import EngineShutDownError, InvalidRequestError
from furiosa_llm.workers import sampler
from furiosa_llm.workers.artifact.artifact import Artifact, Tensor
from furiosa_llm.workers.artifact.packing import from_bf16, pack_matrix, pack_quantized, to_bf16
from furiosa_llm.workers.artifact.quantize import quantize
from furiosa_llm.workers.artifact.rotation import hadamard
from furiosa_llm.workers.artifact.sizes import scale_group
from furiosa_llm.workers.kernels.reference import ReferenceExecutor
from furiosa_llm.workers.kernels.reference_matmul import (
    MAX_COLS,
    TILE_ROWS,
    FloatMatrix,
    load_matrix,
    quantize_activations,
)
from furiosa_llm.workers.kernels.reference_ops import (
    PIECE_LEN,
    attend,
    rms_norm,
    rotate,
    rotation,
    swiglu,
)

DTYPES = ("fp32", "bf16", "int8", "int8-file", "int4", "int4-min", "nested4", "int6")


def random_floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---- matrices ----------------------------------------------------------------------------------


def packed(values: np.ndarray, dtype: str) -> Tensor:
    """`dtype` int4-min is int4 with mins; int8-file is not rotated, like blocks from a file."""
    if dtype == "int4-min":
        blocks = quantize(values, "int4").with_mins()
        return Tensor("int4", *values.shape, True, True, pack_quantized(blocks))
    if dtype == "int8-file":
        blocks = replace(quantize(values, "int8"), rotated=False)
        return Tensor("int8", *values.shape, False, False, pack_quantized(blocks))
    rotated = dtype in ("int8", "int4", "nested4", "int6")
    return Tensor(dtype, *values.shape, False, rotated, pack_matrix(values, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, TILE_ROWS, 2 * TILE_ROWS + 3])
def test_product_is_that_of_the_unpacked_matrix(dtype, num_rows):
    cols = 128 if dtype in ("nested4", "int6") else 96
    tensor = packed(random_floats(0, 50, cols), dtype)
    x = random_floats(1, num_rows, cols)
    if num_rows:
        x[0, :32] = 0  # a group without a scale
    y = load_matrix(tensor).product(x)
    weights = tensor.unpack().astype(np.float64)
    inputs = x.astype(np.float64)
    if dtype == "bf16":
        inputs = from_bf16(to_bf16(x)).astype(np.float64)
    if dtype not in ("fp32", "bf16"):
        rotated = hadamard(x) if tensor.rotated else x
        group = scale_group(cols, tensor.dtype, tensor.rotated)
        q, scales = quantize_activations(rotated, group)
        inputs = (q.astype(np.float64) * scales[:, :, None]).reshape(x.shape)
        if tensor.rotated:
            inputs = hadamard(inputs.astype(np.float32)).astype(np.float64) / 32
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, inputs @ weights.T, rtol=0, atol=3e-5)


def test_columns_beyond_one_call_are_added():
    weights, x = random_floats(0, 20, MAX_COLS + 40), random_floats(1, 3, MAX_COLS + 40)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    np.testing.assert_allclose(FloatMatrix(weights).product(x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (37, 384), (576, 576), (130, MAX_COLS + 64)])
def test_bits_of_a_product_do_not_depend_on_the_number_of_rows(dtype, shape):
    matrix = load_matrix(packed(random_floats(0, *shape), dtype))
    x = random_floats(1, 2 * TILE_ROWS + 5, shape[1])
    whole = matrix.product(x)
    for start in (0, 1, 3, TILE_ROWS):
        for count in (1, 2, 7, TILE_ROWS, TILE_ROWS + 1):
            rows = slice(start, start + count)
            assert np.array_equal(matrix.product(x[rows]), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_unpacked_matrix(dtype):
    tensor = packed(random_floats(0, 20, 64), dtype)
    ids = np.array([19, 0, 3, 0], np.int32)
    expected = tensor.unpack()[ids]
    assert np.array_equal(load_matrix(tensor).take_rows(ids), expected)


def test_activations_are_rounded_half_to_even():
    x = np.zeros((2, 64), np.float32)
    x[0, :6] = [127, 0.5, 1.5, -2.5, 126.5, 0.49]  # the scale is 1
    q, scales = quantize_activations(x)
    assert scales.tolist() == [[1, 0], [0, 0]]
    assert q[0, 0, :6].tolist() == [127, 0, 2, -2, 126, 0]
    assert not q[1].any()


# ---- the other operations ----------------------------------------------------------------------


def test_rms_norm_is_its_formula():
    x, weight = random_floats(0, 3, 2, 40) * 5, random_floats(1, 40)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 0.25) * weight
    np.testing.assert_allclose(rms_norm(x, weight, 0.25), expected, rtol=1e-6)


def test_rotation_turns_pairs_by_position_times_frequency():
    inv_freq = np.array([1.0, 0.25], np.float32)
    x = random_floats(0, 3, 2, 4)
    positions = np.array([0, 3, 1000], np.int32)
    turned = rotate(x, *rotation(positions, inv_freq))
    pairs = x[..., :2] + 1j * x[..., 2:]
    expected = pairs * np.exp(1j * positions[:, None, None] * inv_freq)
    np.testing.assert_allclose(
        turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-6
    )
    assert np.array_equal(turned[0], x[0]), "position 0 is not turned"


def test_swiglu_is_its_formula_and_does_not_overflow():
    gate = np.array([[0.0, 1.5, -2.0, 1000.0, -1000.0]], np.float32)
    up = np.array([[3.0, -2.0, 4.0, 1.0, 7.0]], np.float32)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    result = swiglu(np.concatenate([gate, up], axis=1))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("sliding_window", [0, 1, 5, 100])
def test_attention_is_its_formula(sliding_window):
    num_heads, num_kv_heads, head_dim, context = 6, 2, 8, 2 * PIECE_LEN
    positions = np.array([0, 4, 63, 64, 90], np.int32)
    q = random_floats(0, len(positions), num_heads, head_dim)
    keys, values = random_floats(1, 2, num_kv_heads, context, head_dim)
    result = attend(q, keys, values, positions, sliding_window)
    for token, position in enumerate(positions):
        first = max(0, position + 1 - sliding_window) if sliding_window else 0
        seen = slice(first, position + 1)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = keys[kv_head, seen].astype(np.float64) @ q[token, head] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ values[kv_head, seen]
            np.testing.assert_allclose(result[token, head], expected, atol=2e-6)


# ---- the executor ------------------------------------------------------------------------------

PROMPT = [(7 * i + 3) % VOCAB_SIZE for i in range(70)]  # over a piece of attention

MakeExecutor = Callable[..., ReferenceExecutor]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Artifact]:
    root: Path = tmp_path_factory.mktemp("reference")
    return lambda architecture, weights: tiny_artifact(root, architecture, weights)


def executor_of(artifact: Artifact, block_size: int = 16, kv_cache_dtype: str = "fp32"):
    return ReferenceExecutor(
        artifact, num_blocks=512 // block_size, block_size=block_size, kv_cache_dtype=kv_cache_dtype
    )


def table_of(sequence: int, block_size: int = 16) -> list[int]:
    """A scattered block table for 128 tokens, apart from those of three other sequences."""
    return [sequence + 4 * i for i in reversed(range(128 // block_size))]


def logits_in_chunks(executor: ReferenceExecutor, chunk: int, block_size: int = 16) -> np.ndarray:
    """The logits after each chunk's last token of PROMPT, with other rows in every step."""
    other = [(11 * i) % VOCAB_SIZE for i in range(len(PROMPT))]
    results = []
    for start in range(0, len(PROMPT), chunk):
        rows = [
            Row(start, other[start : start + chunk], table_of(2, block_size), None),
            Row(start, PROMPT[start : start + chunk], table_of(1, block_size)),
            Row(0, other[:5], table_of(3, block_size)),
        ]
        results.append(executor.logits(step_batch(rows))[0])
    return np.stack(results)


@pytest.mark.parametrize(
    ("architecture", "weights", "kv_cache_dtype"),
    [
        *((architecture, "fp32", "fp32") for architecture in ARCHITECTURES),
        ("llama", "bf16", "bf16"),
        ("qwen2", "int8", "bf16"),
        ("qwen3", "int4", "fp32"),
    ],
)
def test_bits_do_not_depend_on_batch_chunks_or_blocks(
    artifact_of, architecture, weights, kv_cache_dtype
):
    artifact = artifact_of(architecture, weights)
    whole = executor_of(artifact, kv_cache_dtype=kv_cache_dtype).all_logits(
        step_batch([Row(0, PROMPT, table_of(1))])
    )
    assert np.abs(whole).max() > 1
    for chunk, block_size in ((1, 16), (7, 8), (33, 32)):
        executor = executor_of(artifact, block_size, kv_cache_dtype)
        ends = [min(start + chunk, len(PROMPT)) - 1 for start in range(0, len(PROMPT), chunk)]
        assert np.array_equal(logits_in_chunks(executor, chunk, block_size), whole[ends])


_DIGEST_SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from furiosa_llm.workers.artifact.artifact import Artifact
from test_reference import PROMPT, digest_of_bits
print(digest_of_bits(Artifact.open(sys.argv[1])))
"""


def digest_of_bits(artifact: Artifact) -> str:
    """Of a model's logits, and of a product large enough for BLAS to use several threads."""
    logits = executor_of(artifact).all_logits(step_batch([Row(0, PROMPT, table_of(1))]))
    y = FloatMatrix(random_floats(0, 1536, 1200)).product(random_floats(1, 9, 1200))
    return hashlib.sha256(logits.tobytes() + y.tobytes()).hexdigest()


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_blas_threads(artifact_of):
    artifact = artifact_of("llama", "fp32")
    digests = [
        subprocess.run(
            [sys.executable, "-c", _DIGEST_SCRIPT, str(artifact.path)],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    ]
    assert len(digests[0]) > 60
    assert digests[0] == digests[1]


def test_a_sliding_window_reaches_as_far_as_its_layers(artifact_of):
    """Three layers of 16 positions see 45 tokens back, and not one more."""
    executor = executor_of(artifact_of("mistral", "fp32"))

    def last_logits(prompt: list[int]) -> np.ndarray:
        return executor.logits(step_batch([Row(0, prompt, table_of(0))]))

    changed = [PROMPT[0] + 1, *PROMPT[1:]]
    assert not np.array_equal(last_logits(PROMPT[:46]), last_logits(changed[:46]))
    assert np.array_equal(last_logits(PROMPT[:47]), last_logits(changed[:47]))


def test_a_bf16_cache_rounds_what_it_holds(artifact_of):
    """The token itself reads its own key and value back from the cache: even one is rounded."""
    artifact = artifact_of("llama", "fp32")
    batch = step_batch([Row(0, PROMPT[:1], table_of(0))])
    exact = executor_of(artifact).logits(batch)
    rounded = executor_of(artifact, kv_cache_dtype="bf16").logits(batch)
    assert 0 < np.abs(exact - rounded).max() < 0.2


def test_execute_samples_what_logits_say(artifact_of):
    executor = executor_of(artifact_of("llama", "int8"))
    batch = step_batch(
        [
            Row(0, PROMPT[:9], table_of(0), Sampling(num_logprobs=3)),
            Row(0, PROMPT[:5], table_of(1), None),
            Row(0, PROMPT[:7], table_of(2), Sampling(temperature=0.9, seed=3, num_logprobs=0)),
        ]
    )
    result = executor.execute(batch)
    expected = sampler.sample(executor.logits(batch), batch)
    for name in ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs"):
        assert np.array_equal(getattr(result, name), getattr(expected, name))
    assert executor.isa == "numpy"


def test_a_closed_executor_refuses(artifact_of):
    executor = executor_of(artifact_of("llama", "fp32"))
    executor.close()
    executor.close()
    with pytest.raises(EngineShutDownError):
        executor.execute(step_batch([Row(0, [1], [0])]))


def test_an_unknown_cache_type_is_refused(artifact_of):
    with pytest.raises(InvalidRequestError, match="'fp8'; it must be one of fp32, bf16, int8"):
        executor_of(artifact_of("llama", "fp32"), kv_cache_dtype="fp8")
