"""SamplingParams: what is accepted, in which form it is kept, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams, SamplingType


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, -1)
    assert (params.max_tokens, params.min_tokens, params.stop) == (16, 0, ())
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert params.sampling_type is SamplingType.RANDOM


def test_keyword_only():
    with pytest.raises(TypeError):
        SamplingParams(1)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        pytest.param("n", 128, 128, id="n"),
        pytest.param("best_of", 1, None, id="best_of equal to n says nothing more"),
        pytest.param("temperature", 0, 0.0, id="an int is a number"),
        pytest.param("temperature", np.float32(0.5), 0.5, id="numpy's number"),
        pytest.param("top_k", 0, -1, id="top_k 0 is off"),
        pytest.param("top_k", np.int64(5), 5, id="numpy's integer"),
        pytest.param("top_p", 1, 1.0, id="top_p"),
        pytest.param("min_p", 0, 0.0, id="min_p"),
        pytest.param("repetition_penalty", 2, 2.0, id="repetition_penalty"),
        pytest.param("stop", "a", ("a",), id="one stop string"),
        pytest.param("stop", ["", "a", ""], ("a",), id="empty stop strings are dropped"),
        pytest.param("stop", None, (), id="no stop string"),
        pytest.param("stop_token_ids", [3, np.int32(1)], (3, 1), id="stop_token_ids"),
        pytest.param("stop_token_ids", None, (), id="no stop token"),
        pytest.param("max_tokens", None, None, id="no max_tokens"),
        pytest.param("logprobs", True, 1, id="logprobs True"),
        pytest.param("logprobs", False, None, id="logprobs False"),
        pytest.param("logprobs", 0, 0, id="logprobs 0 is the sampled token's"),
        pytest.param("logprobs", 20, 20, id="logprobs"),
        pytest.param("seed", 2**64 - 1, 2**64 - 1, id="unsigned seed"),
        pytest.param("seed", -(2**63), -(2**63), id="negative seed"),
        pytest.param("output_kind", 1, RequestOutputKind.DELTA, id="output_kind by number"),
        pytest.param("length_penalty", 1, 1.0, id="a beam parameter at its default"),
        pytest.param("presence_penalty", -2, -2.0, id="presence_penalty"),
        pytest.param("frequency_penalty", 2, 2.0, id="frequency_penalty"),
        pytest.param("logit_bias", {7: 1, 3: -0.5}, ((3, -0.5), (7, 1.0)), id="logit_bias"),
        pytest.param("logit_bias", [[7, 1]], ((7, 1.0),), id="logit_bias as pairs"),
        pytest.param("logit_bias", {}, None, id="no logit_bias"),
    ],
)
def test_kept(name, given, kept):
    got = getattr(SamplingParams(**{name: given}), name)
    assert (got, type(got)) == (kept, type(kept))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", True), ("n", 1.0), ("n", "1"), ("best_of", 2), ("best_of", 0),
        ("temperature", -0.1), ("temperature", 100.5), ("temperature", float("nan")),
        ("temperature", 10**400), ("temperature", float("inf")),
        ("temperature", "1"), ("temperature", None),
        ("top_p", 0), ("top_p", 1.01), ("top_p", float("nan")),
        ("top_k", -2), ("top_k", 2.0), ("top_k", 2**31), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0), ("repetition_penalty", 2.1),
        ("presence_penalty", 2.1), ("presence_penalty", np.zeros(2)), ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"), ("logit_bias", 3), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}), ("logit_bias", {1: 100.1}), ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: None}), ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("logit_bias", ((1, 0.0), (1, 0.0))), ("logit_bias", [(1, 0.0, 2)]),
        ("stop", 3), ("stop", ["a", 3]), ("stop", ["a"] * 17), ("stop", "a" * 1025),
        ("stop_token_ids", 3), ("stop_token_ids", [-1]), ("stop_token_ids", [True]),
        ("stop_token_ids", ["3"]), ("stop_token_ids", list(range(65))),
        ("max_tokens", 0), ("max_tokens", 1.5),
        pytest.param("max_tokens", 10**5000, id="an int that cannot be printed"),
        ("min_tokens", -1), ("min_tokens", 17),
        ("ignore_eos", 1), ("include_stop_str_in_output", "yes"), ("skip_special_tokens", None),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", 1.0),
        ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", True), ("output_kind", 3),
        ("output_kind", "DELTA"), ("output_kind", None),
    ],
)  # fmt: skip
def test_refused(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name}: ")
    assert len(str(caught.value)) < 400, "a huge value does not make a huge message"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True), ("length_penalty", 0.5), ("early_stopping", "never"),
        ("prompt_logprobs", 0), ("structured_outputs", {}), ("guided_decoding", {}),
        ("reasoning_structured_outputs", True), ("extra_args", {}), ("bad_words", []),
        ("allowed_token_ids", []), ("length_penalty", np.zeros(2)),
    ],
)  # fmt: skip
def test_what_this_version_cannot_do_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name}: .*not supported in this version"):
        SamplingParams(**{name: value})


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)


def test_min_tokens_up_to_max_tokens():
    assert SamplingParams(min_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=99, max_tokens=None).min_tokens == 99


@pytest.mark.parametrize(
    ("temperature", "kind"),
    [(0, SamplingType.GREEDY), (9e-6, SamplingType.GREEDY), (1e-5, SamplingType.RANDOM)],
)
def test_sampling_type(temperature, kind):
    assert SamplingParams(temperature=temperature).sampling_type is kind


def test_from_optional():
    params = SamplingParams.from_optional(temperature=None, top_p=0.5, max_tokens=None)
    assert params == SamplingParams(top_p=0.5, max_tokens=None)
    assert SamplingParams.from_optional() == SamplingParams()


def test_equality_sees_every_field_and_equal_values_hash_alike():
    assert SamplingParams(top_p=0.5) != SamplingParams(top_p=0.6)
    assert SamplingParams(top_k=5) != SamplingParams(top_k=6)
    one = SamplingParams(stop=["a"], temperature=1, logit_bias={1: 0.5, 2: 1})
    other = SamplingParams(stop="a", logit_bias={2: 1.0, 1: 0.5})
    assert one == other
    assert hash(one) == hash(other)


def test_it_cannot_be_changed_from_outside():
    stop, ids = ["a"], [1]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.append("b")
    ids.append(2)
    assert (params.stop, params.stop_token_ids) == (("a",), (1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_clone_and_replace():
    params = SamplingParams(n=3, best_of=3, stop="a", logprobs=True, logit_bias={3: 1, 1: 2})
    assert params.clone() == params
    assert params.clone() is not params
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(params, top_p=0)
