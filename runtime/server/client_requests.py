"""From a client's `Generate` or `Chat` to a request that the engine can run."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from furiosa_llm.client.params import params_from_plain
from furiosa_llm.engine.async_llm_engine import LONG_TEXT_CHARS, AsyncLLMEngine
from furiosa_llm.engine.request import Request, Sink
from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.server.chat_prompt import render_prompt
from furiosa_llm.server.errors import HttpError
from furiosa_llm.server.service import Service
from furiosa_llm.server.socket_status import model_id
from furiosa_llm.wire.client_messages import CANNOT_RESUME, Chat, Generate

_CHAT_FLAGS = ("add_generation_prompt", "continue_final_message")
_CHAT_OPTIONS = (*_CHAT_FLAGS, "chat_template_kwargs")


class CannotResumeError(FuriosaLLMError):
    """The stream was begun with another model, weight type or kernel family."""

    code = CANNOT_RESUME


def wire_params(message: Generate | Chat) -> SamplingParams:
    """The request's parameters, for outputs that are sent on: what is cumulative, the client puts
    together itself. Raises: InvalidRequestError.
    """
    params = params_from_plain(message.params)
    if params.output_kind is RequestOutputKind.CUMULATIVE:
        params = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
    return params


async def make_request(
    service: Service,
    engine: AsyncLLMEngine,
    message: Generate | Chat,
    params: SamplingParams,
    sink: Sink,
) -> Request:
    """The request, checked and tokenised; a long prompt on a thread.

    Raises: InvalidRequestError, ContextLengthError, CannotResumeError.
    """
    if isinstance(message, Chat):
        text = await _chat_text(service, message)
        prompt: dict[str, Any] = {"prompt": text}
        make = partial(engine.settings.inputs.make_request, add_special_tokens=False)
        num_chars = len(text)
    else:
        _check_model(service, engine, message)
        if message.prompt is None:
            prompt = {"prompt_token_ids": message.prompt_token_ids}
        else:
            prompt = {"prompt": message.prompt}
        make = partial(
            engine.settings.inputs.make_request,
            add_special_tokens=message.add_special_tokens,
            resume_token_ids=message.resume_token_ids,
        )
        num_chars = len(message.prompt_token_ids) + len(message.prompt or "")
    made = partial(make, message.request_id, prompt, params, sink)
    return await service.in_text_thread(made) if num_chars >= LONG_TEXT_CHARS else made()


def _check_model(service: Service, engine: AsyncLLMEngine, message: Generate) -> None:
    ours = model_id(service.artifact_id, engine)
    if message.resume_token_ids and message.model_id != ours:
        raise CannotResumeError(
            f"the stream was begun by {message.model_id} and this daemon runs {ours}, so it would "
            f"go on with other tokens: send the request anew"
        )


async def _chat_text(service: Service, message: Chat) -> str:
    options = message.options
    for name in options:
        if name not in _CHAT_OPTIONS:
            raise InvalidRequestError(
                f"a chat has no option {name[:40]!r}: allowed are {', '.join(_CHAT_OPTIONS)}",
                param=name[:40],
            )
        if name in _CHAT_FLAGS and not isinstance(options[name], bool):
            raise InvalidRequestError(f"{name} is not True or False", param=name)
    kwargs = options.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise InvalidRequestError(
            "chat_template_kwargs is not a dict", param="chat_template_kwargs"
        )
    try:
        return await render_prompt(
            service,
            list(message.messages),
            add_generation_prompt=options.get("add_generation_prompt"),
            continue_final_message=options.get("continue_final_message", False),
            template_kwargs=kwargs,
        )
    except HttpError as error:  # its words are for any caller, its status for HTTP's
        raise InvalidRequestError(str(error), param=error.param) from None
