"""Which sequences can never run here, decided before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from furiosa_llm.scheduler.block_manager import num_blocks_for
from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.params import SequenceParams


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a sequence was not taken. `code` names one of the public errors."""

    code: str
    message: str


def refusal_of(
    config: SchedulerConfig,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    params: SequenceParams,
) -> Refusal | None:
    """The reason that this sequence can never run, whatever else does; None when it can."""
    num_tokens, limit = len(token_ids), config.max_model_len
    if not 1 <= num_prompt_tokens <= num_tokens:
        return Refusal(
            "invalid_request",
            f"the sequence has {num_tokens} tokens and {num_prompt_tokens} of them are said to be "
            "its prompt: a prompt has at least one token and no more than the sequence",
        )
    if params.max_tokens < 1:
        return Refusal("invalid_request", f"max_tokens is {params.max_tokens}: ask for at least 1")
    if num_prompt_tokens >= limit:
        return Refusal(
            "context_length_exceeded",
            f"the prompt has {num_prompt_tokens} tokens but the maximum context length is {limit} "
            "tokens and at least one must be left for the answer: shorten the prompt by "
            f"{num_prompt_tokens - limit + 1} tokens or more",
        )
    num_output_tokens = num_tokens - num_prompt_tokens
    max_len = min(limit, num_prompt_tokens + params.max_tokens)
    if num_tokens >= max_len:
        return Refusal(
            "invalid_request",
            f"the sequence is complete: it has {num_prompt_tokens} prompt tokens and "
            f"{num_output_tokens} output tokens, max_tokens is {params.max_tokens} and the maximum "
            f"context length is {limit} tokens",
        )
    if num_output_tokens and token_ids[-1] in params.stop_token_ids:
        return Refusal(
            "invalid_request",
            f"the sequence is complete: its last output token, {token_ids[-1]}, is a stop token",
        )
    num_blocks = num_blocks_for(num_kv_tokens(max_len), config.block_size)
    if num_blocks > config.num_blocks:
        capacity = config.num_blocks * config.block_size + 1
        return Refusal(
            "context_length_exceeded",
            f"the prompt has {num_prompt_tokens} tokens and the answer may have "
            f"{max_len - num_prompt_tokens}; {max_len} tokens need {num_blocks} blocks of "
            f"{config.block_size} but the KV pool has {config.num_blocks}, enough for {capacity} "
            f"tokens: shorten the prompt or lower max_tokens by {max_len - capacity}, or start "
            "with a larger KV cache",
        )
    return None


def num_kv_tokens(max_len: int) -> int:
    """Tokens in the KV cache at most: nothing is computed behind a sequence's last token."""
    return max_len - 1
