"""Tokenizers that transformers runs in Python, for `--tokenizer-mode slow`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from furiosa_llm.errors import ArtifactError, InvalidRequestError
from furiosa_llm.text.pieces import PieceTable


class SlowBackend:
    """One call at a time: transformers does not promise that its tokenizers are reentrant."""

    pieces: PieceTable | None = None  # their decoders are programs

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)

    @classmethod
    def load(cls, directory: Path) -> SlowBackend:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), use_fast=False, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a damaged or absent file makes transformers raise
            raise ArtifactError(f"{directory} has no usable tokenizer: {error}") from error
        if tokenizer.is_fast:
            raise InvalidRequestError(
                f"--tokenizer-mode slow: the tokenizer of {directory} exists only in its fast "
                "form; use --tokenizer-mode auto",
                param="tokenizer_mode",
            )
        return cls(tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        with self._lock:
            text: str = self._tokenizer.decode(
                [id for id in token_ids if id < self.vocab_size],
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.get_vocab().get(token)
        return token_id
