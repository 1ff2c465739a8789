"""From one line of a batch to its answer, in OpenAI's words: the HTTP API's own parsing and shapes,
with the work done over a client.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from furiosa_llm import RequestOutput, SamplingParams
from furiosa_llm.cli.batch_files import BatchLine
from furiosa_llm.client import AsyncClient, ClientClosedError, DaemonUnreachableError
from furiosa_llm.errors import (
    EngineShutDownError,
    FuriosaLLMError,
    OverloadedError,
    ServiceUnavailableError,
)
from furiosa_llm.sampling_params import MAX_LOGPROBS
from furiosa_llm.server.chat import ChatCompletions, ChatRequest
from furiosa_llm.server.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    Completions,
    prompt_values,
)
from furiosa_llm.server.endpoint import Style
from furiosa_llm.server.errors import http_error_of, invalid, model_not_found, unsupported
from furiosa_llm.server.json_body import JsonBody
from furiosa_llm.server.logprobs import chat_logprobs, completion_logprobs
from furiosa_llm.server.sampling_fields import CommonFields, sampling_params
from furiosa_llm.server.unsupported_fields import check_fields
from furiosa_llm.server.usage import usage_of
from furiosa_llm.text.tokenizer import Tokenizer

ENDS_THE_BATCH = (
    ClientClosedError, DaemonUnreachableError, EngineShutDownError, ServiceUnavailableError,
)  # fmt: skip
"""Errors that say nothing about the request: with no daemon, no line can be answered."""

LONGEST_PAUSE_S = 5.0

_decode_chat = msgspec.json.Decoder(ChatRequest)
_decode_completion = msgspec.json.Decoder(CompletionRequest)


class _NoPieces:
    """A daemon's tokenizer is not here, so a token's bytes are those of its text."""

    pieces = None


class Answerer:
    """Answers lines.

    Args:
        models: the names that a body's `model` may have, the first of which answers carry.
    """

    def __init__(self, client: AsyncClient, models: Sequence[str]) -> None:
        self._client = client
        self._models = tuple(models)

    async def answer(self, line: BatchLine) -> dict[str, Any]:
        """The output line: a response of status 200, or of the status that HTTP would give.

        Raises: one of ENDS_THE_BATCH.
        """
        request_id = secrets.token_hex(12)
        try:
            body = await self._body(line, request_id)
            status = 200
        except ENDS_THE_BATCH:
            raise
        except FuriosaLLMError as error:
            failure = http_error_of(error)
            status, body = failure.status, {"error": failure.content(request_id)}
        return {
            "id": f"batch_req_{request_id}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }

    async def _body(self, line: BatchLine, request_id: str) -> dict[str, Any]:
        body = JsonBody(bytes(line.body))
        if line.url == ChatCompletions.style.path:
            return await self._chat(body, request_id)
        return await self._completion(body, request_id)

    async def _chat(self, body: JsonBody, request_id: str) -> dict[str, Any]:
        check_fields(body, ChatRequest.__struct_fields__)
        request = body.decode(_decode_chat)
        num_top = None
        if request.logprobs:
            num_top = request.top_logprobs or 0
        elif request.top_logprobs:
            raise invalid("top_logprobs: logprobs is not true: set logprobs", "top_logprobs")
        max_tokens = request.max_completion_tokens
        params = self._params(
            request, request.max_tokens if max_tokens is None else max_tokens, num_top
        )
        output = await self._patiently(
            lambda: self._client.chat(
                request.messages,
                params,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=bool(request.continue_final_message),
                chat_template_kwargs=request.chat_template_kwargs,
            )
        )
        style = ChatCompletions.style
        choices = []
        for part in output.outputs:
            logprobs: msgspec.Struct | None = None
            if num_top is not None and part.logprobs is not None:
                no_tokenizer = cast(Tokenizer, _NoPieces())
                logprobs = chat_logprobs(part.token_ids, part.logprobs, num_top, no_tokenizer)
            choices.append(_choice(style, part.index, part.text, part.finish_reason, logprobs))
        return self._reply(style, request, request_id, choices, [output])

    async def _completion(self, body: JsonBody, request_id: str) -> dict[str, Any]:
        check_fields(body, CompletionRequest.__struct_fields__)
        request = body.decode(_decode_completion)
        if request.echo and request.logprobs is not None:
            raise unsupported("logprobs", "those of an echoed prompt are not supported")
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        params = self._params(request, max_tokens, request.logprobs)
        prompts = prompt_values(request.prompt)
        outputs = [await self._complete(prompt, params, request) for prompt in prompts]
        style = Completions.style
        choices = []
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            echo = await self._echo(prompt) if request.echo else ""
            for part in output.outputs:
                logprobs: msgspec.Struct | None = None
                if request.logprobs is not None and part.logprobs:
                    num_top = min(request.logprobs, MAX_LOGPROBS)
                    logprobs = completion_logprobs(part.token_ids, part.logprobs, num_top, 0)
                place, text = index * params.n + part.index, echo + part.text
                choices.append(_choice(style, place, text, part.finish_reason, logprobs))
        return self._reply(style, request, request_id, choices, outputs)

    async def _complete(
        self, prompt: str | list[int], params: SamplingParams, request: CompletionRequest
    ) -> RequestOutput:
        special = request.add_special_tokens is not False
        return await self._patiently(
            lambda: self._client.generate(
                {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt},
                params,
                add_special_tokens=special,
            )
        )

    async def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else await self._client.detokenize(prompt)

    def _params(
        self, request: CommonFields, max_tokens: int | None, num_logprobs: int | None
    ) -> SamplingParams:
        if request.model is not None and request.model not in self._models:
            raise model_not_found(request.model, self._models)
        if request.stream:
            raise invalid("stream: a batch is not streamed: leave it out", "stream")
        return sampling_params(
            request, max_tokens=max_tokens, num_logprobs=num_logprobs, is_stream=False
        )

    async def _patiently(self, ask: Any) -> RequestOutput:
        """Ask again, for as long as it takes, while the daemon has too much to do."""
        while True:
            try:
                output: RequestOutput = await ask()
            except OverloadedError as error:
                await asyncio.sleep(min(max(error.retry_after, 0.05), LONGEST_PAUSE_S))
            else:
                return output

    def _reply(
        self,
        style: Style,
        request: CommonFields,
        request_id: str,
        choices: list[dict[str, Any]],
        outputs: list[RequestOutput],
    ) -> dict[str, Any]:
        return {
            "id": f"{style.id_prefix}-{request_id}",
            "object": style.whole_object,
            "created": int(time.time()),
            "model": request.model or self._models[0],
            "choices": choices,
            "usage": usage_of(
                sum(output.num_prompt_tokens for output in outputs),
                sum(output.num_output_tokens for output in outputs),
                sum(output.num_cached_tokens for output in outputs),
            ),
        }


def _choice(
    style: Style, index: int, text: str, reason: str | None, logprobs: msgspec.Struct | None
) -> dict[str, Any]:
    return {"index": index, **style.whole_choice(text, logprobs), "finish_reason": reason}
