"""POST /v1/completions: prompts as text or token ids, continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from furiosa_llm.sampling_params import MAX_LOGPROBS
from furiosa_llm.server.chunks import COMPLETION, FormatLogprobs
from furiosa_llm.server.endpoint import Endpoint, Style
from furiosa_llm.server.errors import HttpError, invalid, unsupported
from furiosa_llm.server.generation import Prompt
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.logprobs import completion_logprobs
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.plan import Plan
from furiosa_llm.server.sampling_fields import CommonFields, plan_of
from furiosa_llm.server.service import Service

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(CommonFields, kw_only=True):
    """The body."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


def _whole_choice(text: str, logprobs: msgspec.Struct | None) -> dict[str, Any]:
    return {"text": text, "logprobs": logprobs}


class Completions(Endpoint[CompletionRequest]):
    style: ClassVar[Style] = Style(
        path="/v1/completions",
        id_prefix="cmpl",
        whole_object="text_completion",
        shape=COMPLETION,
        prompt_param="prompt",
        whole_choice=_whole_choice,
    )

    def __init__(self, service: Service, config: HttpConfig) -> None:
        super().__init__(service, config, CompletionRequest)

    async def plan(self, request: CompletionRequest) -> Plan:
        special = request.add_special_tokens is not False
        prompts = [Prompt(value, special) for value in prompt_values(request.prompt)]
        echoes = None
        if request.echo:
            if request.logprobs is not None:
                raise unsupported(
                    "logprobs", "those of an echoed prompt are not supported: leave one out"
                )
            decode = self.service.engine.tokenizer.decode
            echoes = [p.value if isinstance(p.value, str) else decode(p.value) for p in prompts]
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return plan_of(
            request,
            prompts,
            max_tokens=max_tokens,
            num_logprobs=request.logprobs,
            logprobs=None if request.logprobs is None else _logprobs_formatter(request.logprobs),
            echoes=echoes,
        )


def prompt_values(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """Each prompt of the four forms: text, texts, token ids, lists of token ids.

    Raises: HttpError (400) if forms are mixed or nothing is there.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt: the list is empty: give at least one prompt", "prompt")
    kind = type(prompt[0])
    odd = next((i for i, each in enumerate(prompt) if type(each) is not kind), None)
    if odd is not None:
        raise _mixed(odd)
    return [list(prompt)] if kind is int else list(prompt)  # type: ignore[arg-type]


def _mixed(index: int) -> HttpError:
    return invalid(
        f"prompt[{index}]: it is of another type than prompt[0]: give a string, a list of strings, "
        f"a list of token ids or a list of lists of token ids",
        f"prompt[{index}]",
    )


def _logprobs_formatter(num_top: int) -> FormatLogprobs:
    offsets: dict[int, int] = {}  # by choice: where in its text the next token begins

    def logprobs(delta: Delta) -> msgspec.Struct | None:
        assert delta.logprobs is not None
        if not delta.token_ids:
            return None
        first = offsets.get(delta.choice, 0)
        found = completion_logprobs(
            delta.token_ids, delta.logprobs, min(num_top, MAX_LOGPROBS), first
        )
        offsets[delta.choice] = found.text_offset[-1] + len(found.tokens[-1])
        return found

    return logprobs
