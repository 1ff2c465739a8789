"""Tiny random models of every supported family, as checkpoints and as artifacts.

    make_checkpoint(path, "qwen3")          a Hugging Face checkpoint directory
    tiny_artifact(tmp_path, "llama", "int8")    an opened artifact of one

The same arguments give the same bytes everywhere.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.build import build_artifact
from furiosa_llm.workers.artifact.packing import to_bf16

VOCAB_SIZE = 384

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What `make_checkpoint` and `tiny_artifact` take as `architecture`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_SCALING,
    },
    "llama_tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 16,
        "num_hidden_layers": 3,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 128,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": False,
    },
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A model reads one token at a time and writes "
    "the next one; the worker keeps what it has read in blocks. Water is wet, and the sea is deep. "
)


def config_of(architecture: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return _BASE | ARCHITECTURES[architecture] | overrides


def make_checkpoint(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "F32",
    num_shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint: config, safetensors, tokenizer, chat template, generation config.

    Args:
        path: the directory to make.
        architecture: a key of ARCHITECTURES.
        seed: of the weights.
        dtype: F32, F16 or BF16: how the weights are stored.
        num_shards: above 1, that many files and an index.
        overrides: fields of config.json.
    Returns: `path`.
    """
    config = config_of(architecture, **overrides)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config)
    weights = random_weights(config, seed)
    if num_shards == 1:
        write_safetensors(path / "model.safetensors", weights, dtype)
    else:
        names = list(weights)
        weight_map = {}
        for index in range(num_shards):
            file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
            shard = {name: weights[name] for name in names[index::num_shards]}
            write_safetensors(path / file, shard, dtype)
            weight_map |= dict.fromkeys(shard, file)
        index_file = {"metadata": {}, "weight_map": weight_map}
        _write_json(path / "model.safetensors.index.json", index_file)
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": _CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.7, "top_k": 40}
    _write_json(path / "generation_config.json", generation)
    return path


def tiny_artifact(
    tmp_path: Path, architecture: str = "llama", weights: str = "fp32", **options: Any
) -> Artifact:
    """Build a tiny model under `tmp_path` (once per set of arguments) and open it.

    `options` are `make_checkpoint`'s.
    """
    suffix = "".join(f"-{key}={value}" for key, value in sorted(options.items()))
    out = tmp_path / f"{architecture}-{weights}{suffix}"
    if not out.exists():
        checkpoint = make_checkpoint(tmp_path / f"{out.name}-checkpoint", architecture, **options)
        build_artifact(checkpoint, out, weights=weights)
    return Artifact.open(out)


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights under a checkpoint's names; large enough that greedy answers vary."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim

    def matrix(rows: int, cols: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, cols)) * (1.5 / cols**0.5)).astype(np.float32)

    def norm(size: int) -> NDArray[np.float32]:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * 4}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        attention = layer + "self_attn."
        weights[layer + "input_layernorm.weight"] = norm(hidden)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            weights[f"{attention}{name}_proj.weight"] = matrix(size, hidden)
            if config["model_type"] == "qwen2":
                bias = rng.standard_normal(size).astype(np.float32) * np.float32(0.2)
                weights[f"{attention}{name}_proj.bias"] = bias
        weights[attention + "o_proj.weight"] = matrix(hidden, q_size)
        if config["model_type"] == "qwen3":
            weights[attention + "q_norm.weight"] = norm(head_dim)
            weights[attention + "k_norm.weight"] = norm(head_dim)
        weights[layer + "post_attention_layernorm.weight"] = norm(hidden)
        weights[layer + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[layer + "mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[layer + "mlp.down_proj.weight"] = matrix(hidden, inner)
    weights["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden) * 2
    return weights


def write_safetensors(path: Path, weights: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """Write a safetensors file in F32, F16 or BF16 (which the safetensors package cannot here)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces = []
    end = 0
    for name, values in weights.items():
        stored = {"F32": "<f4", "F16": "<f2"}.get(dtype)
        piece = (to_bf16(values) if stored is None else values.astype(stored)).tobytes()
        offsets = [end, end + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        pieces.append(piece)
        end += len(piece)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))


@cache
def _tokenizer_json() -> str:
    """A byte-level BPE of VOCAB_SIZE ids: three special tokens, 256 bytes, merges, spare ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        special_tokens=[AddedToken(x, special=True, normalized=False) for x in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS] * 4, trainer)
    text: str = tokenizer.to_str()
    return text


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
