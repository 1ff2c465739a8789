"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokenizer as requests see it."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from furiosa_llm.server.chat_prompt import render_prompt
from furiosa_llm.server.errors import invalid
from furiosa_llm.server.generation import LONG_TEXT_CHARS
from furiosa_llm.server.json_body import read_json
from furiosa_llm.server.json_response import json_response, send_json
from furiosa_llm.server.models import check_model
from furiosa_llm.server.service import Service
from furiosa_llm.server.unsupported_fields import check_fields

S = TypeVar("S", bound=msgspec.Struct)


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class Tokenize:
    """An ASGI application for POST /tokenize."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(TokenizeRequest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._service.engine
        request, headers = await _read(self._service, scope, receive, self._decoder)
        check_model(self._service, request.model)
        text, add_special_tokens = await self._text(request)
        encode = partial(engine.tokenizer.encode, text, add_special_tokens)
        is_long = len(text) >= LONG_TEXT_CHARS
        token_ids = await self._service.in_text_thread(encode) if is_long else encode()
        text_of = engine.tokenizer.token_text
        content = {
            "count": len(token_ids),
            "max_model_len": engine.max_model_len,
            "tokens": token_ids,
            "token_strs": list(map(text_of, token_ids)) if request.return_token_strs else None,
        }
        await send_json(content, send, headers)

    async def _text(self, request: TokenizeRequest) -> tuple[str, bool]:
        """What to encode, and whether special tokens are added: a chat's template writes them."""
        if (request.prompt is None) == (request.messages is None):
            raise invalid("prompt: give either prompt or messages, and not both", "prompt")
        if request.prompt is not None:
            return request.prompt, request.add_special_tokens is not False
        text = await render_prompt(
            self._service,
            request.messages or [],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            template_kwargs=request.chat_template_kwargs,
        )
        return text, bool(request.add_special_tokens)


class Detokenize:
    """An ASGI application for POST /detokenize."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(DetokenizeRequest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._service.engine
        request, headers = await _read(self._service, scope, receive, self._decoder)
        check_model(self._service, request.model)
        vocab_size = engine.settings.inputs.vocab_size
        odd = next((i for i, t in enumerate(request.tokens) if not 0 <= t < vocab_size), None)
        if odd is not None:
            raise invalid(
                f"tokens[{odd}]: {request.tokens[odd]} is no token id: they go from 0 to "
                f"{vocab_size - 1}",
                f"tokens[{odd}]",
            )
        decode = partial(engine.tokenizer.decode, request.tokens, bool(request.skip_special_tokens))
        is_long = len(request.tokens) >= LONG_TEXT_CHARS
        text = await self._service.in_text_thread(decode) if is_long else decode()
        await send_json({"prompt": text}, send, headers)


class TokenizerInfo:
    """GET /tokenizer_info."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, request: Request) -> Response:
        engine = self._service.engine
        tokenizer, inputs = engine.tokenizer, engine.settings.inputs
        return json_response(
            {
                "model": self._service.model_name,
                "vocab_size": inputs.vocab_size,
                "max_model_len": engine.max_model_len,
                "eos_token_ids": inputs.eos_token_ids,
                "special_tokens": {
                    str(id): tokenizer.token_text(id) for id in sorted(tokenizer.special_ids)
                },
                "has_chat_template": tokenizer.has_chat_template
                or self._service.chat_template is not None,
            }
        )


async def _read(
    service: Service, scope: Scope, receive: Receive, decoder: msgspec.json.Decoder[S]
) -> tuple[S, list[tuple[bytes, bytes]]]:
    body = await read_json(scope, receive, service.limits.max_body_bytes)
    known = decoder.type.__struct_fields__
    return body.decode(decoder), check_fields(body, known)
