"""Sampling in the native kernel: as the numpy sampler does it, on every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_batches import Row, Sampling, step_batch

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.workers import sampler
from furiosa_llm.workers.executor import StepResult
from furiosa_llm.workers.kernels import native, native_library

ISAS = native_library.available_isas()


def assert_same(actual: StepResult, expected: StepResult) -> None:
    assert np.array_equal(actual.token_ids, expected.token_ids)
    assert np.array_equal(actual.ranks, expected.ranks)
    assert np.array_equal(actual.top_token_ids, expected.top_token_ids)
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 5, 100, 2000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, 2.0, -0.1]),
    seed=st.integers(0, 2**64 - 1),
    choice_index=st.integers(0, 7),
    num_logprobs=st.sampled_from([-1, 0, 4]),
    history=st.lists(st.integers(0, 999) | st.integers(0, 5), max_size=30),
    biases=st.dictionaries(
        st.integers(0, 999), st.sampled_from([-100.0, -0.3, 0.0, 4.5, 100.0]), max_size=6
    ).map(lambda biases: sorted(biases.items())),
    suppressed=st.lists(st.integers(0, 999), max_size=8),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(samplings, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    has_ties=st.booleans(),
    position=st.integers(1, 2**31 - 1),
)
def test_sampling_equals_the_numpy_sampler(
    rows: list[Sampling], seed: int, has_ties: bool, position: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(rows), 1000)).astype(np.float32) * 3
    if has_ties:
        logits = np.round(logits)
    rng = np.random.default_rng(seed)
    rows = [replace(r, history_prompt_len=int(rng.integers(len(r.history) + 1))) for r in rows]
    batch = step_batch([Row(position - 1, [0], [], row) for row in rows])
    expected = sampler.sample(logits, batch)
    for isa in ISAS:
        assert_same(native.sample(logits, batch, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_sampling_follows_the_probabilities(isa: str) -> None:
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])
    logits = np.tile(np.log(probabilities).astype(np.float32), (4000, 1))
    rows = [Row(7, [0], [], Sampling(temperature=1.0, seed=seed)) for seed in range(4000)]
    counts = np.bincount(native.sample(logits, step_batch(rows), isa=isa).token_ids, minlength=4)
    assert np.abs(counts / 4000 - probabilities).max() < 0.03  # four standard deviations


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 8, 96])
def test_logits_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    logits = np.zeros((2, 97), np.float32)
    logits[1, place] = bad
    batch = step_batch([Row(0, [0], []), Row(0, [0], [])])
    for isa in ISAS:
        with pytest.raises(FuriosaLLMError, match="row 1: the model's logits are NaN or infinite"):
            native.sample(logits, batch, isa=isa)


def test_suppressing_everything_is_refused() -> None:
    batch = step_batch([Row(0, [0], [], Sampling(suppressed=range(8)))])
    with pytest.raises(InvalidRequestError, match="every token"):
        native.sample(np.zeros((1, 8), np.float32), batch)
