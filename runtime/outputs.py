"""What a request yields: snapshots that never change after they were handed out.

Each yield of the engine is a new `RequestOutput` that owns its lists: an output kept from an
earlier step stays what it was, whatever comes after it and whatever the caller does to a later one.

An output is made per token, so `made_completion` and `made_output` make one of parts that nobody
else holds, without the copies that the constructors make to be safe; a prompt is copied when it is
asked for, for a long one would otherwise be copied with each token of its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural-log probability of one token at one position, from the model's raw logits."""

    logprob: float
    rank: int | None = None
    """Place among all tokens by probability; 1 is the likeliest."""
    decoded_token: str | None = None


SampleLogprobs = list[dict[int, Logprob]]
"""Per output token: the sampled token's entry and, where asked for, those of the k likeliest."""

PromptLogprobs = list[dict[int, Logprob] | None]
"""Per prompt token; the first is None, for nothing precedes it."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice of a request, so far (or its last part: see `RequestOutputKind`).

    The positional order is that of Furiosa-LLM 2024.2.1, `finish_reason` fourth. Later releases put
    `logprobs` there; here it is keyword-only, so that a call in their order fails instead of taking
    one for the other.
    """

    index: int
    """Which of the request's `n` choices this is."""
    text: str
    token_ids: list[int]
    """The end-of-sequence token included; any sequence of ints is accepted and copied."""
    finish_reason: str | None = None
    """None while it runs; "stop": a stop token or stop string was met; "length": `max_tokens` or
    the end of the context was."""
    logprobs: SampleLogprobs | None = field(default=None, kw_only=True)
    """One entry per token of `token_ids`. The list is this snapshot's own; an entry is shared by
    all snapshots that contain its token."""
    stop_reason: str | None = field(default=None, kw_only=True)
    """The stop string that ended the choice; None when something else did."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", list(self.token_ids))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", list(self.logprobs))

    def is_finished(self) -> bool:
        return self.finish_reason is not None


class _WithPrompt:
    """Makes an output's own list of its request's prompt when somebody looks at it."""

    __slots__ = ("_prompt_ids",)
    _prompt_ids: tuple[int, ...]

    def __getattr__(self, name: str) -> list[int]:
        # Only what is not set comes here.
        if name != "prompt_token_ids":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        prompt_token_ids = list(object.__getattribute__(self, "_prompt_ids"))
        object.__setattr__(self, "prompt_token_ids", prompt_token_ids)
        return prompt_token_ids


@dataclass(frozen=True, slots=True)
class RequestOutput(_WithPrompt):
    """The state of one request at one moment.

    The positional order is that of Furiosa-LLM 2024.2.1; what later releases added is keyword-only.
    """

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    """Any sequence of ints is accepted and copied."""
    outputs: list[CompletionOutput]
    """By `index`, ascending. With DELTA only the choices that got something new."""
    finished: bool
    """Every choice has ended; nothing comes after this output."""
    prompt_logprobs: PromptLogprobs | None = field(default=None, kw_only=True)
    num_cached_tokens: int = field(default=0, kw_only=True)
    """Prompt tokens whose keys and values were already in the cache."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", list(self.prompt_token_ids))
        object.__setattr__(self, "outputs", list(self.outputs))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens in this output, all choices together; so with DELTA those of this part alone."""
        return sum(len(output.token_ids) for output in self.outputs)


def _setter(cls: type, name: str) -> Callable[[object, object], None]:
    """Sets a field of a frozen dataclass, a good deal faster than `object.__setattr__`."""
    setter: Callable[[object, object], None] = getattr(cls, name).__set__
    return setter


_new = object.__new__
_set_index = _setter(CompletionOutput, "index")
_set_text = _setter(CompletionOutput, "text")
_set_token_ids = _setter(CompletionOutput, "token_ids")
_set_finish_reason = _setter(CompletionOutput, "finish_reason")
_set_logprobs = _setter(CompletionOutput, "logprobs")
_set_stop_reason = _setter(CompletionOutput, "stop_reason")
_set_request_id = _setter(RequestOutput, "request_id")
_set_prompt = _setter(RequestOutput, "prompt")
_set_prompt_ids = _setter(RequestOutput, "_prompt_ids")
_set_outputs = _setter(RequestOutput, "outputs")
_set_finished = _setter(RequestOutput, "finished")
_set_prompt_logprobs = _setter(RequestOutput, "prompt_logprobs")
_set_num_cached_tokens = _setter(RequestOutput, "num_cached_tokens")


def made_completion(
    index: int,
    text: str,
    token_ids: list[int],
    finish_reason: str | None,
    logprobs: SampleLogprobs | None,
    stop_reason: str | None,
) -> CompletionOutput:
    """A CompletionOutput of these lists themselves, which nobody else holds."""
    made = _new(CompletionOutput)
    _set_index(made, index)
    _set_text(made, text)
    _set_token_ids(made, token_ids)
    _set_finish_reason(made, finish_reason)
    _set_logprobs(made, logprobs)
    _set_stop_reason(made, stop_reason)
    return made


def made_output(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: tuple[int, ...],
    outputs: list[CompletionOutput],
    finished: bool,
) -> RequestOutput:
    """A RequestOutput of this list itself, which nobody else holds."""
    made = _new(RequestOutput)
    _set_request_id(made, request_id)
    _set_prompt(made, prompt)
    _set_prompt_ids(made, prompt_token_ids)
    _set_outputs(made, outputs)
    _set_finished(made, finished)
    _set_prompt_logprobs(made, None)
    _set_num_cached_tokens(made, 0)
    return made
