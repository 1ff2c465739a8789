"""LLM: a model for offline use, prompts in and finished answers out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from furiosa_llm.args import EngineArgs
from furiosa_llm.checks import shown
from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.core import EngineCore
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.engine.llm_engine import LLMEngine
from furiosa_llm.engine.settings import resolve_settings
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.text.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None

_GENERATION_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class LLM:
    """A model and its workers, for one thread.

    Args:
        model: an artifact, a checkpoint directory, a .gguf file, or a known model's id.
        engine_args: any field of `EngineArgs`, by name; an unknown name is a TypeError.
    Raises: see `AsyncLLMEngine.from_engine_args`.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        known = [field.name for field in dataclasses.fields(EngineArgs) if field.name != "model"]
        unknown = sorted(set(engine_args) - set(known))
        if unknown:
            raise TypeError(
                f"LLM() got unknown keyword arguments {', '.join(unknown)}: the known ones are "
                f"{', '.join(known)}"
            )
        args = EngineArgs(model=model, **engine_args)
        with HeadStart.of(args) as head_start:
            self.settings = resolve_settings(args)
            self.core = EngineCore(self.settings, head_start=head_start)
        self._engine = LLMEngine(self.settings, self.core)
        self._async_engine = AsyncLLMEngine(self.settings, self.core)  # the same, for streams
        self._request_ids = itertools.count()

    @classmethod
    def load_artifact(cls, path: str, **engine_args: Any) -> Self:
        """`LLM(path, ...)`, under the name of Furiosa-LLM 2025."""
        return cls(path, **engine_args)

    load_artifacts = from_artifacts = load_artifact

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def engine(self) -> LLMEngine:
        """The engine behind it."""
        return self._engine

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation config asks for, over this API's defaults."""
        found = self._engine.generation_defaults
        return SamplingParams(
            **{
                ours: found[theirs]
                for theirs, ours in _GENERATION_FIELDS.items()
                if found.get(theirs) is not None
            }
        )

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        prompt_token_ids: Any = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """The finished answer to one prompt, or the list of those to several, in their order.

        Args:
            prompts: a str, {"prompt": str} or {"prompt_token_ids": [...]}, or a list of them.
            sampling_params: one for all, or one per prompt; None is
                `get_default_sampling_params()`.
            prompt_token_ids: token ids instead of `prompts`: a list of ids, or a list of those.
            tokenizer_kwargs: `add_special_tokens` (default False, as in Furiosa-LLM), nothing else.
        Raises: InvalidRequestError, ContextLengthError before anything has run.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise InvalidRequestError(
                "give either prompts or prompt_token_ids, and not both", param="prompts"
            )
        if prompt_token_ids is not None:
            ids = list(prompt_token_ids)
            is_nested = bool(ids) and isinstance(ids[0], list | tuple)
            prompts = (
                [{"prompt_token_ids": each} for each in ids]
                if is_nested
                else {"prompt_token_ids": ids}
            )
        add_special_tokens = _add_special_tokens(tokenizer_kwargs)
        is_single = not isinstance(prompts, list | tuple)
        listed = [prompts] if is_single else list(prompts)
        outputs = self._run(listed, self._listed_params(sampling_params, len(listed)),
                            add_special_tokens)  # fmt: skip
        return outputs[0] if is_single else outputs

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation (a list of messages) or to a list of conversations."""
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if is_single else list(messages)
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.encode_chat(
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in conversations
        ]
        return self._run(prompts, self._listed_params(sampling_params, len(prompts)), False)

    async def stream_generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[str]:
        """Yield the text of the answer in pieces; any number of streams may run at once."""
        add_special_tokens = _add_special_tokens(tokenizer_kwargs)
        if prompt_token_ids is not None:
            prompt = {"prompt_token_ids": list(prompt_token_ids)}
        (params,) = self._listed_params(sampling_params, 1)
        params = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
        if params.n != 1:
            raise InvalidRequestError(
                f"n: {params.n} answers cannot share one stream of text: leave n at 1", param="n"
            )
        outputs = self._async_engine.generate(
            prompt, params, self._next_id(), add_special_tokens=add_special_tokens
        )
        async with aclosing(outputs):
            async for output in outputs:
                for choice in output.outputs:
                    if choice.text:
                        yield choice.text

    def shutdown(self) -> None:
        """End the workers; idempotent."""
        self.core.shutdown()

    def _run(
        self, prompts: list[Any], params: list[SamplingParams], add_special_tokens: bool
    ) -> list[RequestOutput]:
        ids = [self._next_id() for _ in prompts]
        finals = [dataclasses.replace(p, output_kind=RequestOutputKind.FINAL) for p in params]
        done: dict[str, RequestOutput] = {}
        try:
            self._engine.add_requests(
                zip(ids, prompts, finals, strict=True), add_special_tokens=add_special_tokens
            )
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    done[output.request_id] = output
        finally:
            self._engine.drop_requests()  # after an error, or Ctrl-C
        return [done[request_id] for request_id in ids]

    def _next_id(self) -> str:
        return f"llm-{next(self._request_ids)}"

    def _listed_params(self, params: Params, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, list | tuple) or len(params) != count:
            raise InvalidRequestError(
                f"sampling_params is {shown(params)}: pass one SamplingParams, or a list of as "
                f"many as there are prompts ({count})",
                param="sampling_params",
            )
        for each in params:
            if not isinstance(each, SamplingParams):
                raise InvalidRequestError(
                    f"sampling_params holds {shown(each)}: every entry is a SamplingParams",
                    param="sampling_params",
                )
        return list(params)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


def _add_special_tokens(tokenizer_kwargs: Mapping[str, Any] | None) -> bool:
    given = dict(tokenizer_kwargs or {})
    wanted = given.pop("add_special_tokens", False)
    if given:
        raise InvalidRequestError(
            f"tokenizer_kwargs holds {', '.join(map(shown, sorted(given)))}: only "
            f"'add_special_tokens' is known",
            param="tokenizer_kwargs",
        )
    return bool(wanted)
