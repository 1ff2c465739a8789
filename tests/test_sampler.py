"""The numpy sampler and its random numbers, against published answers and plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_batches import Row, Sampling, step_batch

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.workers.executor import StepResult
from furiosa_llm.workers.philox import philox4x32, uniform
from furiosa_llm.workers.sampler import draw_token, sample

# ---- random numbers ----------------------------------------------------------------------------


# Random123's known answers for philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        pytest.param(
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
            id="zeros",
        ),
        pytest.param(
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
            id="ones",
        ),
        pytest.param(
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            id="digits of pi",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    rows = philox4x32(np.array([counter] * 2, np.uint32), np.array([key] * 2, np.uint32))
    assert rows.tolist() == [list(expected)] * 2


@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
    choice=st.integers(0, 2**31 - 1),
)
@settings(max_examples=50, derandomize=True)
def test_uniform_is_made_of_the_first_two_words(seed, position, choice):
    u = uniform(np.array([seed], np.uint64), np.array([position]), np.array([choice]))[0]
    w0, w1, _, _ = philox4x32(
        np.array([[position, choice, 0, 0]], np.uint32),
        np.array([[seed & 0xFFFFFFFF, seed >> 32]], np.uint32),
    )[0].tolist()
    assert u == ((w0 << 32 | w1) >> 11) / 2**53
    assert 0 <= u < 1


def test_uniform_differs_by_seed_position_and_choice():
    seeds = np.array([1, 2, 1 << 32, 1, 1], np.uint64)
    u = uniform(seeds, np.array([5, 5, 5, 6, 5]), np.array([0, 0, 0, 0, 1]))
    assert len(set(u.tolist())) == 5


# ---- one draw ----------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.2, 0.1])).astype(np.float32)


def reachable(**options: float) -> list[int]:
    """The tokens that 1000 evenly spaced random numbers draw, in the order in which they come."""
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    drawn = [draw_token(LOGITS, (i + 0.5) / 1000, **arguments) for i in range(1000)]
    assert drawn == sorted(drawn), "a larger random number never gives a lower id"
    return sorted(set(drawn))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [0, 1, 2, 3, 4], id="everything"),
        pytest.param({"top_k": 1}, [1], id="top_k takes the largest"),
        pytest.param({"top_k": 2}, [1, 2], id="top_k takes the lower id of equals"),
        pytest.param({"top_k": 99}, [0, 1, 2, 3, 4], id="top_k beyond the vocabulary"),
        pytest.param({"top_p": 0.39}, [1], id="top_p within the first"),
        pytest.param({"top_p": 0.59}, [1, 2], id="top_p takes the lower id of equals"),
        pytest.param({"top_p": 0.61}, [1, 2, 3], id="top_p takes the token that crosses it"),
        pytest.param({"top_p": 1e-9}, [1], id="top_p always keeps one"),
        pytest.param({"min_p": 0.26}, [1, 2, 3], id="min_p is relative to the largest"),
        pytest.param({"min_p": 1.0}, [1], id="min_p keeps the largest"),
        pytest.param({"top_k": 3, "top_p": 0.51}, [1, 2], id="top_p counts within top_k"),
        pytest.param({"min_p": 0.26, "top_p": 0.76}, [1, 2, 3], id="top_p counts within min_p"),
        pytest.param({"temperature": 0.02}, [1], id="cold"),
        pytest.param({"temperature": 1e-4}, [1], id="nearly greedy, without overflow"),
    ],
)
def test_filters_keep(options, expected):
    assert reachable(**options) == expected


def test_draws_in_proportion_to_the_probabilities():
    drawn = [
        draw_token(LOGITS, i / 1000, temperature=1, top_k=0, top_p=1, min_p=0) for i in range(1000)
    ]
    assert np.abs(np.bincount(drawn) - [100, 400, 200, 200, 100]).max() <= 1


def test_a_hot_temperature_flattens():
    drawn = [
        draw_token(LOGITS, i / 1000, temperature=1e6, top_k=0, top_p=1, min_p=0)
        for i in range(1000)
    ]
    assert np.abs(np.bincount(drawn) - 200).max() <= 1


def test_the_largest_random_number_draws_a_token_that_can_be_drawn():
    logits = np.array([0, 3, -1e9, -np.inf], np.float32)
    largest = 1 - 2.0**-53
    assert draw_token(logits, largest, temperature=0.5, top_k=0, top_p=1, min_p=0) == 1


# ---- a batch -----------------------------------------------------------------------------------


def sample_rows(logits: np.ndarray, *samplings: Sampling, position: int = 9) -> StepResult:
    rows = [Row(position - 1, [0], [], sampling) for sampling in samplings]
    return sample(np.asarray(logits, np.float32), step_batch(rows))


def test_greedy_takes_the_lowest_of_equals():
    result = sample_rows([[1, 5, 5, 0], [2, 1, 0, 2]], Sampling(), Sampling(temperature=9e-6))
    assert result.token_ids.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("logits", "penalty", "history", "expected"),
    [
        pytest.param([3.0, 2.0, -5.0], 2.0, [0, 0, 0], 1, id="positive is divided, once"),
        pytest.param([-1.0, -1.5, -9.0], 2.0, [0], 1, id="negative is multiplied"),
        pytest.param([1.0, 1.5, 0.0], 0.5, [0], 0, id="below 1 it rewards"),
        pytest.param([3.0, 2.0, 1.0], 1.0, [0], 0, id="1 is off"),
        pytest.param([3.0, 2.0, 1.0], 2.0, [], 0, id="no history"),
    ],
)
def test_repetition_penalty(logits, penalty, history, expected):
    result = sample_rows([logits], Sampling(repetition_penalty=penalty, history=history))
    assert result.token_ids[0] == expected


@pytest.mark.parametrize(
    ("logits", "options", "expected"),
    [
        pytest.param([3.0, 2.5, 0.0], {"presence_penalty": 1.0}, 1, id="presence, once"),
        pytest.param([3.0, 1.5, 0.0], {"presence_penalty": 1.0}, 0, id="however often it occurs"),
        pytest.param([3.0, 1.5, 0.0], {"frequency_penalty": 1.0}, 1, id="frequency, each time"),
        pytest.param([3.0, 0.5, 0.0], {"frequency_penalty": 1.0}, 0, id="twice and no more"),
        pytest.param([0.0, 0.0, 0.5], {"frequency_penalty": -1.0}, 0, id="below 0 it rewards"),
        pytest.param([9.0, 2.5, 9.9], {"presence_penalty": 2.0}, 2, id="the prompt is exempt"),
        pytest.param(
            [3.0, 0.4, 0.0],
            {"presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.0},
            0, id="both add up",
        ),
        pytest.param(
            [4.0, 0.5, 0.1],
            {"frequency_penalty": 1.0, "repetition_penalty": 2.0},
            1, id="after the repetition penalty",
        ),
        pytest.param([0.0, 1.0, 2.0], {"biases": [(0, 2.5)]}, 0, id="a bias"),
        pytest.param([0.0, 1.0, 99.0], {"biases": [(2, -100.0)]}, 1, id="a ban"),
    ],
)  # fmt: skip
def test_openai_penalties_and_biases(logits, options, expected):
    """Token 0 was generated twice; token 2 is in the prompt."""
    sampling = Sampling(history=[2, 2, 2, 0, 0], history_prompt_len=3, **options)
    assert sample_rows([logits], sampling).token_ids[0] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_sampled(temperature):
    samplings = [
        Sampling(temperature=temperature, seed=seed, suppressed=[1, 2]) for seed in range(50)
    ]
    result = sample_rows(np.tile([0.0, 9.0, 8.0, -1.0], (50, 1)), *samplings)
    assert set(result.token_ids.tolist()) <= {0, 3}


def test_logprobs_are_those_of_the_raw_logits():
    logits = np.array([[2.0, 1.0, 1.0, -3.0]], np.float32)
    sampling = Sampling(
        temperature=7.0, repetition_penalty=2.0, history=[0, 1], suppressed=[0, 1], num_logprobs=3
    )
    result = sample_rows(logits, sampling)
    expected = logits[0] - np.log(np.exp(logits[0]).sum())
    token = result.token_ids[0]
    assert token in (2, 3)
    assert result.logprobs[0] == pytest.approx(expected[token], abs=1e-6)
    assert result.ranks[0] == {2: 2, 3: 4}[token]
    assert result.top_token_ids[0].tolist() == [0, 1, 2], "of equals the lower id comes first"
    np.testing.assert_allclose(result.top_logprobs[0], expected[:3], atol=1e-6)


def test_logprobs_of_rows_that_ask_for_different_numbers():
    logits = np.array([[0.0, 1.0, 2.0]] * 4)
    result = sample_rows(logits, *(Sampling(num_logprobs=number) for number in (-1, 0, 2, 5)))
    assert result.top_token_ids.tolist() == [
        [-1] * 5, [-1] * 5, [2, 1, -1, -1, -1], [2, 1, 0, -1, -1]
    ]  # fmt: skip
    assert result.ranks[1:].tolist() == [1, 1, 1]
    assert (result.logprobs[1:] == result.logprobs[1]).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(data):
    logits = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((5, 60))
    samplings = [
        data.draw(
            st.builds(
                Sampling,
                temperature=st.sampled_from([0.0, 0.7, 2.0]),
                top_k=st.sampled_from([0, 3, 30]),
                top_p=st.sampled_from([1.0, 0.8]),
                min_p=st.sampled_from([0.0, 0.1]),
                repetition_penalty=st.sampled_from([1.0, 1.5]),
                history=st.lists(st.integers(0, 59), max_size=4),
                suppressed=st.lists(st.integers(0, 59), max_size=4),
                seed=st.integers(0, 2**64 - 1),
            )
        )
        for _ in range(5)
    ]
    together = sample_rows(logits, *samplings)
    for i, sampling in enumerate(samplings):
        alone = sample_rows(logits[i : i + 1], sampling)
        assert alone.token_ids[0] == together.token_ids[i]


def test_the_position_is_that_of_the_sampled_token():
    """A prompt of 4 and then 3 cached tokens with one more sample the same position."""
    logits = np.zeros((1, 1000), np.float32)
    sampling = Sampling(temperature=1.0, seed=5)
    prefill = sample(logits, step_batch([Row(0, [1, 2, 3, 4], [], sampling)]))
    resumed = sample(logits, step_batch([Row(3, [4], [], sampling)]))
    later = sample(logits, step_batch([Row(4, [4], [], sampling)]))
    assert prefill.token_ids[0] == resumed.token_ids[0] != later.token_ids[0]


def test_rows_that_do_not_sample_are_skipped():
    rows = [Row(0, [1, 2], [], None), Row(6, [1], [], Sampling()), Row(0, [1], [], None)]
    result = sample(np.array([[0, 1, 0]], np.float32), step_batch(rows))
    assert result.token_ids.tolist() == [1]


def test_a_step_without_samples_is_fine():
    result = sample(np.empty((0, 5), np.float32), step_batch([Row(0, [1], [], None)]))
    assert result.token_ids.shape == (0,)
    assert result.top_token_ids.shape == (0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(FuriosaLLMError, match="row 1: the model's logits are NaN or infinite"):
        sample_rows([[0, 1], [bad, 1]], Sampling(), Sampling())


def test_suppressing_everything_is_refused():
    with pytest.raises(InvalidRequestError, match="row 0: every token"):
        sample_rows([[0, 1]], Sampling(suppressed=[0, 1]))
