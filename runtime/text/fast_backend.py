"""Tokenizers of the `tokenizers` library, loaded from a tokenizer.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from furiosa_llm.errors import ArtifactError, InvalidRequestError
from furiosa_llm.text.pieces import piece_table

_MAX_NBYTES = 256 << 20  # the largest known ones take about 35 MB


class FastBackend:
    """Encodes with the interpreter lock released."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        # Some files ask to cut or pad every text, which suits training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.pieces = piece_table(tokenizer)

    @classmethod
    def load(cls, directory: Path) -> FastBackend:
        file = directory / "tokenizer.json"
        if not directory.is_dir():
            raise ArtifactError(
                f"{directory} is no directory; the tokenizer is given as a directory that holds a "
                "tokenizer.json"
            )
        if not file.is_file():
            raise ArtifactError(
                f"{directory} has no tokenizer.json: save one there with transformers' "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        if file.stat().st_size > _MAX_NBYTES:
            raise ArtifactError(f"{file} is larger than {_MAX_NBYTES} bytes")
        try:
            return cls(HFTokenizer.from_file(str(file)))
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactError(f"{file} cannot be loaded: {error}") from error

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # such as an unknown token in a vocabulary without an unk token
            raise InvalidRequestError(
                f"the text cannot be tokenized: {error}", param="prompt"
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)
