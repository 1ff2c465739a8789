"""The outputs of a request, as the engine would have yielded them, from what came over the wire."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.client.logprobs import logprobs_of
from furiosa_llm.client.progress import News
from furiosa_llm.outputs import CompletionOutput, RequestOutput, SampleLogprobs
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.wire.client_messages import Accepted, Finish


class _Choice:
    def __init__(self, index: int, has_logprobs: bool) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self._text = ""
        self._logprobs: SampleLogprobs | None = [] if has_logprobs else None
        self._num_chars_out = self._num_tokens_out = 0  # handed out; DELTA goes on from here

    def take(self, news: News) -> None:
        self.token_ids += news.token_ids
        self._text += news.text
        if self._logprobs is not None and news.logprobs is not None:
            self._logprobs += logprobs_of(news.logprobs)
        self.finish = news.finish

    def snapshot(self, is_delta: bool) -> CompletionOutput:
        first_char, first_token = (
            (self._num_chars_out, self._num_tokens_out) if is_delta else (0, 0)
        )
        self._num_chars_out, self._num_tokens_out = len(self._text), len(self.token_ids)
        return CompletionOutput(
            index=self.index,
            text=self._text[first_char:],
            token_ids=self.token_ids[first_token:],
            finish_reason=None if self.finish is None else self.finish.reason,
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            stop_reason=None if self.finish is None else self.finish.stop_reason,
        )


class OutputAssembler:
    """Makes RequestOutputs of the kind that the request asked for."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self._request_id = request_id
        self._kind = params.output_kind
        self._choices = [_Choice(index, params.logprobs is not None) for index in range(params.n)]
        self._accepted: Accepted | None = None
        self._num_cached_tokens = 0

    def accept(self, accepted: Accepted) -> None:
        """The daemon has said what the prompt is."""
        self._accepted = accepted

    def take(self, news: Sequence[News]) -> RequestOutput | None:
        """The output after this; None where the request wants only the last one."""
        changed = []
        for each in news:
            choice = self._choices[each.choice_index]
            choice.take(each)
            changed.append(choice)
            if each.finish is not None:
                self._num_cached_tokens = max(
                    self._num_cached_tokens, each.finish.num_cached_tokens
                )
        is_finished = all(choice.finish is not None for choice in self._choices)
        if self._kind is RequestOutputKind.FINAL and not is_finished:
            return None
        is_delta = self._kind is RequestOutputKind.DELTA
        shown = dict.fromkeys(changed) if is_delta else self._choices
        accepted = self._accepted
        return RequestOutput(
            request_id=self._request_id,
            prompt=None if accepted is None else accepted.prompt,
            prompt_token_ids=[] if accepted is None else list(accepted.prompt_token_ids),
            outputs=[choice.snapshot(is_delta) for choice in shown],
            finished=is_finished,
            num_cached_tokens=self._num_cached_tokens,
        )
