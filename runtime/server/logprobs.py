"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from furiosa_llm.outputs import Logprob, SampleLogprobs
from furiosa_llm.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""What OpenAI writes for a token that cannot be; JSON has no infinity."""


class TopLogprob(msgspec.Struct):
    """One candidate at a position of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    """The token's own, which may be part of a character only."""


class TokenLogprob(msgspec.Struct):
    """One token of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


def chat_logprobs(
    token_ids: Sequence[int], entries: SampleLogprobs, num_top: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    """The shape of /v1/chat/completions."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        tops = [TopLogprob(*_described(id, each, tokenizer)) for id, each in _top(entry, num_top)]
        content.append(TokenLogprob(*_described(token_id, entry[token_id], tokenizer), tops))
    return ChatLogprobs(content)


def completion_logprobs(
    token_ids: Sequence[int], entries: SampleLogprobs, num_top: int, first_offset: int
) -> CompletionLogprobs:
    """The shape of /v1/completions.

    Args:
        first_offset: where in the text the first token begins.
    """
    sampled = [entry[token_id] for token_id, entry in zip(token_ids, entries, strict=True)]
    tokens = [each.decoded_token or "" for each in sampled]
    offsets = []
    for token in tokens:
        offsets.append(first_offset)
        first_offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(each.logprob) for each in sampled],
        top_logprobs=None
        if num_top == 0
        else [
            {each.decoded_token or "": _finite(each.logprob) for _, each in _top(entry, num_top)}
            for entry in entries
        ],
        text_offset=offsets,
    )


def _top(entry: dict[int, Logprob], num_top: int) -> Iterable[tuple[int, Logprob]]:
    """The likeliest tokens, best first; the sampled one is among them only if it is one."""
    ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
    return [(id, each) for id, each in ranked if each.rank and each.rank <= num_top]


def _described(
    token_id: int, logprob: Logprob, tokenizer: Tokenizer
) -> tuple[str, float, list[int]]:
    text = logprob.decoded_token or ""
    raw = text.encode() if tokenizer.pieces is None else tokenizer.pieces.piece(token_id)
    return text, _finite(logprob.logprob), list(raw)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
