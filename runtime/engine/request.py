"""A request while it runs: tokens come in, immutable outputs go out.

Work per token is constant: text is detokenised incrementally, and only a cumulative snapshot, which
by its nature holds everything so far, copies what came before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.outputs import CompletionOutput, Logprob, RequestOutput, SampleLogprobs
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.text.detokenizer import IncrementalDetokenizer
from furiosa_llm.text.stop_strings import StopStringMatcher
from furiosa_llm.text.tokenizer import Tokenizer
from furiosa_llm.wire.messages import TokenLogprobs

ABORT = "abort"
"""The finish reason of a choice that was aborted by its request's id."""


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
        self.num_resumed_tokens = 0  # of `token_ids`, those made before its last dispatch
        self._stop_reason: str | None = None
        self._logprobs: SampleLogprobs = []
        self._pieces: list[str] = []
        self._num_tokens_out = self._num_pieces_out = 0  # handed out; DELTA goes on from here
        params = request.params
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
        params = self.request.params
        self.token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(self._named(token_id, logprobs))
        # The token that stopped is part of the ids, and of the text only where asked for.
        is_text = (
            finish_reason != "stop"
            or params.include_stop_str_in_output
            or not params.skip_special_tokens
        )
        text = self._detokenizer.append((token_id,)) if is_text else ""
        if finish_reason:
            self.finish_reason = finish_reason
            text += self._detokenizer.flush()
        if self._matcher is None or len(self.token_ids) < params.min_tokens:
            self._write(text)
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

    def snapshot(self) -> CompletionOutput:
        """What an output of the request's kind holds of this choice now."""
        first_token, first_piece = 0, 0
        if self.request.params.output_kind is RequestOutputKind.DELTA:
            first_token, first_piece = self._num_tokens_out, self._num_pieces_out
        self._num_tokens_out, self._num_pieces_out = len(self.token_ids), len(self._pieces)
        if first_piece == 0 and len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
            self._num_pieces_out = 1
        has_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces[first_piece:]),
            token_ids=self.token_ids[first_token:],
            finish_reason=self.finish_reason,
            logprobs=self._logprobs[first_token:] if has_logprobs else None,
            stop_reason=self._stop_reason,
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
    choices: list[Choice] = field(default_factory=list)
    is_over: bool = False  # nothing more is put into the sink

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def put_output(self, changed: list[Choice]) -> None:
        """Hand out the state after `changed` got something new, where the output kind wants it."""
        finished = self.is_finished
        if self.params.output_kind is RequestOutputKind.FINAL and not finished:
            return
        is_delta = self.params.output_kind is RequestOutputKind.DELTA
        output = RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[choice.snapshot() for choice in (changed if is_delta else self.choices)],
            finished=finished,
        )
        self.is_over = finished
        self.sink.put(output)

    def put_error(self, error: FuriosaLLMError) -> None:
        """End the request by an error."""
        self.is_over = True
        self.sink.put(error)
