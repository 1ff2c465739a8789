"""How answers look that the server writes piece by piece, for the OpenAPI document alone.

The tests hold real answers against the document, and so against these.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from furiosa_llm.server.logprobs import ChatLogprobs, CompletionLogprobs
from furiosa_llm.server.status import Progress
from furiosa_llm.server.usage import Usage


class ErrorContent(msgspec.Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    """invalid_request_error, authentication_error, not_found_error, rate_limit_error or
    server_error."""
    param: str | None
    """The field at fault, such as messages[0].content."""
    code: str | None
    """What a program may look at, such as context_length_exceeded."""
    request_id: str


class Error(msgspec.Struct):
    """An answer other than 2xx, or the last chunk of a stream that failed."""

    error: ErrorContent


class ProbeReport(msgspec.Struct, kw_only=True):
    """The answer of a probe."""

    status: str
    reason: str | msgspec.UnsetType = msgspec.UNSET
    """Why not."""
    phase: str | msgspec.UnsetType = msgspec.UNSET
    progress: Progress | msgspec.UnsetType = msgspec.UNSET
    workers: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    """How far each worker is."""


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    """Tokens that prompt and answer may have together."""
    max_prompt_len: int
    max_context_len: int
    artifact_id: str
    weights: str


class ModelList(msgspec.Struct):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class VersionReport(msgspec.Struct):
    """Of the server."""

    version: str


class TokenList(msgspec.Struct, kw_only=True):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """Where return_token_strs was set."""


class DetokenizedText(msgspec.Struct):
    """The answer of POST /detokenize."""

    prompt: str


class TokenizerDescription(msgspec.Struct, kw_only=True):
    """The model's tokenizer."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    special_tokens: dict[str, str]
    """Texts by token id."""
    has_chat_template: bool


class AnswerMessage(msgspec.Struct, kw_only=True):
    """A chat's answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(msgspec.Struct, kw_only=True):
    """One answer of a request."""

    index: int
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    """This and the next are there where return_token_ids was set."""
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Choice, kw_only=True):
    """One answer of a chat."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice, kw_only=True):
    """One continuation of a prompt."""

    text: str
    logprobs: CompletionLogprobs | None


class Reply(msgspec.Struct, kw_only=True):
    """What whole replies have alike."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """Of what decides the tokens: equal where the same request gives the same answer."""
    usage: Usage


class ChatCompletion(Reply, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(Reply, kw_only=True):
    """The answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
