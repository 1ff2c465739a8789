"""From what a caller hands in to a request that can run. Every refusal happens here, at once."""

from __future__ import annotations

import hashlib
import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_llm.checks import shown
from furiosa_llm.engine.request import Request, Sink
from furiosa_llm.errors import ContextLengthError, InvalidRequestError
from furiosa_llm.sampling_params import SamplingParams, SamplingType
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.text.tokenizer import Tokenizer

MAX_REQUEST_ID_CHARS = 512
_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, where it was given as text, and as token ids."""

    text: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Checks and resolves requests for one model. Thread-safe."""

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    engine_seed: int | None

    def make_request(
        self,
        request_id: Any,
        prompt: Any,
        params: Any,
        sink: Sink,
        *,
        add_special_tokens: bool = True,
        resume_token_ids: Sequence[Sequence[int] | None] = (),
    ) -> Request:
        """The request that runs this; its outputs go to `sink`.

        Args:
            request_id: a string of 1 to 512 characters.
            prompt: see `prompt_of`.
            params: SamplingParams; None is the defaults.
            add_special_tokens: to a prompt that is text.
            resume_token_ids: to go on with a request that ran elsewhere: per choice the output it
                has, or None for one that ended. It needs that run's seed; `max_tokens` counts the
                tokens it has.
        Raises: InvalidRequestError, ContextLengthError; nothing has changed then.
        """
        self.check_request_id(request_id)
        params = self.check_params(params)
        checked = self.prompt_of(prompt, add_special_tokens=add_special_tokens)
        sequence_params = self.sequence_params(request_id, len(checked.token_ids), params)
        return Request(
            request_id=request_id,
            prompt=checked.text,
            prompt_token_ids=checked.token_ids,
            params=params,
            sequence_params=sequence_params,
            tokenizer=self.tokenizer,
            sink=sink,
            resume_token_ids=self._check_resumed(resume_token_ids, sequence_params),
        )

    def check_request_id(self, request_id: Any) -> str:
        """Raises: InvalidRequestError unless it is a string of 1 to 512 characters."""
        if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequestError(
                f"request_id {shown(request_id)} is not a string of 1 to {MAX_REQUEST_ID_CHARS} "
                f"characters",
                param="request_id",
            )
        return request_id

    def check_params(self, params: Any) -> SamplingParams:
        """None gives the defaults. Raises: InvalidRequestError for anything of another type."""
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params is {shown(params)}, of type {type(params).__name__}: pass a "
                f"furiosa_llm.SamplingParams",
                param="sampling_params",
            )
        return params

    def prompt_of(self, prompt: Any, *, add_special_tokens: bool = True) -> Prompt:
        """A str, {"prompt": str} or {"prompt_token_ids": [int, ...]}; ids are used as they are.

        Raises: InvalidRequestError naming what is wrong with it.
        """
        if isinstance(prompt, Mapping):
            keys = set(prompt)
            if keys == {"prompt_token_ids"}:
                return Prompt(None, self._check_token_ids(prompt["prompt_token_ids"]))
            if keys != {"prompt"}:
                raise InvalidRequestError(
                    f"a prompt with the keys {shown(sorted(map(str, keys)))}: give exactly one of "
                    f"'prompt' and 'prompt_token_ids'",
                    param="prompt",
                )
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            raise InvalidRequestError(
                f"Unsupported prompt type {type(prompt).__name__} ({shown(prompt)}): pass a str, "
                f"{{'prompt': str}} or {{'prompt_token_ids': [int, ...]}}",
                param="prompt",
            )
        token_ids = tuple(self.tokenizer.encode(prompt, add_special_tokens))
        return Prompt(prompt, self._check_not_empty(token_ids))

    def sequence_params(
        self, request_id: str, num_prompt_tokens: int, params: SamplingParams
    ) -> tuple[SequenceParams, ...]:
        """What a worker needs, once per choice.

        Raises: ContextLengthError if the prompt and the answer do not fit the context together.
        """
        room = self.max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else params.max_tokens
        needed = max(max_tokens, params.min_tokens, 1)
        if needed > room:
            raise ContextLengthError.of(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=needed,
                max_model_len=self.max_model_len,
            )
        stop_token_ids = tuple(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *self.eos_token_ids)))
        biases = params.logit_bias or ()
        assert isinstance(biases, tuple), "SamplingParams stores pairs"
        if biases and biases[-1][0] >= self.vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token id {biases[-1][0]}, but the model's token ids go from 0 "
                f"to {self.vocab_size - 1}",
                param="logit_bias",
            )
        seed = self._seed(request_id, params)
        return tuple(
            SequenceParams(
                max_tokens=max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=stop_token_ids,
                temperature=params.temperature,
                top_k=max(params.top_k, 0),
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                bias_token_ids=tuple([token_id for token_id, _ in biases]),
                bias_values=tuple([bias for _, bias in biases]),
                seed=seed,
                choice_index=index,
                num_logprobs=-1 if params.logprobs is None else params.logprobs,
            )
            for index in range(params.n)
        )

    def _seed(self, request_id: str, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed & _SEED_MASK
        if params.sampling_type is SamplingType.GREEDY:
            return 0  # nothing is drawn
        if self.engine_seed is None:
            return secrets.randbits(64)
        text = f"{self.engine_seed}/{request_id}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def _check_token_ids(self, token_ids: Any) -> tuple[int, ...]:
        # A str is refused by its characters; bytes iterate as integers, but are none.
        is_list = isinstance(token_ids, Iterable) and not isinstance(token_ids, bytes | bytearray)
        ids = tuple(token_ids) if is_list else (token_ids,)
        for token_id in ids:
            # What is not an int outright (numpy's integers are not) is looked at more closely.
            if not is_list or (type(token_id) is not int and not _is_integer(token_id)):
                raise InvalidRequestError(
                    f"prompt_token_ids {'holds' if is_list else 'is'} {shown(token_id)}: pass a "
                    f"list of integers",
                    param="prompt_token_ids",
                )
        ids = tuple(int(token_id) for token_id in ids)
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise InvalidRequestError(
                f"prompt_token_ids holds {outside}, but the model's token ids go from 0 to "
                f"{self.vocab_size - 1}",
                param="prompt_token_ids",
            )
        return self._check_not_empty(ids)

    def _check_resumed(
        self,
        resumed: Sequence[Sequence[int] | None],
        sequence_params: tuple[SequenceParams, ...],
    ) -> tuple[tuple[int, ...] | None, ...]:
        if not resumed:
            return ()
        if len(resumed) != len(sequence_params) or all(token_ids is None for token_ids in resumed):
            raise InvalidRequestError(
                f"resume_token_ids has {len(resumed)} entries: give one for each of the "
                f"{len(sequence_params)} choices, and not None for all of them",
                param="resume_token_ids",
            )
        for token_ids, params in zip(resumed, sequence_params, strict=True):
            if token_ids is None:
                continue
            if len(token_ids) >= params.max_tokens:
                raise InvalidRequestError(
                    f"resume_token_ids has {len(token_ids)} tokens of a choice that ends at "
                    f"max_tokens={params.max_tokens}: there is nothing to go on with",
                    param="resume_token_ids",
                )
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
                raise InvalidRequestError(
                    f"resume_token_ids goes from {min(token_ids)} to {max(token_ids)}, but the "
                    f"model's token ids go from 0 to {self.vocab_size - 1}",
                    param="resume_token_ids",
                )
        return tuple(None if ids is None else tuple(ids) for ids in resumed)

    def _check_not_empty(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidRequestError(
                "the prompt is empty: it must hold at least one token", param="prompt"
            )
        return token_ids


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
