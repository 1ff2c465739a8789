"""The fields by which every generating endpoint lets a caller sample, and what becomes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.server.chunks import FormatLogprobs
from furiosa_llm.server.errors import invalid
from furiosa_llm.server.generation import Prompt
from furiosa_llm.server.plan import Plan


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """A request's fields that `SamplingParams` has under the same name; None is the default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None


class CommonFields(SamplingFields, kw_only=True):
    """What completions and chat completions share besides."""

    n: int | None = None
    best_of: int | None = None
    model: str | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


_NAMES = tuple(
    name
    for name in (*SamplingFields.__struct_fields__, "n", "best_of")
    if name in {field.name for field in dataclasses.fields(SamplingParams)}
)


def sampling_params(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    is_stream: bool,
) -> SamplingParams:
    """What the engine is asked for. Raises: InvalidRequestError naming the field at fault."""
    given = {name: getattr(fields, name, None) for name in _NAMES}
    given["logit_bias"] = _logit_bias(fields.logit_bias)
    given["logprobs"] = num_logprobs
    given["output_kind"] = RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL
    return SamplingParams.from_optional(max_tokens=max_tokens, **given)


def plan_of(
    fields: CommonFields,
    prompts: list[Prompt],
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    logprobs: FormatLogprobs | None,
    echoes: list[str] | None = None,
) -> Plan:
    """The plan of a request. Raises: InvalidRequestError naming the field at fault."""
    is_stream = bool(fields.stream)
    options = fields.stream_options or StreamOptions()
    return Plan(
        prompts=prompts,
        params=sampling_params(
            fields, max_tokens=max_tokens, num_logprobs=num_logprobs, is_stream=is_stream
        ),
        logprobs=logprobs,
        echoes=echoes,
        is_stream=is_stream,
        with_token_ids=bool(fields.return_token_ids),
        with_usage=bool(options.include_usage),
        with_running_usage=bool(options.continuous_usage_stats),
    )


def check_stream_options(fields: CommonFields) -> None:
    """Raises: HttpError (400) for options of a stream that is none."""
    if fields.stream_options is not None and not fields.stream:
        raise invalid(
            "stream_options: it is given but stream is not true: set stream, or leave it out",
            "stream_options",
        )


def _logit_bias(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError:
        wrong = next(key for key in biases if not key.lstrip("-").isdigit())
        raise invalid(
            f"logit_bias: {wrong[:80]!r} is not a token id: its keys are token ids, its values "
            f"numbers",
            "logit_bias",
        ) from None
