"""The log-probabilities of an output as flat columns, which is how they travel, and back."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.outputs import Logprob, SampleLogprobs
from furiosa_llm.wire.client_messages import LogprobColumns


def columns_of(positions: Sequence[dict[int, Logprob]]) -> LogprobColumns:
    """Consecutive positions, each with the entries of its tokens in order."""
    entries = [entry for position in positions for entry in position.items()]
    texts = [logprob.decoded_token for _, logprob in entries]
    return LogprobColumns(
        counts=tuple(map(len, positions)),
        token_ids=tuple(token_id for token_id, _ in entries),
        logprobs=tuple(logprob.logprob for _, logprob in entries),
        ranks=tuple(logprob.rank or 0 for _, logprob in entries),
        text_chars=tuple(0 if text is None else len(text) + 1 for text in texts),
        texts="".join(text for text in texts if text is not None),
    )


def logprobs_of(columns: LogprobColumns) -> SampleLogprobs:
    """What `columns_of` was given."""
    positions: SampleLogprobs = []
    entry = first_char = 0
    for count in columns.counts:
        position: dict[int, Logprob] = {}
        for _ in range(count):
            text, chars = None, columns.text_chars[entry]
            if chars:
                text = columns.texts[first_char : first_char + chars - 1]
                first_char += chars - 1
            position[columns.token_ids[entry]] = Logprob(
                columns.logprobs[entry], columns.ranks[entry] or None, text
            )
            entry += 1
        positions.append(position)
    return positions
