"""What a request yields: snapshots that never change after they were handed out.

Each yield of the engine is a new `RequestOutput` that owns its lists: an output kept from an
earlier step stays what it was, whatever comes after it and whatever the caller does to a later one.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class RequestOutput:
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
