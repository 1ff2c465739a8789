"""POST /v1/responses, without a memory: every request brings its whole conversation."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.server.chat import logprobs_formatter
from furiosa_llm.server.chat_prompt import render_prompt
from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.generation import Generation, Prompt
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.json_body import read_json
from furiosa_llm.server.json_response import send_json
from furiosa_llm.server.models import check_model
from furiosa_llm.server.renamed_fields import renamed_fields
from furiosa_llm.server.request_ids import request_id_of
from furiosa_llm.server.response_events import Answer, ResponseEvents, ResponseObject, ended
from furiosa_llm.server.responses_request import (
    UNSUPPORTED,
    ResponsesRequest,
    check,
    messages_of,
    num_logprobs,
)
from furiosa_llm.server.sampling_fields import sampling_params
from furiosa_llm.server.service import Service
from furiosa_llm.server.sse import stream_reply
from furiosa_llm.server.truncation import prompt_within
from furiosa_llm.server.unsupported_fields import check_fields

PATH = "/v1/responses"

_NAMES = {"prompt": "input", "prompt_token_ids": "input", "max_tokens": "max_output_tokens"}


class Responses:
    """An ASGI application for POST /v1/responses."""

    def __init__(self, service: Service, config: HttpConfig) -> None:
        self._service = service
        self._keep_alive_s = config.keep_alive_interval_s
        self._decoder = msgspec.json.Decoder(ResponsesRequest)
        self._known = frozenset(ResponsesRequest.__struct_fields__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        engine = service.engine  # one that is starting or draining says so, whatever was sent
        body = await read_json(scope, receive, service.limits.max_body_bytes)
        headers = check_fields(body, self._known, UNSUPPORTED)
        request = body.decode(self._decoder)
        model = check_model(service, request.model)
        check(request)
        num_top = num_logprobs(request)
        with renamed_fields(_NAMES):
            params = sampling_params(
                request,
                max_tokens=request.max_output_tokens,
                num_logprobs=num_top,
                is_stream=bool(request.stream),
            )
        prompt = await self._prompt(request)
        request_id = request_id_of(scope)
        response = _begun(request, params, model, f"resp_{request_id}")
        answer = Answer(
            f"msg_{request_id}",
            None if num_top is None else logprobs_formatter(num_top, engine.tokenizer),
        )
        async with Generation(service, response.id, endpoint=PATH) as generation:
            generation.watch(receive)
            with renamed_fields(_NAMES):
                await generation.start([prompt], params)
            if not request.stream:
                async for deltas in generation:
                    for delta in deltas:
                        answer.add(delta)
                ended(response, answer, generation.usage)
                await send_json(response, send, headers)
                return
            events = ResponseEvents(response, answer, lambda: generation.usage)
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

    async def _prompt(self, request: ResponsesRequest) -> Prompt:
        messages = messages_of(request)
        if request.truncation == "auto":
            return await prompt_within(self._service, messages, request.max_output_tokens)
        return Prompt(await render_prompt(self._service, messages), add_special_tokens=False)


def _begun(
    request: ResponsesRequest, params: SamplingParams, model: str, response_id: str
) -> ResponseObject:
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=model,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
        temperature=params.temperature,
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


async def no_such_response(request: Request) -> Response:
    """GET, DELETE and POST …/cancel of a response. Raises: HttpError (404)."""
    response_id: str = request.path_params["response_id"]
    raise HttpError(
        404,
        f"there is no response {response_id[:80]!r}: the server keeps none, so a response is only "
        f"in the answer to the request that made it",
        type="not_found_error",
        code="response_not_found",
        param="response_id",
    )
