"""A stream of either client: its request, and what its reader makes of what comes."""

from __future__ import annotations

import dataclasses
from typing import Any

from furiosa_llm.client.assembler import OutputAssembler
from furiosa_llm.client.errors import RequestTimeoutError
from furiosa_llm.client.progress import StreamProgress
from furiosa_llm.client.requests import WINDOW, chat_message, checked_params, generate_message
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.wire.client_messages import Accepted, Chat, Generate


class PreparedStream:
    """Checked, and ready to be begun."""

    def __init__(self, message: Generate | Chat, params: SamplingParams) -> None:
        self.request_id = message.request_id
        is_final = params.output_kind is RequestOutputKind.FINAL
        window = params.n if is_final else WINDOW * params.n
        self.progress = StreamProgress(message, num_choices=params.n, window=window)
        self.is_over = False
        self._assembler = OutputAssembler(message.request_id, params)
        self._report_at = max(window // 4, 1)
        self._num_unreported = 0

    @classmethod
    def generate(
        cls,
        prompt: Any,
        params: SamplingParams | None,
        request_id: str | None,
        *,
        add_special_tokens: bool,
        is_final: bool,
    ) -> PreparedStream:
        """Of a prompt; `is_final` wants one output, whatever the parameters say.

        Raises: InvalidRequestError.
        """
        params = _params_of(params, is_final)
        return cls(generate_message(prompt, params, request_id, add_special_tokens), params)

    @classmethod
    def chat(
        cls,
        messages: Any,
        params: SamplingParams | None,
        request_id: str | None,
        options: dict[str, Any],
        *,
        is_final: bool,
    ) -> PreparedStream:
        """Of messages, likewise."""
        params = _params_of(params, is_final)
        return cls(chat_message(messages, params, request_id, options), params)

    def take(self, item: Any) -> RequestOutput | None:
        """The output, if any, after something was delivered. Raises: the error, if it was one."""
        if isinstance(item, FuriosaLLMError):
            self.is_over = True
            raise item
        if isinstance(item, Accepted):
            self._assembler.accept(item)
            return None
        output = self._assembler.take(item)
        self._num_unreported += len(item)
        self.is_over = output is not None and output.finished
        return output

    def num_read(self) -> int:
        """Rows to tell the connection of now; 0 while it would only be bothered."""
        if self._num_unreported < self._report_at or self.is_over:
            return 0
        num_read, self._num_unreported = self._num_unreported, 0
        return num_read

    def timed_out(self, timeout_s: float) -> RequestTimeoutError:
        """The error when its time is up; it is over then."""
        self.is_over = True
        return RequestTimeoutError(
            f"request {self.request_id!r} has not ended within {timeout_s:g} s, so it was aborted: "
            f"give it more time with timeout_s, or lower max_tokens"
        )


def _params_of(params: SamplingParams | None, is_final: bool) -> SamplingParams:
    params = checked_params(params)
    if is_final:
        params = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL)
    return params


def chat_options(
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    chat_template_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """The options of a chat as they travel."""
    options: dict[str, Any] = {}
    if add_generation_prompt is not None:
        options["add_generation_prompt"] = add_generation_prompt
    if continue_final_message:
        options["continue_final_message"] = True
    if chat_template_kwargs:
        options["chat_template_kwargs"] = dict(chat_template_kwargs)
    return options


def call_timed_out(what: str, timeout_s: float) -> RequestTimeoutError:
    """The error when the time of a call is up."""
    return RequestTimeoutError(f"{what} was not answered within {timeout_s:g} s")
