"""The native kernel: right against the numpy reference, bit-identical against itself."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_batches import Row, Sampling, step_batch
from test_native_matmul import packed_tensor
from test_native_sampling import assert_same
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_artifact

from furiosa_llm.errors import EngineShutDownError, FuriosaLLMError, InvalidRequestError
from furiosa_llm.workers import sampler
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.kernels import native_library
from furiosa_llm.workers.kernels.native import NativeExecutor
from furiosa_llm.workers.kernels.reference import ReferenceExecutor

THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}
ISAS = native_library.available_isas()
WEIGHTS = ("fp32", "bf16", "int8", "int4")
PROMPTS = (
    [5, 77, 301, 12, 9, 240, 33],
    [(7 * i) % VOCAB_SIZE for i in range(90)],  # longer than a piece of attention, not a multiple
    [1],
    [(11 * i + 3) % VOCAB_SIZE for i in range(33)],
)

MakeExecutor = Callable[..., NativeExecutor]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    root: Path = tmp_path_factory.mktemp("native")
    return lambda architecture, weights, **options: tiny_artifact(
        root, architecture, weights, **options
    )


@pytest.fixture
def make_executor() -> Iterator[MakeExecutor]:
    opened = []

    def make(artifact: Artifact, **options: Any) -> NativeExecutor:
        defaults: dict[str, Any] = {
            "num_blocks": 64,
            "block_size": 16,
            "kv_cache_dtype": "fp32",
            "cpus": ((),),
            "max_num_batched_tokens": 256,
        }
        opened.append(NativeExecutor(artifact, **(defaults | options)))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


def blocks_of(sequence: int, block_size: int = 16) -> list[int]:
    """A scattered block table for 128 tokens, apart from every other sequence's."""
    count = 128 // block_size
    return [sequence + 4 * i for i in reversed(range(count))]


# ---- the whole step ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_match_the_reference(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    architecture: str,
    weights: str,
    kv_cache_dtype: str,
    isa: str,
) -> None:
    artifact = artifact_of(architecture, weights)
    options = {"num_blocks": 64, "block_size": 16, "kv_cache_dtype": kv_cache_dtype}
    executor = make_executor(artifact, isa=isa, **options)
    reference = ReferenceExecutor(artifact, limits_pairs=isa == "avx2", **options)
    bounds = logits_bounds(weights, kv_cache_dtype, isa, artifact.config.head_dim)
    check_logits(executor, reference, bounds)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("heads", [{"head_dim": 128}, {"head_dim": 96}, THREE_HEADS])
def test_logits_of_wide_heads(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    heads: dict[str, int],
    kv_cache_dtype: str,
    isa: str,
) -> None:
    artifact = artifact_of("llama", "fp32", **heads)
    options = {"num_blocks": 64, "block_size": 16, "kv_cache_dtype": kv_cache_dtype}
    executor = make_executor(artifact, isa=isa, **options)
    reference = ReferenceExecutor(artifact, limits_pairs=isa == "avx2", **options)
    bounds = logits_bounds("fp32", kv_cache_dtype, isa, heads["head_dim"])
    check_logits(executor, reference, bounds)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("weights", "source", "dtype_of_down"),
    [("int8", "F32", "fp32"), ("int4", "BF16", "bf16"), ("bf16", "F32", "bf16")],
)
def test_logits_where_a_width_is_not_whole_groups(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    weights: str,
    source: str,
    dtype_of_down: str,
    isa: str,
) -> None:
    artifact = artifact_of("llama", weights, intermediate_size=80, dtype=source)
    assert artifact.tensor("layers.0.down").dtype == dtype_of_down
    options = {"num_blocks": 64, "block_size": 16, "kv_cache_dtype": "fp32"}
    executor = make_executor(artifact, isa=isa, **options)
    reference = ReferenceExecutor(artifact, limits_pairs=isa == "avx2", **options)
    bounds = logits_bounds(weights, "fp32", isa, artifact.config.head_dim)
    check_logits(executor, reference, bounds)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 96}),
        ("llama", THREE_HEADS),
        ("mistral", {"head_dim": 48, "sliding_window": 50}),
    ],
)
def test_an_int8_cache_is_attended_to_as_it_is(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    architecture: str,
    options: dict[str, int],
    isa: str,
) -> None:
    """With one layer both round the same keys and values, so that little else can differ."""
    artifact = artifact_of(architecture, "fp32", num_hidden_layers=1, **options)
    cache = {"num_blocks": 64, "block_size": 16, "kv_cache_dtype": "int8"}
    executor = make_executor(artifact, isa=isa, **cache)
    check_logits(executor, ReferenceExecutor(artifact, **cache), (2e-3, 2e-4))


def check_logits(
    executor: NativeExecutor, reference: ReferenceExecutor, bounds: tuple[float, float]
) -> None:
    prefill = step_batch([Row(0, p, blocks_of(i)) for i, p in enumerate(PROMPTS)])
    decode = step_batch([Row(len(p), [7], blocks_of(i)) for i, p in enumerate(PROMPTS)])
    for batch in (prefill, decode):
        expected, actual = reference.logits(batch), executor.logits(batch)
        difference = np.abs(actual - expected)
        max_bound, mean_bound = bounds
        assert difference.max() < max_bound
        assert difference.mean() < mean_bound


def attends_in_bf16(isa: str) -> bool:
    if isa != "avx512":
        return isa == "amx"
    cpu = Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in cpu and "avx512_bf16" in cpu


def attends_in_integers(isa: str, head_dim: int) -> bool:
    return isa in ("avx2", "avxvnni", "avx512", "amx") and head_dim % 16 == 0


def logits_bounds(
    weights: str, kv_cache_dtype: str, isa: str, head_dim: int
) -> tuple[float, float]:
    """How far logits (of a spread of about 10) may be from the reference's: at most, on average.

    Sums in another order differ in the last bits. Where values are rounded on the way, one at the
    edge of a step may then fall to the other side: rarely to another bf16 in the cache, by 1/256 of
    itself in activations rounded for bf16 weights, by 1/127 of its group's (an int8 cache: its
    head's) largest in activations quantised for int8 and int4. With a bf16 cache, families that
    attend in bf16 round queries and probabilities to it, by 1/512 at most, and with an int8 cache
    those that attend in integers by 1/65534 of the largest, the reference neither: so every input
    differs a little, and of those that are rounded or quantised more fall to the other side.
    """
    is_rounded = kv_cache_dtype == "bf16" and attends_in_bf16(isa) and head_dim % 32 == 0
    is_in_words = kv_cache_dtype == "int8" and attends_in_integers(isa, head_dim)
    if weights in ("int8", "int4"):
        return (0.8, 0.13) if is_rounded else (0.6, 0.1) if is_in_words else (0.5, 0.05)
    if weights == "bf16" and is_in_words:
        return (0.2, 0.03)
    if weights == "bf16" or is_rounded:
        return (0.2, 0.03) if is_rounded else (0.1, 0.01)
    return {"fp32": (3e-4, 5e-5), "bf16": (0.03, 0.003), "int8": (0.1, 0.01)}[kv_cache_dtype]


def all_logits(executor: NativeExecutor, chunk: int, together: bool, block_size: int) -> np.ndarray:
    """Prefill every prompt in chunks, decode three tokens each; (prompts, 4, vocab) logits.

    As in serving, a chunk that does not end its prompt samples nothing.
    """
    results = np.zeros((len(PROMPTS), 4, VOCAB_SIZE), np.float32)
    streams = [[*prompt, 7, 8, 9] for prompt in PROMPTS]
    done = [0] * len(PROMPTS)
    while any(done[i] < len(streams[i]) for i in range(len(PROMPTS))):
        rows, places = [], []
        for i, prompt in enumerate(PROMPTS):
            if done[i] == len(streams[i]):
                continue
            end = min(done[i] + chunk, len(prompt)) if done[i] < len(prompt) else done[i] + 1
            sampling = Sampling() if end >= len(prompt) else None
            tokens = streams[i][done[i] : end]
            rows.append(Row(done[i], tokens, blocks_of(i, block_size), sampling))
            if sampling is not None:
                places.append((i, end - len(prompt)))
            done[i] = end
            if not together:
                break
        logits = executor.logits(step_batch(rows))
        for place, row in zip(places, logits, strict=True):
            results[place] = row
    return results


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("architecture", "weights", "kv_cache_dtype", "options"),
    [
        # A window that one query's keys fill one or two pieces of, depending on its position.
        ("mistral", "fp32", "fp32", {"sliding_window": 50}),
        ("llama", "fp32", "fp32", {}),
        ("qwen3", "bf16", "bf16", {}),
        ("llama", "int8", "bf16", {}),
        ("llama", "bf16", "int8", {}),
        ("llama3", "int4", "fp32", {}),
        # Heads as wide as most models': AVX-512 adds up values in tiles of 64 dimensions.
        ("mistral", "fp32", "fp32", {"head_dim": 64, "sliding_window": 50}),
        ("qwen3", "int8", "bf16", {"head_dim": 64}),
        # AMX and AVX512-BF16 attend to a bf16 cache by 32 dimensions.
        ("mistral", "fp32", "bf16", {"head_dim": 96, "sliding_window": 50}),
        ("llama", "fp32", "int8", {"head_dim": 128}),
        ("mistral", "fp32", "int8", {"head_dim": 48, "sliding_window": 50}),
        # Odd numbers of queries, as three heads to a key's have.
        ("llama", "fp32", "bf16", THREE_HEADS),
        ("llama", "fp32", "int8", THREE_HEADS),
    ],
)
def test_bits_do_not_depend_on_batch_chunks_blocks_or_pes(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    architecture: str,
    weights: str,
    kv_cache_dtype: str,
    options: dict[str, int],
    isa: str,
) -> None:
    artifact = artifact_of(architecture, weights, **options)

    def run(*, chunk: int, together: bool, num_pes: int, block_size: int = 16) -> np.ndarray:
        executor = make_executor(
            artifact,
            isa=isa,
            kv_cache_dtype=kv_cache_dtype,
            cpus=((),) * num_pes,
            block_size=block_size,
        )
        return all_logits(executor, chunk, together, block_size)

    alone = run(chunk=128, together=False, num_pes=1)
    assert np.isfinite(alone).all()
    assert np.abs(alone).max() > 1
    for variant in (
        run(chunk=128, together=True, num_pes=1),
        run(chunk=128, together=True, num_pes=2),
        run(chunk=5, together=True, num_pes=2),
        run(chunk=1, together=False, num_pes=1),
        run(chunk=64, together=True, num_pes=3, block_size=8),
        run(chunk=3, together=True, num_pes=1, block_size=32),
    ):
        assert np.array_equal(variant, alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sliding_window", [0, 300])
def test_long_contexts_are_shared_out_without_changing_a_bit(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    sliding_window: int,
    kv_cache_dtype: str,
    isa: str,
) -> None:
    """600 tokens are three partitions: done by one PE in a row, or by several and then merged."""
    # A window wider than the model's length would be none.
    config = {"sliding_window": sliding_window, "max_position_embeddings": 1024, "head_dim": 32}
    artifact = artifact_of("mistral", "fp32", **config)
    assert artifact.config.sliding_window == sliding_window
    tokens = [(13 * i + 5) % VOCAB_SIZE for i in range(601)]
    blocks = [i ^ 1 for i in range(38)]
    options = {"kv_cache_dtype": kv_cache_dtype, "max_num_batched_tokens": 640}

    def run(num_pes: int, chunk: int) -> np.ndarray:
        executor = make_executor(artifact, isa=isa, cpus=((),) * num_pes, **options)
        for start in range(0, 600, chunk):
            end = min(start + chunk, 600)
            executor.logits(step_batch([Row(start, tokens[start:end], blocks)]))
        return executor.logits(step_batch([Row(600, tokens[600:], blocks)]))

    alone = run(num_pes=1, chunk=600)
    for num_pes, chunk in ((3, 600), (2, 257), (8, 64)):
        assert np.array_equal(run(num_pes, chunk), alone)

    reference = ReferenceExecutor(
        artifact, num_blocks=64, block_size=16, kv_cache_dtype=kv_cache_dtype
    )
    reference.logits(step_batch([Row(0, tokens[:600], blocks)]))
    difference = np.abs(reference.logits(step_batch([Row(600, tokens[600:], blocks)])) - alone)
    max_bound, mean_bound = logits_bounds("fp32", kv_cache_dtype, isa, 32)
    assert difference.max() < max_bound
    assert difference.mean() < mean_bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_gate_and_up_are_quantised_at_once_or_later_with_the_same_bits(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor, weights: str, isa: str
) -> None:
    """Four groups of down's inputs are items enough for one PE, not for two: there they are cut
    finer, and rows are quantised afterwards; few of them by whoever is done last.
    """
    artifact = artifact_of("llama", weights, intermediate_size=768)
    prefill = step_batch([Row(0, p, blocks_of(i)) for i, p in enumerate(PROMPTS)])
    decode = step_batch([Row(len(PROMPTS[0]), [7], blocks_of(0))])
    results = []
    for num_pes in (1, 2):
        executor = make_executor(artifact, isa=isa, cpus=((),) * num_pes)
        results.append([executor.logits(batch) for batch in (prefill, decode)])
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("architecture", "options"), [("llama", {}), ("mistral", {"sliding_window": 6})]
)
def test_what_a_block_held_before_is_never_seen(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    options: dict[str, int],
    kv_cache_dtype: str,
    isa: str,
) -> None:
    """Not even NaN, which no probability of 0 would take out of a sum."""
    poison = 200
    artifact = artifact_of(architecture, "fp32", head_dim=32, **options)
    embed = artifact.tensor("embed").unpack()
    embed[poison] = np.nan
    poisoned = packed_tensor(embed, "fp32")
    tensor_of = artifact.tensor
    monkeypatch.setattr(
        Artifact, "tensor", lambda _, name: poisoned if name == "embed" else tensor_of(name)
    )

    def decoded(executor: NativeExecutor) -> list[np.ndarray]:
        prompt, blocks = PROMPTS[0], [5, 2]
        rows = [Row(0, prompt, blocks)] + [Row(i, [i], blocks) for i in range(len(prompt), 30)]
        return [executor.logits(step_batch([row])) for row in rows]

    clean, used = (
        make_executor(artifact, isa=isa, kv_cache_dtype=kv_cache_dtype) for _ in range(2)
    )
    assert np.isnan(used.logits(step_batch([Row(0, [poison] * 32, [5, 2])]))).all()
    expected = decoded(clean)
    assert np.isfinite(expected).all()
    assert np.array_equal(decoded(used), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_that_only_look_like_a_run_are_not_read_as_one(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor, isa: str
) -> None:
    """With one KV head, blocks 0 and 3 lie as if 1 and 2 were between; here others are."""
    artifact = artifact_of("llama", "fp32", num_key_value_heads=1, head_dim=32)

    def decoded(blocks: list[int]) -> np.ndarray:
        executor = make_executor(artifact, isa=isa, kv_cache_dtype="bf16", block_size=4)
        executor.logits(step_batch([Row(0, list(range(16)), blocks)]))
        return executor.logits(step_batch([Row(16, [7], blocks)]))

    assert np.array_equal(decoded([0, 9, 5, 3, 20]), decoded([0, 1, 2, 3, 4]))


@pytest.mark.parametrize("isa", ISAS)
def test_more_pes_than_cores_give_the_same_tokens(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor, isa: str
) -> None:
    """Many short steps on threads that are often late: each must find its job, or find it gone."""
    artifact = artifact_of("llama", "int8")

    def tokens(num_pes: int) -> list[int]:
        executor = make_executor(artifact, isa=isa, cpus=((),) * num_pes)
        found, last = [], 1
        for position in range(100):
            batch = step_batch([Row(position, [last], blocks_of(0))])
            last = int(executor.execute(batch).token_ids[0])
            found.append(last)
        return found

    assert tokens(5) == tokens(1)


def test_execute_samples_what_logits_say(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    executor = make_executor(artifact_of("llama", "int8"), cpus=((), ()))
    samplings = [
        Sampling(num_logprobs=3),
        Sampling(temperature=0.8, seed=11, num_logprobs=0),
        None,
        Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=2**64 - 1, history=[3, 3, 9]),
    ]
    rows = [Row(0, p, blocks_of(i), samplings[i]) for i, p in enumerate(PROMPTS)]
    batch = step_batch(rows)
    assert_same(executor.execute(batch), sampler.sample(executor.logits(batch), batch))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_that_caches_do_not_hold(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor, weights: str, isa: str
) -> None:
    """Megabytes of them, of a vocabulary of no whole panels, go past the caches before sampling."""
    artifact = artifact_of("llama", weights, vocab_size=33_001)
    executor = make_executor(artifact, isa=isa, num_blocks=80, cpus=((), ()))
    batch = step_batch([Row(0, [i], [i], Sampling(num_logprobs=2)) for i in range(80)])
    assert_same(executor.execute(batch), sampler.sample(executor.logits(batch), batch))


def test_more_sampling_rows_than_one_round_of_logits(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    executor = make_executor(artifact_of("llama", "fp32"), num_blocks=150, cpus=((), ()))
    batch = step_batch([Row(0, [i], [i], Sampling(num_logprobs=2)) for i in range(150)])
    result = executor.execute(batch)
    for i in (0, 63, 64, 149):
        alone = executor.execute(step_batch([Row(0, [i], [0], Sampling(num_logprobs=2))]))
        assert alone.token_ids[0] == result.token_ids[i]
        assert np.array_equal(alone.top_logprobs[0], result.top_logprobs[i])


# ---- refusals ----------------------------------------------------------------------------------


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def biases(token_ids: list[int], values: list[float]) -> dict[str, np.ndarray]:
    return {
        "bias_ids": int32(*token_ids),
        "bias_values": np.array(values, np.float32),
        "bias_offsets": int32(0, len(token_ids)),
    }


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"token_ids": int32(1, 2, VOCAB_SIZE)}, f"token id {VOCAB_SIZE} is outside 0 .. 383"),
        ({"token_ids": int32(1, -1, 2)}, "token id -1"),
        ({"block_ids": int32(0, 64)}, "block id 64 is outside 0 .. 63"),
        ({"block_ids": int32(-1, 0)}, "block id -1"),
        ({"context_lens": int32(31)}, "31 \\+ 3 tokens but its blocks hold 32"),
        ({"context_lens": int32(-1)}, "-1 \\+ 3 tokens"),
        ({"row_offsets": int32(0, 2)}, "row_offsets ends at 2 of 3"),
        ({"row_offsets": int32(1, 3)}, "row_offsets does not start at 0"),
        ({"block_offsets": int32(0, 9)}, "block_offsets ends at 9 of 2"),
        ({"sample_rows": int32(1)}, "sample_rows: row 1"),
        ({"history_offsets": int32(0, 4)}, "history_offsets ends at 4 of 0"),
        ({"history_prompt_lens": int32(1)}, "row 0 has 1 prompt tokens in a history of 0"),
        ({"history_prompt_lens": int32(-1)}, "row 0 has -1 prompt tokens"),
        ({"bias_offsets": int32(0, 1)}, "bias_offsets ends at 1 of 0"),
        (biases([VOCAB_SIZE], [1.0]), f"biased token id {VOCAB_SIZE} is outside"),
        (biases([5, 5], [1.0, 1.0]), "biases that do not ascend"),
        (biases([5], [np.nan]), "or are not finite"),
        ({"temperature": np.array([np.nan], np.float32)}, "parameter out of range"),
        ({"presence_penalty": np.array([np.inf], np.float32)}, "parameter out of range"),
        ({"frequency_penalty": np.array([np.nan], np.float32)}, "parameter out of range"),
        ({"repetition_penalty": np.zeros(1, np.float32)}, "parameter out of range"),
        ({"top_p": np.zeros(1, np.float64)}, "top_p is float64"),
        ({"top_p": np.zeros(2, np.float32)}, "top_p is float32 \\(2,\\)"),
        ({"token_ids": np.arange(6, dtype=np.int32)[::2]}, "token_ids is int32"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused_and_changes_nothing(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    overrides: dict[str, Any],
    match: str,
) -> None:
    executor = make_executor(artifact_of("llama", "fp32"))
    executor.logits(step_batch([Row(0, [1, 2, 3], [0, 1])]))
    decode = step_batch([Row(3, [4], [0, 1])])
    before = executor.logits(decode)
    with pytest.raises(InvalidRequestError, match=match):
        executor.execute(step_batch([Row(0, [9, 9, 9], [0, 1])], **overrides))
    assert np.array_equal(executor.logits(decode), before)


def test_sampled_rows_that_do_not_ascend_are_refused(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    executor = make_executor(artifact_of("llama", "fp32"))
    rows = [Row(0, [1, 2, 3], [0]), Row(0, [4], [1])]
    for sample_rows in (int32(1, 0), int32(1, 1)):
        with pytest.raises(InvalidRequestError, match="sample_rows do not ascend at 1"):
            executor.execute(step_batch(rows, sample_rows=sample_rows))


def test_a_step_larger_than_announced_is_refused(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    executor = make_executor(artifact_of("llama", "fp32"), max_num_batched_tokens=8)
    with pytest.raises(InvalidRequestError, match="9 tokens but the engine takes 8"):
        executor.execute(step_batch([Row(0, [1] * 9, [0])]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv_cache_dtype": "fp16"}, "'fp16'; it must be one of fp32, bf16, int8"),
        ({"num_blocks": 0}, "not positive"),
        ({"cpus": ()}, "not positive"),
        ({"isa": "sse9"}, f"'sse9'.*this CPU has {', '.join(ISAS)}"),
    ],
)
def test_an_executor_that_cannot_be_is_refused(
    artifact_of: Callable[..., Artifact],
    make_executor: MakeExecutor,
    options: dict[str, Any],
    match: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        make_executor(artifact_of("llama", "fp32"), **options)


def test_the_environment_picks_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FURIOSA_SERVE_ISA", raising=False)
    assert native_library.resolve_isa() == ISAS[0]
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "portable")
    assert native_library.resolve_isa() == "portable"
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "fast")
    with pytest.raises(InvalidRequestError, match=r"FURIOSA_SERVE_ISA is 'fast'.*portable"):
        native_library.resolve_isa()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "ABI_VERSION", -1)
    with pytest.raises(FuriosaLLMError, match="built from other sources"):
        native_library.library.__wrapped__()


# ---- life and cost -----------------------------------------------------------------------------


def test_closing_twice_is_fine_and_a_closed_executor_says_so(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    executor = make_executor(artifact_of("llama", "fp32"), cpus=((), ()))
    executor.close()
    executor.close()
    with pytest.raises(EngineShutDownError):
        executor.execute(step_batch([Row(0, [1], [0])]))


def test_an_unused_cache_takes_no_memory(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    artifact = artifact_of("llama", "fp32")
    before = resident_bytes()
    # 2^22 blocks of 16 tokens of 1 KiB: 64 GiB of addresses.
    make_executor(artifact, num_blocks=1 << 22, max_num_batched_tokens=8192)
    assert resident_bytes() - before < 16 << 20


def test_idle_threads_use_no_cpu(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    """A thread that kept spinning would use all of the window; sleeping ones use none of it."""
    executor = make_executor(artifact_of("llama", "fp32"), cpus=((), ()))
    executor.execute(step_batch([Row(0, [1, 2, 3], [0])]))
    window_s = 0.5
    before_s = time.process_time()
    threading.Event().wait(window_s)
    assert time.process_time() - before_s < window_s / 5


def test_binding_lasts_for_the_step_only(
    artifact_of: Callable[..., Artifact], make_executor: MakeExecutor
) -> None:
    allowed = os.sched_getaffinity(0)
    executor = make_executor(artifact_of("llama", "fp32"), cpus=((min(allowed),), (max(allowed),)))
    executor.execute(step_batch([Row(0, [1, 2, 3], [0])]))
    assert os.sched_getaffinity(0) == allowed
