"""What a client has not been sent yet: one row per choice, into which the following tokens join.

However slow the reader, a choice has one row here, as long as its answer at most; a row leaves when
the client has granted a credit for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from furiosa_llm.client.logprobs import columns_of
from furiosa_llm.outputs import CompletionOutput, Logprob, RequestOutput
from furiosa_llm.wire.client_messages import Finish, LogprobColumns, Outputs


@dataclass(slots=True)
class Row:
    """The news of one choice."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, part: CompletionOutput, num_cached_tokens: int) -> None:
        """Join what is new, a DELTA output's part."""
        self.token_ids += part.token_ids
        if part.text:
            self.texts.append(part.text)
        if part.logprobs:
            self.logprobs += part.logprobs
        if part.finish_reason is not None:
            self.finish = Finish(part.finish_reason, part.stop_reason, num_cached_tokens)


class OutgoingStream:
    """The rows of one stream, and how many of them may leave."""

    def __init__(self, stream_id: int, num_credits: int) -> None:
        self.stream_id = stream_id
        self._num_credits = num_credits
        self._rows: dict[int, Row] = {}  # by choice; the one that has waited longest first
        self.is_complete = False  # whether the last output has come

    @property
    def is_sent(self) -> bool:
        """Whether everything has left."""
        return self.is_complete and not self._rows

    @property
    def can_send(self) -> bool:
        return self._num_credits > 0 and bool(self._rows)

    def add(self, output: RequestOutput) -> None:
        """Take a DELTA output, or the only one of a FINAL request."""
        for part in output.outputs:
            row = self._rows.get(part.index)
            if row is None:
                row = self._rows[part.index] = Row()
            row.add(part, output.num_cached_tokens)
        self.is_complete = output.finished

    def grant(self, num_rows: int) -> None:
        """The client has room for that many rows more."""
        self._num_credits += num_rows

    def take(self) -> Iterator[tuple[int, Row]]:
        """The (choice, row) pairs that may leave now; each uses a credit."""
        while self.can_send:
            self._num_credits -= 1
            choice_index = next(iter(self._rows))
            yield choice_index, self._rows.pop(choice_index)


def outputs_of(seq: int, rows: list[tuple[int, int, Row]]) -> Outputs:
    """The message of these (stream, choice, row) triples."""
    finishes: list[tuple[int, Finish]] = []
    logprobs: list[tuple[int, LogprobColumns]] = []
    token_ids: list[int] = []
    for index, (_, _, row) in enumerate(rows):
        token_ids += row.token_ids
        if row.finish is not None:
            finishes.append((index, row.finish))
        if row.logprobs:
            logprobs.append((index, columns_of(row.logprobs)))
    return Outputs(
        seq=seq,
        stream_ids=tuple([stream_id for stream_id, _, _ in rows]),
        choice_indices=tuple([choice_index for _, choice_index, _ in rows]),
        num_tokens=tuple([len(row.token_ids) for _, _, row in rows]),
        token_ids=tuple(token_ids),
        texts=tuple(["".join(row.texts) for _, _, row in rows]),
        finishes=tuple(finishes),
        logprobs=tuple(logprobs),
    )
