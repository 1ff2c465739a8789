"""Anthropic's POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.server.anthropic_errors import PREFIX
from furiosa_llm.server.anthropic_events import (
    Message,
    MessageEvents,
    Stop,
    TextBlock,
    TokenCount,
    message_usage,
)
from furiosa_llm.server.anthropic_request import (
    UNSUPPORTED,
    CountTokensRequest,
    MessagesRequest,
    chat_of,
)
from furiosa_llm.server.chat_prompt import encode_chat
from furiosa_llm.server.generation import Generation, Prompt
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.json_body import read_json
from furiosa_llm.server.json_response import send_json
from furiosa_llm.server.models import check_model
from furiosa_llm.server.renamed_fields import renamed_fields
from furiosa_llm.server.request_ids import request_id_of
from furiosa_llm.server.service import Service
from furiosa_llm.server.sse import stream_reply
from furiosa_llm.server.unsupported_fields import check_fields

_NAMES = {"prompt": "messages", "prompt_token_ids": "messages", "stop": "stop_sequences"}


_KNOWN = frozenset(MessagesRequest.__struct_fields__)

_decode = msgspec.json.Decoder(MessagesRequest)
_decode_count = msgspec.json.Decoder(CountTokensRequest)


class Messages:
    """An ASGI application for POST /v1/messages."""

    def __init__(self, service: Service, config: HttpConfig) -> None:
        self._service = service
        self._keep_alive_s = config.keep_alive_interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        _ = service.engine  # one that is starting or draining says so, whatever was sent
        body = await read_json(scope, receive, service.limits.max_body_bytes)
        headers = check_fields(body, _KNOWN, UNSUPPORTED)
        request = body.decode(_decode)
        model = check_model(service, request.model)
        token_ids = await _token_ids(service, request)
        room = service.engine.max_model_len - len(token_ids)
        with renamed_fields(_NAMES):
            params = _sampling_params(request, room)
        stop = Stop(at_context=request.max_tokens > room)
        message_id = f"msg_{request_id_of(scope)}"
        async with Generation(service, message_id, endpoint=PREFIX) as generation:
            generation.watch(receive)
            with renamed_fields(_NAMES):
                await generation.start([Prompt(token_ids)], params)
            if not request.stream:
                text = ""
                async for deltas in generation:
                    for delta in deltas:
                        text += delta.text
                        stop.note(delta)
                message = Message(
                    id=message_id,
                    model=model,
                    content=[TextBlock(text)] if text else [],
                    stop_reason=stop.reason,
                    stop_sequence=stop.sequence,
                    usage=message_usage(generation.usage),
                )
                await send_json(message, send, headers)
                return
            events = MessageEvents(message_id, model, stop, lambda: generation.usage)
            await stream_reply(
                generation,
                events,
                scope,
                send,
                opening=events.opening,
                headers=headers,
                keep_alive_s=self._keep_alive_s,
                with_usage=True,
            )


class CountTokens:
    """An ASGI application for POST /v1/messages/count_tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        _ = service.engine
        body = await read_json(scope, receive, service.limits.max_body_bytes)
        headers = check_fields(body, _KNOWN, UNSUPPORTED)
        request = body.decode(_decode_count)
        check_model(service, request.model)
        await send_json(TokenCount(len(await _token_ids(service, request))), send, headers)


async def _token_ids(service: Service, request: CountTokensRequest) -> list[int]:
    chat, is_continued = chat_of(request)
    return await encode_chat(service, chat, continue_final_message=is_continued)


def _sampling_params(request: MessagesRequest, room: int) -> SamplingParams:
    """Args: room: for the answer; at most so many tokens are asked for.

    Raises: InvalidRequestError naming the field at fault.
    """
    max_tokens = request.max_tokens
    if max_tokens > room >= 1:  # without any room the engine says what is wrong
        max_tokens = room
    return SamplingParams.from_optional(
        max_tokens=max_tokens,
        stop=request.stop_sequences,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL,
    )
