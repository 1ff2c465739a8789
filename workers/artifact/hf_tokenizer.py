"""Copies a checkpoint's tokenizer files into an artifact, or converts them where it has none."""

from __future__ import annotations

import shutil
from pathlib import Path

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.quiet_transformers import quiet_transformers

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_MAX_NBYTES = 256 << 20


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Put the tokenizer of the checkpoint at `source` into `directory`, tokenizer.json included.

    A checkpoint without tokenizer.json (a sentencepiece model, say) is converted by transformers.
    Raises: ArtifactError if there is no tokenizer, or it cannot be converted.
    """
    for name in _NAMES:
        file = source / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MAX_NBYTES:
            raise ArtifactError(f"{file} is larger than {_MAX_NBYTES} bytes")
        shutil.copyfile(file, directory / name)
    if not (directory / "tokenizer.json").is_file():
        _convert(source, directory)


def _convert(source: Path, directory: Path) -> None:
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            )
            tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    except Exception as error:  # whatever a damaged vocabulary makes the converters raise
        raise ArtifactError(
            f"{source} has no tokenizer.json and its tokenizer cannot be converted: {error}"
        ) from error
