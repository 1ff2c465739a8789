"""Token ids to text while they arrive: each piece is final, and none is decoded twice.

With a table of pieces (pieces.py), a token's bytes go through an incremental UTF-8 decoder, which
holds back at most three bytes: O(1) a token, and exact. Where a tokenizer has no such table, a
short window of tokens is decoded with and without the new one, and the difference is the new text.

`tokenizers` has a DecodeStream; on bytes that never become a character it keeps every token and
decodes all of them at each step (quadratic: 0.5 s for 2,000 tokens), hence the two streams here.

The text of a run of byte tokens that is no valid UTF-8 differs from decoding the run as a whole
in one case: SentencePiece's decoders then replace every byte of the run, valid characters
included. Here what has been shown stays, and only the invalid bytes are replaced.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice

from furiosa_llm.text.pieces import PieceTable
from furiosa_llm.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_NO_IDS: frozenset[int] = frozenset()


class IncrementalDetokenizer:
    """The text that one sequence's output adds to its prompt.

    Args:
        tokenizer: the model's.
        prompt_token_ids: tell whether the output starts a text (and loses its leading space), and
            which character the prompt's end may have begun. The prompt's own text is no output.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        skipped = tokenizer.special_ids if skip_special_tokens else _NO_IDS
        self._stream: _PieceStream | _WindowStream
        if tokenizer.pieces is not None:
            self._stream = _PieceStream(tokenizer.pieces, skipped, prompt_token_ids)
        else:
            self._stream = _WindowStream(tokenizer, skipped, prompt_token_ids)

    def append(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens. Returns: the text that is now final, perhaps none."""
        return self._stream.append(token_ids)

    def flush(self) -> str:
        """What was held back, once no token will follow; half a character shows as U+FFFD."""
        return self._stream.flush()


class _PieceStream:
    """Bytes of tokens through an incremental UTF-8 decoder."""

    def __init__(
        self, pieces: PieceTable, skipped: frozenset[int], prompt_token_ids: Sequence[int]
    ) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._last_bytes(prompt_token_ids)
        self._num_leading_spaces = 0 if tail else pieces.num_leading_spaces
        self._utf8.decode(_open_character(tail))

    def append(self, token_ids: Sequence[int]) -> str:
        piece, skipped = self._pieces.piece, self._skipped
        return self._strip(
            self._utf8.decode(b"".join(piece(t) for t in token_ids if t not in skipped))
        )

    def flush(self) -> str:
        text = self._strip(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _strip(self, text: str) -> str:
        """`text` without the spaces that a text's very start loses."""
        while self._num_leading_spaces and text:
            if text[0] != " ":
                self._num_leading_spaces = 0
                break
            text = text[1:]
            self._num_leading_spaces -= 1
        return text

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """At least the last three bytes of a text, if it has as many."""
        tail = b""
        for token_id in reversed(token_ids):
            if token_id not in self._skipped:
                tail = self._pieces.piece(token_id) + tail
            if len(tail) >= 3:
                break
        return tail


def _open_character(tail: bytes) -> bytes:
    """The bytes at the end of `tail` that begin a character without ending it."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(tail)
    return utf8.getstate()[0]


class _WindowStream:
    """The difference that each token makes to the text of a short window of tokens before it.

    The window begins with a token that shows, so that whatever a decoder does to a text's start
    happens alike with and without the new token.
    """

    MAX_CONTEXT = 8  # tokens kept from the text already given out
    MAX_HELD = 8  # tokens held back; UTF-8's longest character takes four bytes

    def __init__(
        self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        visible = (t for t in reversed(prompt_token_ids) if t not in skipped)
        self._context = self._shortest_context(list(islice(visible, self.MAX_CONTEXT))[::-1])
        self._held: list[int] = []

    def append(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token_id in token_ids:  # one by one: the result must not depend on how they arrive
            if token_id in self._skipped:
                continue
            self._held.append(token_id)
            text = self._new_text()
            if text and (not text.endswith(_REPLACEMENT) or len(self._held) >= self.MAX_HELD):
                pieces.append(self._release(text))
        return "".join(pieces)

    def flush(self) -> str:
        return self._release(self._new_text()) if self._held else ""

    def _new_text(self) -> str:
        before, after = self._decode(self._context), self._decode(self._context + self._held)
        return after[len(before) :]

    def _release(self, text: str) -> str:
        self._context = self._shortest_context(self._context + self._held)
        self._held = []
        return text

    def _shortest_context(self, token_ids: list[int]) -> list[int]:
        """The fewest last tokens that show something and cut no character; all where none do."""
        token_ids = token_ids[-self.MAX_CONTEXT :]
        for count in range(1, len(token_ids)):
            text = self._decode(token_ids[-count:])
            if text and _REPLACEMENT not in text:
                return token_ids[-count:]
        return token_ids

    def _decode(self, token_ids: list[int]) -> str:
        # Specials were taken out above; those left are wanted.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
