"""Makes a tokenizer.json of the vocabulary in a GGUF file's metadata.

transformers' converter does most of it. What it leaves open is done here on the JSON: how a
vocabulary's numbers are split, beginning-of-text tokens, and tokens beyond the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.quiet_transformers import quiet_transformers

_KEYS = {
    "tokenizer_type": "tokenizer.ggml.model",
    "pre_tokenizer_type": "tokenizer.ggml.pre",
    "tokens": "tokenizer.ggml.tokens",
    "scores": "tokenizer.ggml.scores",
    "token_type": "tokenizer.ggml.token_type",
    "merges": "tokenizer.ggml.merges",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "unk_token_id": "tokenizer.ggml.unknown_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "add_prefix_space": "tokenizer.ggml.add_space_prefix",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unk_token_id",
    "pad_token": "pad_token_id",
}
# Byte-level vocabularies that split as GPT-2 does, but for their numbers: digit by digit.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
# Vocabularies whose words are taken whole where the vocabulary has them, before any merge, and
# whose texts begin with bos unless the file says otherwise (for tekken: only the former).
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"})
_WHOLE_WORDS = _LLAMA3 | {"tekken"}
_LIKE_GPT2 = frozenset({"gpt-2", "gpt2", "default", "mpt", "olmo", "jais", "phi-2"})


def write_tokenizer(
    architecture: str, metadata: dict[str, Any], vocab_size: int, directory: Path
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`.

    Raises: ArtifactError if the metadata hold no vocabulary, one of an unknown kind, or one that
        does not fit the model's.
    """
    described = {name: metadata[key] for name, key in _KEYS.items() if key in metadata}
    tokens = _check(described, vocab_size)
    pre_type = str(described.get("pre_tokenizer_type", "default"))
    with quiet_transformers():
        from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

        known = _SINGLE_DIGITS | _LIKE_GPT2 | set(mapping.GGUF_PRE_TOKENIZER_SPLITS)
        if described["tokenizer_type"] == "gpt2" and pre_type not in known:
            raise ArtifactError(
                f"the GGUF file's tokenizer splits text in a way ({pre_type[:40]!r}) that is not "
                "known here: build from the original checkpoint directory instead"
            )
        try:
            converted, _ = mapping.convert_gguf_tokenizer(architecture, described)
            tokenizer: dict[str, Any] = json.loads(converted.to_str())
        except Exception as error:  # whatever a damaged vocabulary makes the converter raise
            raise ArtifactError(
                f"the GGUF file's tokenizer cannot be converted: {error}"
            ) from error
    if described["tokenizer_type"] == "gpt2" and pre_type in _SINGLE_DIGITS:
        tokenizer["pre_tokenizer"] = _single_digits_splitter()
    if described["tokenizer_type"] == "gpt2" and pre_type in _WHOLE_WORDS:
        tokenizer["model"]["ignore_merges"] = True
    if described["tokenizer_type"] == "llama" and not described.get("add_prefix_space", True):
        _drop_prefix_space(tokenizer)
    # The classes behind the converter add default tokens, such as GPT-2's <|endoftext|>, whether
    # or not the model has them.
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < len(tokens)]
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", _begins_with_bos(described)))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    special = {name: tokens[described[key]] for name, key in _SPECIAL.items() if key in described}
    tokenizer["post_processor"] = _post_processor(
        tokenizer.get("post_processor"), described, special, add_bos, add_eos
    )
    _check_ids(tokenizer, tokens)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **special,
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / name).write_text(text, encoding="utf-8")


def _check(described: dict[str, Any], vocab_size: int) -> list[str]:
    """Check types, lengths and ids, and turn arrays into lists. Returns: the tokens."""
    tokens = described.get("tokens")
    if not isinstance(tokens, list) or not isinstance(described.get("tokenizer_type"), str):
        raise ArtifactError("the GGUF file has no tokenizer: use a file that has one")
    if len(tokens) != vocab_size:
        raise ArtifactError(
            f"the GGUF file's tokenizer has {len(tokens)} tokens and its model {vocab_size}"
        )
    if described["tokenizer_type"] not in ("gpt2", "llama"):
        raise ArtifactError(
            f"tokenizer type {described['tokenizer_type'][:40]!r} is not supported; supported are "
            "gpt2 (byte-level BPE) and llama (sentencepiece)"
        )
    for name in ("scores", "token_type"):
        if name in described:
            values = described[name]
            if not isinstance(values, np.ndarray) or len(values) != len(tokens):
                raise ArtifactError(f"the GGUF file's {_KEYS[name]} does not match its tokens")
            described[name] = values.tolist()
    merges = described.get("merges", [])
    if not isinstance(merges, list) or not all(x.count(" ") == 1 for x in merges):
        raise ArtifactError(f"the GGUF file's {_KEYS['merges']} are malformed")
    if not merges and (described["tokenizer_type"] == "gpt2" or "scores" not in described):
        raise ArtifactError(f"the GGUF file's tokenizer has no {_KEYS['merges']}")
    for key in _SPECIAL.values():
        if key in described and not (
            type(described[key]) is int and 0 <= described[key] < len(tokens)
        ):
            raise ArtifactError(f"the GGUF file's {_KEYS[key]} is no token of its vocabulary")
    return tokens


def _begins_with_bos(described: dict[str, Any]) -> bool:
    """Which vocabularies begin every text with bos where the file does not say."""
    is_sentencepiece: bool = described["tokenizer_type"] == "llama"
    return is_sentencepiece or described.get("pre_tokenizer_type") in _LLAMA3


def _drop_prefix_space(tokenizer: dict[str, Any]) -> None:
    """Encode a text as it is, without the space that sentencepiece puts before it by default."""
    splitter, decoder = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}
    if splitter.get("type") == "Metaspace":
        splitter["prepend_scheme"] = "never"
    if decoder.get("type") == "Sequence":
        decoder["decoders"] = [x for x in decoder["decoders"] if x.get("type") != "Strip"]


def _single_digits_splitter() -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }


def _post_processor(
    converted: Any, described: dict[str, Any], special: dict[str, str], add_bos: bool, add_eos: bool
) -> Any:
    """A template that adds bos and eos as the file asks; the converter's own if it asks neither."""
    ends = []
    if add_bos and "bos_token" in special:
        ends.append("bos_token")
    if add_eos and "eos_token" in special:
        ends.append("eos_token")
    if not ends:
        template = isinstance(converted, dict) and converted.get("type") == "TemplateProcessing"
        return None if template else converted
    before = [_special_piece(special[x]) for x in ends if x == "bos_token"]
    after = [_special_piece(special[x]) for x in ends if x == "eos_token"]
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [
            *before,
            {"Sequence": {"id": "A", "type_id": 0}},
            *after,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            special[x]: {
                "id": special[x],
                "ids": [described[_SPECIAL[x]]],
                "tokens": [special[x]],
            }
            for x in ends
        },
    }


def _special_piece(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _check_ids(tokenizer: dict[str, Any], tokens: list[str]) -> None:
    """The converted tokenizer must load, and give no id that the model does not have."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:
        raise ArtifactError(f"the GGUF file's tokenizer cannot be converted: {error}") from error
    highest = max(loaded.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= len(tokens):
        raise ArtifactError(
            f"the converted tokenizer has id {highest}, outside the model's {len(tokens)} tokens"
        )
