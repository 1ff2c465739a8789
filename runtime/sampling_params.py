"""How a request is sampled and when it ends, as the caller states it.

A value is checked once, when it is made, and never changes: neither the caller nor the engine can
alter it, so one object may serve any number of requests. What this version cannot do is refused by
name, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from furiosa_llm.checks import (
    MAX_INT32,
    check_bool,
    check_int,
    check_number,
    refuse,
    shown,
)
from furiosa_llm.scheduler.params import (
    GREEDY_TEMPERATURE,
    MAX_BIAS,
    MAX_BIASES,
    MAX_PENALTY,
)

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0

_UNSUPPORTED_DEFAULT = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "prompt_logprobs": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "reasoning_structured_outputs": None,
    "extra_args": None,
    "bad_words": None,
    "allowed_token_ids": None,
}
"""Names that callers of other releases and servers know; only these values are accepted."""


class SamplingType(IntEnum):
    """What kind of choice a step makes; BEAM is Furiosa-LLM's and never occurs here."""

    GREEDY = 0
    RANDOM = 1
    BEAM = 2


class RequestOutputKind(IntEnum):
    """What each output of a request holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """Only what is new since the output before it."""
    FINAL = 2
    """Everything, in one output at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; keyword arguments only.

    Raises: InvalidRequestError (a ValueError) whose `param` is the field at fault.
    """

    n: int = 1
    """Choices to produce, 1 to 128. Each has random numbers of its own."""
    best_of: int | None = None
    """None, or equal to `n` and then stored as None: choices are not ranked in this version."""
    temperature: float = 1.0
    """0 to 100; below 1e-5 the likeliest token is taken."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens of this total probability; above 0, to 1."""
    top_k: int = -1
    """Sample from the k likeliest tokens; -1 is off (so is 0, which is stored as -1)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest token's probability; 0 to 1."""
    repetition_penalty: float = 1.0
    """Above 0, to 2; over 1 discourages every token of the prompt and of the output so far."""
    presence_penalty: float = 0.0
    """-2 to 2; subtracted from the logits of all tokens that the output so far holds."""
    frequency_penalty: float = 0.0
    """-2 to 2; as the presence penalty, times how often the output so far holds the token."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    """{token id: -100 to 100}, 1024 at most, added to the logits; stored as pairs by token id."""
    stop: tuple[str, ...] | list[str] | str | None = None
    """Strings that end a choice, stored as a tuple. Empty ones are dropped."""
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    """Token ids that end a choice, besides the model's own; stored as a tuple."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens; `stop_token_ids` still end the choice."""
    max_tokens: int | None = 16
    """Output tokens at most; None is as many as fit the context."""
    min_tokens: int = 0
    """No stop token and no stop string ends a choice before this many output tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text; token ids always hold them."""
    logprobs: int | None = None
    """None (or False): none; 0: the sampled token's; k up to 20: also those of the k likeliest."""
    seed: int | None = None
    """From -2**63 to 2**64 - 1. Same seed, same tokens; None lets the engine choose."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    # Only the default is accepted: see `_UNSUPPORTED_DEFAULT`.
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    prompt_logprobs: int | None = None
    structured_outputs: Any = None
    guided_decoding: Any = None
    reasoning_structured_outputs: Any = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        for name, default in _UNSUPPORTED_DEFAULT.items():
            value = getattr(self, name)
            if value is not default:
                _check_unsupported(name, value, default)
                self._set(name, default)  # for 0 or False: one form, so that equal means the same
        self._set("n", check_int("n", self.n, low=1, high=MAX_N))
        _check_best_of(self.best_of, self.n)
        self._set("best_of", None)
        self._set(
            "temperature",
            check_number("temperature", self.temperature, low=0, high=MAX_TEMPERATURE),
        )
        self._set("top_p", check_number("top_p", self.top_p, low=0, high=1, above=True))
        self._set("top_k", check_int("top_k", self.top_k, low=-1) or -1)
        self._set("min_p", check_number("min_p", self.min_p, low=0, high=1))
        self._set(
            "repetition_penalty",
            check_number("repetition_penalty", self.repetition_penalty, low=0, high=2, above=True),
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = check_number(name, getattr(self, name), low=-MAX_PENALTY, high=MAX_PENALTY)
            self._set(name, value)
        self._set("logit_bias", _check_logit_bias(self.logit_bias))
        self._set("stop", _check_stop(self.stop))
        self._set("stop_token_ids", _check_stop_token_ids(self.stop_token_ids))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        if self.max_tokens is not None:
            self._set("max_tokens", check_int("max_tokens", self.max_tokens, low=1))
        self._set("min_tokens", _check_min_tokens(self.min_tokens, self.max_tokens))
        self._set("logprobs", _check_logprobs(self.logprobs))
        if self.seed is not None:
            self._set("seed", check_int("seed", self.seed, low=-(2**63), high=2**64 - 1))
        self._set("output_kind", _check_output_kind(self.output_kind))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_optional(cls, **given: Any) -> Self:
        """As the constructor, with None for the default, except that `max_tokens` None counts."""
        return cls(**{k: v for k, v in given.items() if v is not None or k == "max_tokens"})

    @property
    def sampling_type(self) -> SamplingType:
        return SamplingType.GREEDY if self.temperature < GREEDY_TEMPERATURE else SamplingType.RANDOM

    def clone(self) -> Self:
        """An equal value of its own. Use `dataclasses.replace` to get one that differs."""
        return dataclasses.replace(self)


def _check_unsupported(name: str, value: object, default: object) -> None:
    # A number equal to the default passes, 0 for 0.0; what cannot be compared to it does not.
    if not (isinstance(value, int | float) and value == default):
        raise refuse(name, f"{shown(value)} is not supported in this version: leave {name} out")


def _check_best_of(best_of: int | None, n: int) -> None:
    if best_of is not None and check_int("best_of", best_of, low=1) != n:
        raise refuse(
            "best_of",
            f"{best_of} differs from n={n}, and ranking choices is not supported in this version: "
            f"leave best_of out",
        )


def _check_logit_bias(biases: object) -> tuple[tuple[int, float], ...] | None:
    if biases is None:
        return None
    if isinstance(biases, Mapping):
        pairs = list(biases.items())
    elif isinstance(biases, list | tuple) and all(map(_is_pair, biases)):
        pairs = list(biases)
    else:
        raise refuse("logit_bias", f"{shown(biases)} is not a mapping from token ids to numbers")
    if len(pairs) > MAX_BIASES:
        raise refuse("logit_bias", f"{len(pairs)} token ids are more than {MAX_BIASES}")
    checked = {
        check_int("logit_bias", token_id, low=0): check_number(
            "logit_bias", bias, low=-MAX_BIAS, high=MAX_BIAS
        )
        for token_id, bias in pairs
    }
    if len(checked) < len(pairs):
        raise refuse("logit_bias", f"{shown(biases)} holds a token id twice")
    return tuple(sorted(checked.items())) or None


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _check_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise refuse("stop", f"{shown(stop)} is not a string or a list of strings")
    strings = tuple(s for s in strings if s)
    if len(strings) > MAX_STOP_STRINGS:
        raise refuse("stop", f"{len(strings)} strings are more than {MAX_STOP_STRINGS}")
    longest = max(map(len, strings), default=0)
    if longest > MAX_STOP_CHARS:
        raise refuse("stop", f"a string of {longest} characters is longer than {MAX_STOP_CHARS}")
    return strings


def _check_stop_token_ids(token_ids: object) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if not isinstance(token_ids, list | tuple):
        raise refuse("stop_token_ids", f"{shown(token_ids)} is not a list of token ids")
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise refuse("stop_token_ids", f"{len(token_ids)} ids are more than {MAX_STOP_TOKEN_IDS}")
    return tuple(check_int("stop_token_ids", token_id, low=0) for token_id in token_ids)


def _check_min_tokens(min_tokens: int, max_tokens: int | None) -> int:
    min_tokens = check_int("min_tokens", min_tokens, low=0)
    if min_tokens > (MAX_INT32 if max_tokens is None else max_tokens):
        raise refuse("min_tokens", f"{min_tokens} is more than max_tokens={max_tokens}")
    return min_tokens


def _check_logprobs(logprobs: object) -> int | None:
    if logprobs is None or logprobs is False:
        return None
    if logprobs is True:
        return 1
    return check_int("logprobs", logprobs, low=0, high=MAX_LOGPROBS)


def _check_output_kind(kind: object) -> RequestOutputKind:
    try:
        return RequestOutputKind(check_int("output_kind", kind, low=0, high=2))
    except ValueError:
        names = ", ".join(f"RequestOutputKind.{each.name}" for each in RequestOutputKind)
        raise refuse("output_kind", f"{shown(kind)} is not one of {names}") from None
