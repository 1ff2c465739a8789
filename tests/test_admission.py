"""What a worker refuses or trims so that no kernel meets a token outside its vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.wire.messages import Add
from furiosa_llm.workers.admission import fit_to_vocabulary, refusal_of_tokens


@pytest.mark.parametrize(
    ("token_ids", "params", "reason"),
    [
        ((0, 3), {}, None),
        ((0, 4), {}, "token id 4 is not in the model's vocabulary of 4: use ids below 4"),
        ((0,), {"stop_token_ids": (0, 1, 2, 3), "min_tokens": 0}, None),
        ((0,), {"stop_token_ids": (0, 1, 2, 9), "min_tokens": 2}, None),
        ((0,), {"bias_token_ids": (1, 3), "bias_values": (0.5, 1.0)}, None),
        (
            (0,),
            {"bias_token_ids": (1, 4), "bias_values": (0.5, 1.0)},
            "logit_bias names token id 4",
        ),
        ((0,), {"stop_token_ids": (3, 2, 1, 0), "min_tokens": 2}, "nothing can be sampled"),
    ],
)
def test_what_the_vocabulary_does_not_allow_is_refused(
    token_ids: tuple[int, ...], params: dict[str, Any], reason: str | None
) -> None:
    add = Add(1, token_ids, len(token_ids), SequenceParams(max_tokens=9, **params))
    refusal = refusal_of_tokens(add, vocab_size=4)
    if reason is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.code == "invalid_request"
        assert reason in refusal.message


def test_what_no_token_can_meet_is_left_out() -> None:
    params = SequenceParams(max_tokens=9, stop_token_ids=(7, 3, 4, 8), num_logprobs=20, top_k=50)
    fitted = fit_to_vocabulary(params, vocab_size=8)
    expected = SequenceParams(max_tokens=9, stop_token_ids=(7, 3, 4), num_logprobs=8, top_k=50)
    assert fitted == expected
    assert fit_to_vocabulary(fitted, vocab_size=8) is fitted
