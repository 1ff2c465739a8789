"""What each route takes and answers: the table that the OpenAPI document is made from."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from furiosa_llm.server.anthropic_errors import AnthropicError
from furiosa_llm.server.anthropic_events import Message, TokenCount
from furiosa_llm.server.anthropic_request import CountTokensRequest, MessagesRequest
from furiosa_llm.server.api_schemas import (
    ChatCompletion,
    Completion,
    DetokenizedText,
    Error,
    ModelCard,
    ModelList,
    ProbeReport,
    TokenizerDescription,
    TokenList,
    VersionReport,
)
from furiosa_llm.server.chat import ChatRequest
from furiosa_llm.server.completions import CompletionRequest
from furiosa_llm.server.response_events import ResponseObject
from furiosa_llm.server.responses_request import ResponsesRequest
from furiosa_llm.server.status import ServerStatus
from furiosa_llm.server.tokenization import DetokenizeRequest, TokenizeRequest

Struct = type[msgspec.Struct]

JSON = "application/json"
TEXT = "text/plain"
HTML = "text/html"
EVENTS = "text/event-stream"

_OF_BODIES = (400, 413, 415)
_OF_THE_ENGINE = (429, 500, 503)
_OF_BODIES_AND_MODEL = (*_OF_BODIES, 404, 500, 503)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    tag: str
    summary: str
    answer: Struct | None = None
    """Of status 200, as JSON; None: `media_type` says what it is, if there is a 200."""
    media_type: str | None = None
    body: Struct | None = None
    example: dict[str, object] | None = None
    """A body to begin with; "model" is put in."""
    events: str | None = None
    """What a stream holds, where there is one."""
    errors: tuple[int, ...] = ()
    """Besides those that every route has."""
    error: Struct = Error
    unready: Struct | None = None
    """What a 503 is, where it is no error."""
    is_open: bool = False
    """It needs no API key."""


def _probe(path: str, summary: str, *, may_fail: bool = True) -> Operation:
    return Operation(
        "GET", path, "Probes", summary, ProbeReport,
        unready=ProbeReport if may_fail else None, is_open=True,
    )  # fmt: skip


def _generate(
    path: str, tag: str, summary: str, body: Struct, answer: Struct, events: str,
    example: dict[str, object], error: Struct = Error,
) -> Operation:  # fmt: skip
    return Operation(
        "POST", path, tag, summary, answer, body=body, events=events, example=example,
        errors=(*_OF_BODIES, 404, *_OF_THE_ENGINE), error=error,
    )  # fmt: skip


_CHAT: dict[str, object] = {
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 64,
}

OPERATIONS: tuple[Operation, ...] = (
    _generate(
        "/v1/chat/completions", "Generation", "Answer a chat.", ChatRequest, ChatCompletion,
        "With stream: chat.completion.chunk objects, then [DONE].", _CHAT,
    ),
    _generate(
        "/v1/completions", "Generation", "Continue a prompt.", CompletionRequest, Completion,
        "With stream: text_completion objects, then [DONE].",
        {"prompt": "The sky is", "max_tokens": 16},
    ),
    _generate(
        "/v1/responses", "Generation", "Answer a conversation. Nothing is stored.",
        ResponsesRequest, ResponseObject,
        "With stream: events from response.created to response.completed, response.incomplete or "
        "response.failed.",
        {"input": "Why is the sky blue?", "max_output_tokens": 64},
    ),
    _generate(
        "/v1/messages", "Anthropic", "Answer a chat.", MessagesRequest, Message,
        "With stream: events from message_start to message_stop.", _CHAT, AnthropicError,
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", "Anthropic", "Count the tokens of a chat's prompt.",
        TokenCount, body=CountTokensRequest, example={"messages": _CHAT["messages"]},
        errors=_OF_BODIES_AND_MODEL, error=AnthropicError,
    ),
    *(
        Operation(method, f"/v1/responses/{{response_id}}{path}", "Generation", summary,
                  errors=(404,))
        for method, path, summary in (
            ("GET", "", "Always 404: nothing is stored."),
            ("DELETE", "", "Always 404: nothing is stored."),
            ("POST", "/cancel", "Always 404: to cancel a response, close its connection."),
            ("GET", "/input_items", "Always 404: nothing is stored."),
        )
    ),
    Operation("POST", "/tokenize", "Models", "The token ids of a prompt or of a chat.", TokenList,
              body=TokenizeRequest, example={"prompt": "The sky is"}, errors=_OF_BODIES_AND_MODEL),
    Operation("POST", "/detokenize", "Models", "The text of token ids.", DetokenizedText,
              body=DetokenizeRequest, example={"tokens": [1, 2, 3]}, errors=_OF_BODIES_AND_MODEL),
    Operation("GET", "/tokenizer_info", "Models", "The model's tokenizer.", TokenizerDescription,
              errors=(503,)),
    Operation("GET", "/v1/models", "Models", "The models that are served.", ModelList,
              errors=(503,)),
    Operation("GET", "/v1/models/{model}", "Models", "One of them.", ModelCard, errors=(404, 503)),
    Operation("GET", "/v1/status", "Operation", "Workers, queues and blocks.", ServerStatus),
    Operation("GET", "/version", "Operation", "The server's version.", VersionReport),
    Operation("GET", "/metrics", "Operation", "Metrics, in Prometheus' text format.",
              media_type=TEXT),
    _probe("/livez", "200 while the server runs.", may_fail=False),
    _probe("/readyz", "200 while a request would get tokens."),
    _probe("/health", "The same as /readyz."),
    _probe("/startupz", "200 once the server has been ready; before that, how far it is."),
    Operation("GET", "/openapi.json", "Documentation", "This document.", media_type=JSON),
    Operation("GET", "/docs", "Documentation", "A page that shows it.", media_type=HTML,
              is_open=True),
)  # fmt: skip
