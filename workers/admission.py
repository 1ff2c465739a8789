"""What a worker makes sure of before an `Add` reaches its scheduler: that it fits the vocabulary.

The scheduler takes token ids for opaque numbers, and a kernel takes them for indices into memory.
The front-end has checked them; this is the last place where a wrong one is only a refused request.
"""

from __future__ import annotations

from dataclasses import replace

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.refusal import Refusal
from furiosa_llm.wire.messages import Add


def refusal_of_tokens(add: Add, vocab_size: int) -> Refusal | None:
    """Why the model cannot run on these tokens; None when it can."""
    largest = max(add.token_ids)
    if largest >= vocab_size:
        return Refusal(
            "invalid_request",
            f"token id {largest} is not in the model's vocabulary of {vocab_size}: "
            f"use ids below {vocab_size}",
        )
    biased = add.params.bias_token_ids
    if biased and biased[-1] >= vocab_size:
        return Refusal(
            "invalid_request",
            f"logit_bias names token id {biased[-1]}, which is not in the model's vocabulary of "
            f"{vocab_size}: use ids below {vocab_size}",
        )
    num_suppressed = len({i for i in add.params.stop_token_ids if i < vocab_size})
    if add.params.min_tokens > 0 and num_suppressed == vocab_size:
        return Refusal(
            "invalid_request",
            f"all {vocab_size} tokens of the vocabulary are stop tokens and min_tokens is "
            f"{add.params.min_tokens}: nothing can be sampled; lower min_tokens to 0",
        )
    return None


def fit_to_vocabulary(params: SequenceParams, vocab_size: int) -> SequenceParams:
    """The same parameters without what no token of the vocabulary can meet.

    A stop token that does not exist is never sampled, and there are no more log-probabilities than
    tokens, so this changes nothing that a caller could see.
    """
    has_unknown = any(token_id >= vocab_size for token_id in params.stop_token_ids)
    if not has_unknown and params.num_logprobs <= vocab_size:
        return params
    return replace(
        params,
        stop_token_ids=tuple(i for i in params.stop_token_ids if i < vocab_size),
        num_logprobs=min(params.num_logprobs, vocab_size),
    )
