"""A request while it runs: tokens come in, immutable outputs go out.

Work per token is constant: text is detokenised incrementally, and only a cumulative snapshot, which
by its nature holds everything so far, copies what came before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    SampleLogprobs,
    made_completion,
    made_output,
)
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.text.detokenizer import IncrementalDetokenizer
from furiosa_llm.text.stop_strings import StopStringMatcher
from furiosa_llm.text.tokenizer import Tokenizer
from furiosa_llm.wire.messages import TokenLogprobs

ABORT = "abort"
"""The finish reason of a choice that was aborted by its request's id."""

ENDED_BEFORE = "ended before"
"""The finish reason of a choice that ended in the run that its request goes on from."""


class Sink(Protocol):
    """Where a request's outputs go. Called on the engine's thread; must not block."""

    def put(self, item: RequestOutput | FuriosaLLMError) -> None: ...


class Choice:
    """One answer of a request: a sequence, its text so far, and how much of it was handed out."""

    def __init__(self, index: int, sequence_id: int, request: Request) -> None:
        self.index = index
        self.sequence_id = sequence_id
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.num_crashes = 0  # of workers that were running it
        self.has_begun = False  # a step has run it
        self.num_resumed_tokens = 0  # of `token_ids`, those made before its last dispatch
        self._stop_reason: str | None = None
        params = request.params
        self._logprobs: SampleLogprobs = []
        self._has_stop_text = params.include_stop_str_in_output or not params.skip_special_tokens
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._has_logprobs = params.logprobs is not None
        self._pieces: list[str] = []
        self._num_tokens_out = self._num_pieces_out = 0  # handed out; DELTA goes on from here
        self._detokenizer = IncrementalDetokenizer(
            request.tokenizer,
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
        )
        self._matcher = (
            StopStringMatcher(params.stop, include_stop_str=params.include_stop_str_in_output)
            if params.stop
            else None
        )

    def append(self, token_id: int, finish_reason: str, logprobs: TokenLogprobs | None) -> None:
        """Take the next token; "" is no finish reason. May finish by a stop string of its own."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(self._named(token_id, logprobs))
        # The token that stopped is part of the ids, and of the text only where asked for.
        is_text = finish_reason != "stop" or self._has_stop_text
        text = self._detokenizer.append((token_id,)) if is_text else ""
        if finish_reason:
            self.finish_reason = finish_reason
            text += self._detokenizer.flush()
        if self._matcher is None or len(self.token_ids) < self.request.params.min_tokens:
            if text:
                self._pieces.append(text)
            return
        released, self._stop_reason = self._matcher.append(text)
        self._write(released)
        if self._stop_reason is not None:
            self.finish_reason = "stop"
        elif finish_reason:
            self._write(self._matcher.flush())

    def abort(self) -> None:
        """End it as it stands."""
        self._write(self._detokenizer.flush())
        if self._matcher is not None:
            self._write(self._matcher.flush())
        self.finish_reason = ABORT

    def resume(self, token_ids: tuple[int, ...] | None) -> None:
        """Take the output of an earlier run, as if it had been handed out; None: it ended there.

        Its log-probabilities are not known here: a cumulative output holds an empty entry for each.
        """
        if token_ids is None:
            self.finish_reason = ENDED_BEFORE
            return
        for token_id in token_ids:
            self.append(token_id, "", None)
        self._logprobs = [{} for _ in token_ids]
        self._num_tokens_out, self._num_pieces_out = len(self.token_ids), len(self._pieces)

    def snapshot(self) -> CompletionOutput:
        """What an output of the request's kind holds of this choice now."""
        first_token, first_piece = 0, 0
        if self._is_delta:
            first_token, first_piece = self._num_tokens_out, self._num_pieces_out
        self._num_tokens_out, self._num_pieces_out = len(self.token_ids), len(self._pieces)
        if first_piece == 0 and len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
            self._num_pieces_out = 1
        return made_completion(
            self.index,
            "".join(self._pieces[first_piece:]),
            self.token_ids[first_token:],
            self.finish_reason,
            self._logprobs[first_token:] if self._has_logprobs else None,
            self._stop_reason,
        )

    def _write(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _named(self, token_id: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        text = self.request.tokenizer.token_text
        entry = {token_id: Logprob(logprobs.logprob, logprobs.rank, text(token_id))}
        tops = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        for rank, (top_id, logprob) in enumerate(tops, start=1):
            entry.setdefault(top_id, Logprob(logprob, rank, text(top_id)))
        return entry


@dataclass(slots=True, eq=False)
class Request:
    """A validated request and its choices; the engine's thread alone changes it once submitted."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sequence_params: tuple[SequenceParams, ...]  # one per choice
    tokenizer: Tokenizer
    sink: Sink
    resume_token_ids: tuple[tuple[int, ...] | None, ...] = ()
    """Per choice, the output it has from an earlier run; None: it ended there. () is a new request.
    Only what comes after is handed out as news; what DELTA outputs hold begins there."""
    choices: list[Choice] = field(default_factory=list)
    submitted_s: float = 0.0  # on the monotonic clock; the engine notes it
    is_over: bool = False  # nothing more is put into the sink

    @property
    def num_unfinished(self) -> int:
        """Choices that have not ended before the request began."""
        num_ended = sum(token_ids is None for token_ids in self.resume_token_ids)
        return len(self.sequence_params) - num_ended

    @property
    def is_finished(self) -> bool:
        if self.choices[0].finish_reason is None:  # most of the time, for most have but one
            return False
        return all(choice.finish_reason is not None for choice in self.choices)

    def put_output(self, changed: list[Choice]) -> None:
        """Hand out the state after `changed` got something new, where the output kind wants it."""
        finished = self.is_finished
        if self.params.output_kind is RequestOutputKind.FINAL and not finished:
            return
        is_delta = self.params.output_kind is RequestOutputKind.DELTA
        output = made_output(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [choice.snapshot() for choice in (changed if is_delta else self.choices)],
            finished,
        )
        self.is_over = finished
        self.sink.put(output)

    def put_error(self, error: FuriosaLLMError) -> None:
        """End the request by an error."""
        self.is_over = True
        self.sink.put(error)
