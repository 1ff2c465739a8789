"""A chat that is too long for the model, cut at its beginning."""

from __future__ import annotations

from typing import Any

from furiosa_llm.server.chat_prompt import encode_chat
from furiosa_llm.server.generation import Prompt
from furiosa_llm.server.service import Service

Messages = list[dict[str, Any]]


async def prompt_within(service: Service, messages: Messages, max_tokens: int | None) -> Prompt:
    """The prompt of as many of the last messages as leave room for the answer.

    System messages stay, and so does the last message: if that alone is too long, the prompt is,
    and the engine refuses it.

    Args:
        max_tokens: of the answer; None: one token is room enough.
    """
    room = service.engine.max_model_len - (max_tokens or 1)
    token_ids = await encode_chat(service, messages)
    # Fewer messages, fewer tokens; so this many renderings: the number's binary logarithm.
    too_few, enough = 0, sum(map(_may_go, messages[:-1]))
    if len(token_ids) > room and enough:
        token_ids = await encode_chat(service, _without_first(messages, enough))
        while too_few + 1 < enough:
            middle = (too_few + enough) // 2
            shorter = await encode_chat(service, _without_first(messages, middle))
            if len(shorter) > room:
                too_few = middle
            else:
                enough, token_ids = middle, shorter
    return Prompt(token_ids)


def _may_go(message: dict[str, Any]) -> bool:
    return message["role"] not in ("system", "developer")


def _without_first(messages: Messages, count: int) -> Messages:
    """`messages` without the first `count` that may go."""
    kept = []
    for message in messages:
        if count and _may_go(message):
            count -= 1
        else:
            kept.append(message)
    return kept
