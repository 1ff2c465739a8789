"""Outputs are snapshots: nothing done to what they were made of, or to a later one, shows."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from furiosa_llm.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    made_completion,
    made_output,
)


def test_positional_order():
    output = CompletionOutput(0, "hi", [5, 2], "stop")
    assert (output.index, output.text, output.token_ids) == (0, "hi", [5, 2])
    assert output.finish_reason == "stop"
    request = RequestOutput("r", "p", [1], [output], True)
    assert (request.request_id, request.prompt, request.prompt_token_ids) == ("r", "p", [1])
    assert request.outputs == [output]
    assert request.finished is True


def test_what_later_releases_added_is_keyword_only():
    with pytest.raises(TypeError):
        CompletionOutput(0, "hi", [5], None, [{5: Logprob(-0.1)}])
    with pytest.raises(TypeError):
        RequestOutput("r", "p", [1], [], False, None)


def test_defaults():
    output = CompletionOutput(0, "", [])
    assert (output.finish_reason, output.logprobs, output.stop_reason) == (None, None, None)
    request = RequestOutput("r", None, [], [], False)
    assert (request.prompt_logprobs, request.num_cached_tokens) == (None, 0)
    assert (Logprob(-1.0).rank, Logprob(-1.0).decoded_token) == (None, None)


@pytest.mark.parametrize(("reason", "expected"), [(None, False), ("stop", True), ("length", True)])
def test_is_finished(reason, expected):
    assert CompletionOutput(0, "", [], reason).is_finished() is expected


def test_lists_are_copied():
    token_ids, logprobs, prompt, outputs = [5], [{5: Logprob(-0.1, 1, "x")}], [1], []
    output = CompletionOutput(0, "", token_ids, logprobs=logprobs)
    outputs.append(output)
    request = RequestOutput("r", None, prompt, outputs, False)
    for each in (token_ids, logprobs, prompt, outputs):
        each.clear()
    assert output.token_ids == [5]
    assert output.logprobs == [{5: Logprob(-0.1, 1, "x")}]
    assert request.prompt_token_ids == [1]
    assert request.outputs == [output]


def test_two_outputs_of_one_source_share_no_list():
    token_ids = [5]
    one, other = CompletionOutput(0, "", token_ids), CompletionOutput(0, "", token_ids)
    one.token_ids.append(6)
    assert other.token_ids == [5]


def test_any_sequence_becomes_a_list():
    assert CompletionOutput(0, "", (5, 6)).token_ids == [5, 6]
    assert RequestOutput("r", None, range(2), (), False).prompt_token_ids == [0, 1]


def test_counts():
    outputs = [CompletionOutput(0, "", [1, 2]), CompletionOutput(1, "", [3])]
    request = RequestOutput("r", None, [7, 8, 9, 10], outputs, False)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (4, 3)
    assert RequestOutput("r", None, [], [], False).num_output_tokens == 0


def test_outputs_that_are_made_equal_those_that_are_constructed():
    made = made_completion(1, "hi", [5, 2], "stop", [{5: Logprob(-0.1)}], "x")
    constructed = CompletionOutput(
        1, "hi", [5, 2], "stop", logprobs=[{5: Logprob(-0.1)}], stop_reason="x"
    )
    assert made == constructed
    assert repr(made) == repr(constructed)
    request = RequestOutput("r", "p", [7, 8], [constructed], True)
    for look in (repr, dataclasses.asdict, lambda output: output == request, copy.deepcopy):
        assert look(made_output("r", "p", (7, 8), [made], True)) == look(request)
    assert made_output("r", None, (7, 8), [], False).num_prompt_tokens == 2


def test_each_output_makes_a_list_of_its_prompt_for_itself():
    prompt = (7, 8)
    one, other = (made_output("r", None, prompt, [], False) for _ in range(2))
    one.prompt_token_ids.append(9)
    assert one.prompt_token_ids == [7, 8, 9]
    assert other.prompt_token_ids == [7, 8]
    with pytest.raises(AttributeError, match="'RequestOutput' object has no attribute 'nonsense'"):
        _ = one.nonsense


def test_fields_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompletionOutput(0, "", []).text = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        RequestOutput("r", None, [], [], False).finished = True
