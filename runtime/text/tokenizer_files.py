"""What the small files beside a tokenizer.json say: special tokens, chat templates, eos ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.errors import ArtifactError

_MAX_NBYTES = 16 << 20  # a chat template takes some KiB; more is no configuration
_SPECIAL_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The facts that tokenizer.json itself does not hold."""

    special_tokens: dict[str, str]  # "bos_token" -> "<s>": what a chat template may name
    chat_templates: dict[str, str]  # name -> source; "default" is the one used unless asked
    eos_token_ids: tuple[int, ...]  # as generation_config.json or config.json list them

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read whichever of the files `directory` has.

        Raises: ArtifactError if one is damaged.
        """
        config = _read_json(directory / "tokenizer_config.json")
        special = _read_json(directory / "special_tokens_map.json") | config
        eos = _read_json(directory / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = _read_json(directory / "config.json").get("eos_token_id")
        return cls(
            special_tokens=_special_tokens(special),
            chat_templates=_chat_templates(directory, config),
            eos_token_ids=_ids(eos),
        )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_NBYTES:
            raise ArtifactError(f"{path} is larger than {_MAX_NBYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Each may be a string or an object with its text under `content`."""
    named = {name: config.get(name) for name in _SPECIAL_NAMES}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files of their own come before tokenizer_config.json's entry, which may be a list."""
    templates: dict[str, str] = {}
    match config.get("chat_template"):
        case str(template):
            templates["default"] = template
        case list(entries):
            for entry in entries:
                match entry:
                    case {"name": str(name), "template": str(template)}:
                        templates[name] = template
                    case _:
                        raise ArtifactError(
                            f"{directory}/tokenizer_config.json: an entry of chat_template has no "
                            "name or no template"
                        )
    match _read_json(directory / "chat_template.json").get("chat_template"):
        case str(template):
            templates["default"] = template
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = _read_text(directory / "chat_template.jinja")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    return templates


def _ids(value: Any) -> tuple[int, ...]:
    """An id or a list of ids as a tuple; anything else counts as none."""
    values = value if isinstance(value, list) else [value]
    return tuple(x for x in values if type(x) is int and x >= 0)
