"""What each token adds to the text, as bytes, worked out from a tokenizer's decoder.

The decoders of today's language models are nearly context-free: a token stands for some bytes,
whatever surrounds it, and only the start of the text may lose a space. Where that holds, decoding
in pieces is a table look-up and an incremental UTF-8 decoder (detokenizer.py), exact and O(1) a
token. `piece_table` recognises those decoders and gives None for all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceTable:
    """token id -> bytes, filled as ids are met, so that a large vocabulary costs no start-up time.

    Attributes:
        num_leading_spaces: how many spaces the very start of a text loses.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        to_bytes: Callable[[str], bytes],
        *,
        num_leading_spaces: int,
    ) -> None:
        self.num_leading_spaces = num_leading_spaces
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._piece_of: dict[int, bytes] = {}

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id that the vocabulary lacks."""
        piece = self._piece_of.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id)
            piece = b"" if token is None else self._to_bytes(token)
            self._piece_of[token_id] = piece
        return piece


def piece_table(tokenizer: HFTokenizer) -> PieceTable | None:
    """The table for this tokenizer, or None if its decoder looks at more than one token."""
    if tokenizer.decoder is None:
        return None
    steps = _steps(json.loads(tokenizer.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceTable(tokenizer, _byte_level_bytes, num_leading_spaces=0)
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _sentencepiece_table(tokenizer, steps)
    return None


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


# --- byte-level BPE (GPT-2 and after) -------------------------------------------------------------


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, itself where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet; the whole token is then literal."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


# --- SentencePiece as `tokenizers` writes it (Llama 2, Mistral, Gemma) ----------------------------


def _sentencepiece_table(tokenizer: HFTokenizer, steps: list[dict[str, Any]]) -> PieceTable | None:
    """Replacements of one character, byte tokens, and a strip of the fused text's start.

    A replacement longer than a character could match over the border of two fused tokens, and a
    strip before the fusion strips each token; neither is context-free, and no known model has one.
    """
    replacements: list[tuple[str, str]] = []
    num_leading_spaces = 0
    is_fused = has_byte_tokens = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(old) == 1
            ):
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not is_fused:
                has_byte_tokens = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                num_leading_spaces += start
            case _:
                return None

    def to_bytes(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return PieceTable(tokenizer, to_bytes, num_leading_spaces=num_leading_spaces)
