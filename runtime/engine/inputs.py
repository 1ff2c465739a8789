"""From what a caller hands in to a request that can run. Every refusal happens here, at once."""

from __future__ import annotations

import hashlib
import numbers
import secrets
from collections.abc import Iterable, Mapping
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
    ) -> Request:
        """The request that runs this; its outputs go to `sink`.

        Args:
            request_id: a string of 1 to 512 characters.
            prompt: see `prompt_of`.
            params: SamplingParams; None is the defaults.
            add_special_tokens: to a prompt that is text.
        Raises: InvalidRequestError, ContextLengthError; nothing has changed then.
        """
        self.check_request_id(request_id)
        params = self.check_params(params)
        checked = self.prompt_of(prompt, add_special_tokens=add_special_tokens)
        return Request(
            request_id=request_id,
            prompt=checked.text,
            prompt_token_ids=checked.token_ids,
            params=params,
            sequence_params=self.sequence_params(request_id, len(checked.token_ids), params),
            tokenizer=self.tokenizer,
            sink=sink,
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

    def _check_not_empty(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidRequestError(
                "the prompt is empty: it must hold at least one token", param="prompt"
            )
        return token_ids


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
