"""What completions and chat completions do alike: from a body to a whole reply or a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.server.chunks import ChunkWriter, Shape, encode
from furiosa_llm.server.errors import invalid
from furiosa_llm.server.generation import Generation
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.json_body import read_json
from furiosa_llm.server.json_response import send_json
from furiosa_llm.server.mailbox import Delta
from furiosa_llm.server.models import check_model
from furiosa_llm.server.plan import Plan
from furiosa_llm.server.request_ids import request_id_of
from furiosa_llm.server.sampling_fields import CommonFields, check_stream_options
from furiosa_llm.server.service import Service
from furiosa_llm.server.sse import stream_reply
from furiosa_llm.server.unsupported_fields import check_fields

R = TypeVar("R", bound=CommonFields)


@dataclass(frozen=True, slots=True)
class Style:
    """How one endpoint's answers look."""

    path: str
    id_prefix: str
    whole_object: str
    shape: Shape
    prompt_param: str
    """Its name for what the engine calls the prompt."""
    whole_choice: Callable[[str, msgspec.Struct | None], dict[str, Any]]
    """(text, logprobs) to a choice of a whole reply, but for its index and finish reason."""


class Endpoint(ABC, Generic[R]):
    """An ASGI application for one path."""

    style: ClassVar[Style]

    def __init__(self, service: Service, config: HttpConfig, request_type: type[R]) -> None:
        self.service = service
        self._keep_alive_s = config.keep_alive_interval_s
        self._decoder = msgspec.json.Decoder(request_type)
        self._known = frozenset(request_type.__struct_fields__)

    @abstractmethod
    async def plan(self, request: R) -> Plan:
        """Check everything that can be checked without the engine.

        Raises: HttpError, InvalidRequestError.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _ = self.service.engine  # one that is starting or draining says so, whatever was sent
        body = await read_json(scope, receive, self.service.limits.max_body_bytes)
        headers = check_fields(body, self._known)
        request = body.decode(self._decoder)
        model = check_model(self.service, request.model)
        check_stream_options(request)
        plan = await self.plan(request)
        self._check_size(plan)
        reply_id = f"{self.style.id_prefix}-{request_id_of(scope)}"
        reply = {
            "id": reply_id,
            "object": self.style.shape.object if plan.is_stream else self.style.whole_object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self.service.fingerprint,
        }
        async with Generation(self.service, reply_id, endpoint=self.style.path) as generation:
            generation.watch(receive)
            await self._start(generation, plan)
            if not plan.is_stream:
                content = reply | await _whole_reply(generation, plan, self.style)
                await send_json(content, send, headers)
                return
            writer = _chunk_writer(generation, plan, self.style, reply)
            await stream_reply(
                generation,
                writer,
                scope,
                send,
                opening=partial(_opening, generation, plan, writer),
                headers=headers,
                keep_alive_s=self._keep_alive_s,
                with_usage=plan.with_usage,
            )

    def _check_size(self, plan: Plan) -> None:
        limits = self.service.limits
        if len(plan.prompts) > limits.max_prompts:
            raise invalid(
                f"{self.style.prompt_param}: {len(plan.prompts)} prompts are more than "
                f"{limits.max_prompts}: send several requests",
                self.style.prompt_param,
            )
        if plan.num_choices > limits.max_choices:
            raise invalid(
                f"n: {len(plan.prompts)} prompts with n={plan.params.n} are {plan.num_choices} "
                f"choices, more than {limits.max_choices}: send several requests",
                "n",
            )

    async def _start(self, generation: Generation, plan: Plan) -> None:
        try:
            await generation.start(plan.prompts, plan.params)
        except InvalidRequestError as error:
            if error.param in ("prompt", "prompt_token_ids"):
                error.param = self.style.prompt_param
            raise


async def _whole_reply(generation: Generation, plan: Plan, style: Style) -> dict[str, Any]:
    """The choices and the usage."""
    deltas: dict[int, Delta] = {}
    async for found in generation:
        deltas.update((delta.choice, delta) for delta in found)  # each is a whole choice
    choices = []
    for index, delta in sorted(deltas.items()):
        logprobs = None if plan.logprobs is None else plan.logprobs(delta)
        text = plan.echo(index) + delta.text
        choice = {"index": index, **style.whole_choice(text, logprobs)}
        choice["finish_reason"] = delta.finish_reason
        if plan.with_token_ids:
            choice["prompt_token_ids"] = generation.prompt_token_ids(index)
            choice["token_ids"] = delta.token_ids
        choices.append(choice)
    return {"choices": choices, "usage": generation.usage}


def _chunk_writer(
    generation: Generation, plan: Plan, style: Style, reply: dict[str, Any]
) -> ChunkWriter:
    return ChunkWriter(
        style.shape,
        reply,
        plan.num_choices,
        logprobs=plan.logprobs,
        has_token_ids=plan.with_token_ids,
        has_usage=plan.with_usage,
        running_usage=(lambda: generation.usage) if plan.with_running_usage else None,
    )


def _opening(generation: Generation, plan: Plan, writer: ChunkWriter) -> bytes:
    """The first chunks of all choices."""
    chunks = []
    for choice in range(plan.num_choices):
        extra = b""
        if plan.with_token_ids:
            prompt = encode(generation.prompt_token_ids(choice))
            extra = b',"prompt_token_ids":' + prompt + b',"token_ids":[]'
        chunks.append(writer.opening(choice, text=plan.echo(choice), extra=extra))
    return b"".join(chunks)
