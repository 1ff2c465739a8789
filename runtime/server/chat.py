"""POST /v1/chat/completions: messages through the model's chat template, answered."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from furiosa_llm.server.chat_prompt import render_prompt
from furiosa_llm.server.chunks import CHAT, FormatLogprobs
from furiosa_llm.server.endpoint import Endpoint, Style
from furiosa_llm.server.errors import invalid
from furiosa_llm.server.generation import Prompt
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.logprobs import chat_logprobs
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.plan import Plan
from furiosa_llm.server.sampling_fields import CommonFields, plan_of
from furiosa_llm.server.service import Service
from furiosa_llm.text.tokenizer import Tokenizer


class ChatRequest(CommonFields, kw_only=True):
    """The body."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _whole_choice(text: str, logprobs: msgspec.Struct | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"message": message, "logprobs": logprobs}


class ChatCompletions(Endpoint[ChatRequest]):
    style: ClassVar[Style] = Style(
        path="/v1/chat/completions",
        id_prefix="chatcmpl",
        whole_object="chat.completion",
        shape=CHAT,
        prompt_param="messages",
        whole_choice=_whole_choice,
    )

    def __init__(self, service: Service, config: HttpConfig) -> None:
        super().__init__(service, config, ChatRequest)

    async def plan(self, request: ChatRequest) -> Plan:
        num_top = _num_top_logprobs(request)
        text = await render_prompt(
            self.service,
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            template_kwargs=request.chat_template_kwargs,
        )
        max_tokens = request.max_completion_tokens
        tokenizer = self.service.engine.tokenizer
        return plan_of(
            request,
            [Prompt(text, bool(request.add_special_tokens))],  # the template has written them
            max_tokens=request.max_tokens if max_tokens is None else max_tokens,
            num_logprobs=num_top,
            logprobs=None if num_top is None else logprobs_formatter(num_top, tokenizer),
        )


def _num_top_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid(
            f"top_logprobs: it is {request.top_logprobs} but logprobs is not true: set logprobs",
            "top_logprobs",
        )
    return None


def logprobs_formatter(num_top: int, tokenizer: Tokenizer) -> FormatLogprobs:
    def logprobs(delta: Delta) -> msgspec.Struct | None:
        assert delta.logprobs is not None
        return chat_logprobs(delta.token_ids, delta.logprobs, num_top, tokenizer)

    return logprobs
