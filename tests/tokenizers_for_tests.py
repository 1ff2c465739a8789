"""Small real tokenizers of each kind, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from furiosa_llm.text.fast_backend import FastBackend
from furiosa_llm.text.tokenizer import Tokenizer
from furiosa_llm.text.tokenizer_files import TokenizerFiles

NO_FILES = TokenizerFiles(special_tokens={}, chat_templates={}, eos_token_ids=())


def byte_level() -> HFTokenizer:
    """GPT-2's kind: 256 bytes, some merges, specials, an added token outside the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ã", "©"), ("ð", "Ł"), ("l", "l"), ("Ġ", "ð")]
    vocab = {token: id for id, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = HFTokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|bos|>"), AddedToken("<|eos|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("a 你", special=False)])
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    return tokenizer


def sentencepiece() -> HFTokenizer:
    """Llama 2's kind: "▁" for spaces, byte tokens, the text's first space stripped."""
    return _with_metaspace(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    )


def metaspace() -> HFTokenizer:
    """A decoder that treats the first token differently: no table of pieces exists."""
    return _with_metaspace(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    )


def _with_metaspace(decoder: decoders.Decoder) -> HFTokenizer:
    words = ["▁", "▁▁", "▁the", "▁a", "cat", "s", "é", "你", "�", "▁.", "x▁y"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = HFTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def wrapped(tokenizer: HFTokenizer) -> Tokenizer:
    return Tokenizer(FastBackend(tokenizer), NO_FILES)


def saved(directory: Path, tokenizer: HFTokenizer, **files: object) -> Path:
    """Write tokenizer.json and, by stem, further JSON files. Returns: the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
