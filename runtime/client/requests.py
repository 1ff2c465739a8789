"""From what a caller hands in to the messages that ask for it. What can be refused here, is."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from furiosa_llm.checks import MAX_INT32, check_number, shown
from furiosa_llm.client.params import params_to_plain
from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.wire.client_codec import encode_client
from furiosa_llm.wire.client_messages import Chat, ClientMessage, Generate
from furiosa_llm.wire.errors import WireError

MAX_REQUEST_ID_CHARS = 512
WINDOW = 16
"""Rows of a choice that may be on their way or unread: more hides a longer way, and a choice has
one row per step at most."""


def new_request_id() -> str:
    """One that no other request has."""
    return f"req-{os.urandom(12).hex()}"


def generate_message(
    prompt: Any, params: SamplingParams, request_id: str | None, add_special_tokens: bool
) -> Generate:
    """Of a str, a list of token ids, {"prompt": str} or {"prompt_token_ids": [int, ...]}.

    Raises: InvalidRequestError.
    """
    text, token_ids = _prompt_of(prompt)
    message = Generate(
        stream_id=1,
        request_id=_checked_id(request_id),
        prompt=text,
        prompt_token_ids=token_ids,
        add_special_tokens=add_special_tokens,
        params=params_to_plain(params),
        credits=0,
        resume_token_ids=(),
        model_id="",
    )
    check_sendable(message, "prompt")
    return message


def chat_message(
    messages: Any, params: SamplingParams, request_id: str | None, options: dict[str, Any]
) -> Chat:
    """Of a list of dicts with `role` and `content`. Raises: InvalidRequestError."""
    if (
        isinstance(messages, str | bytes | Mapping)
        or not isinstance(messages, Sequence)
        or not all(isinstance(message, Mapping) for message in messages)
    ):
        raise InvalidRequestError(
            f"messages: {shown(messages)} is not a list of dicts with role and content",
            param="messages",
        )
    message = Chat(
        stream_id=1,
        request_id=_checked_id(request_id),
        messages=tuple(_plain(message) for message in messages),
        options=_plain(options),
        params=params_to_plain(params),
        credits=0,
    )
    check_sendable(message, "messages")
    return message


def checked_params(params: Any) -> SamplingParams:
    """None gives the defaults. Raises: InvalidRequestError for anything of another type."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(
            f"sampling_params: {shown(params)} is of type {type(params).__name__}: pass a "
            f"furiosa_llm.SamplingParams",
            param="sampling_params",
        )
    return params


def checked_timeout(timeout_s: float | None) -> float | None:
    """Seconds above 0, or None for no limit. Raises: InvalidRequestError."""
    if timeout_s is None:
        return None
    return check_number("timeout_s", timeout_s, low=0, high=1e9, above=True)


def token_ids_of(value: Any, param: str) -> tuple[int, ...]:
    """A list of token ids. Raises: InvalidRequestError."""
    is_list = isinstance(value, Iterable) and not isinstance(
        value, str | bytes | bytearray | Mapping
    )
    ids = tuple(value) if is_list else ()
    for token_id in ids:
        is_integer = isinstance(token_id, numbers.Integral) and not isinstance(token_id, bool)
        if not is_integer or not 0 <= int(token_id) <= MAX_INT32:
            raise InvalidRequestError(f"{param}: {shown(token_id)} is no token id", param=param)
    if not is_list:
        raise InvalidRequestError(f"{param}: {shown(value)} is not a list of ids", param=param)
    return tuple(int(token_id) for token_id in ids)


def embedding_refusal() -> FuriosaLLMError:
    """The error for `embed`."""
    return InvalidRequestError("embed is not supported in this version: only text is generated")


def _prompt_of(prompt: Any) -> tuple[str | None, tuple[int, ...]]:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys == {"prompt_token_ids"}:
            prompt = prompt["prompt_token_ids"]
        elif keys == {"prompt"} and isinstance(prompt["prompt"], str):
            prompt = prompt["prompt"]
        else:
            raise InvalidRequestError(
                f"prompt: a dict with the keys {shown(sorted(map(str, keys)))}: give exactly one "
                f"of 'prompt', a str, and 'prompt_token_ids', a list of ints",
                param="prompt",
            )
    if isinstance(prompt, str):
        return prompt, ()
    token_ids = token_ids_of(prompt, "prompt")
    if not token_ids:
        raise InvalidRequestError(
            "the prompt is empty: it must hold at least one token", param="prompt"
        )
    return None, token_ids


def _checked_id(request_id: str | None) -> str:
    if request_id is None:
        return new_request_id()
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError(
            f"request_id: {shown(request_id)} is not a string of 1 to {MAX_REQUEST_ID_CHARS} "
            f"characters",
            param="request_id",
        )
    return request_id


def check_sendable(message: ClientMessage, param: str) -> None:
    """Encode it once, so that what cannot travel is refused to its caller, and now.

    Raises: InvalidRequestError.
    """
    try:
        encode_client(message)
    except WireError as error:
        raise InvalidRequestError(
            f"{param}: the request cannot be sent: {error}", param=param
        ) from None


def _plain(value: Any) -> Any:
    """Mappings and sequences of any type as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in value]
    return value
