"""Reads a model from a GGUF file: llama (SmolLM2 and Mistral too), qwen2 and qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact import encodings
from furiosa_llm.workers.artifact.gguf_file import GgufFile, read_gguf
from furiosa_llm.workers.artifact.gguf_tokenizer import write_tokenizer
from furiosa_llm.workers.artifact.json_file import Fields
from furiosa_llm.workers.artifact.layout import check_config
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.rope import inverse_frequencies
from furiosa_llm.workers.artifact.source import ModelSource, StoredTensor, gather

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_NAMES = {
    "embed": ("token_embd.weight",),
    "lm_head": ("output.weight",),
    "final_norm": ("output_norm.weight",),
    "attn_norm": ("blk.{}.attn_norm.weight",),
    "ffn_norm": ("blk.{}.ffn_norm.weight",),
    "qkv": tuple(f"blk.{{}}.attn_{x}.weight" for x in "qkv"),
    "qkv_bias": tuple(f"blk.{{}}.attn_{x}.bias" for x in "qkv"),
    "q_norm": ("blk.{}.attn_q_norm.weight",),
    "k_norm": ("blk.{}.attn_k_norm.weight",),
    "o": ("blk.{}.attn_output.weight",),
    "gate_up": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    "down": ("blk.{}.ffn_down.weight",),
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, as a divisor per pair


def read_gguf_model(path: Path) -> ModelSource:
    """Map a GGUF file's weights and read its config.

    Raises: ArtifactError naming what is damaged, missing or not supported.
    """
    file = read_gguf(path)
    try:
        return _read(file, path)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _read(file: GgufFile, path: Path) -> ModelSource:
    fields = Fields("its metadata", file.metadata)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ArtifactError(
            f"architecture {str(architecture)[:80]!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if fields.integer("split.count", 1) > 1:
        raise ArtifactError("it is one of several parts: merge them (gguf-split --merge) first")
    config = _read_config(fields, architecture, file.tensors)

    def row_order(kind: str, part: int) -> NDArray[np.intp] | None:
        # llama's converter interleaves the halves of each q and k head, so that its rotation pairs
        # neighbours; ours pairs the halves, as the checkpoint did.
        if architecture not in ("llama", "mistral") or part > 1 or kind not in ("qkv", "qkv_bias"):
            return None
        return _halves_order((config.num_heads, config.num_kv_heads)[part], config.head_dim)

    matrices, vectors = gather(
        config, file.tensors, _NAMES, ignored=frozenset({_ROPE_FACTORS}), row_order=row_order
    )
    vectors["rope_inv_freq"] = _read_rope(fields, architecture, config, file.tensors)
    bos, eos = _read_special_ids(fields)
    return ModelSource(
        kind="gguf",
        name=path.name,
        config=config,
        matrices=matrices,
        vectors=vectors,
        write_tokenizer=lambda directory: write_tokenizer(
            architecture, file.metadata, config.vocab_size, directory
        ),
        bos_token_id=bos,
        eos_token_ids=eos,
        generation={},
    )


def _read_config(
    fields: Fields, architecture: str, tensors: dict[str, StoredTensor]
) -> ModelConfig:
    def integer(name: str, default: int | None = None) -> int:
        return fields.integer(f"{architecture}.{name}", default)

    if integer("expert_count", 0) > 0:
        raise ArtifactError("it is a mixture of experts, which is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ArtifactError("tensor 'token_embd.weight' is missing or no matrix")
    hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
    if num_heads <= 0:
        raise ArtifactError(f"it claims {num_heads} attention heads")
    head_dim = integer("attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if integer(name, head_dim) != head_dim:
            raise ArtifactError(f"{name} {integer(name)} other than head_dim {head_dim}")
    max_model_len = integer("context_length")
    window = integer("attention.sliding_window", 0)
    config = ModelConfig(
        architecture=ARCHITECTURES[architecture],
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=integer("feed_forward_length"),
        num_layers=integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        # A float32 in the file: its shortest decimal form is the checkpoint's own number.
        rms_norm_eps=float(
            str(np.float32(fields.number(f"{architecture}.attention.layer_norm_rms_epsilon")))
        ),
        max_model_len=max_model_len,
        sliding_window=window if window < max_model_len else 0,
        attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        qk_norm=architecture == "qwen3",
        tied_embeddings="output.weight" not in tensors,
    )
    check_config(config)
    return config


def _halves_order(num_heads: int, head_dim: int) -> NDArray[np.intp]:
    """Where the file keeps each row: row (head, half, i) is at (head, i, half)."""
    places = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return places.swapaxes(1, 2).reshape(-1)


def _read_rope(
    fields: Fields,
    architecture: str,
    config: ModelConfig,
    tensors: dict[str, StoredTensor],
) -> NDArray[np.float32]:
    kind = fields.table.get(f"{architecture}.rope.scaling.type", "none")
    factor = fields.number(
        f"{architecture}.rope.scaling.factor",
        fields.number(f"{architecture}.rope.scale_linear", 1.0),
    )
    scaling: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind}
    if scaling["rope_type"] in ("default", "linear") and factor not in (0.0, 1.0):
        scaling = {"rope_type": "linear", "factor": factor}
    theta = fields.number(f"{architecture}.rope.freq_base", 10000.0)
    frequencies = inverse_frequencies(config.head_dim, theta, scaling)
    factors = tensors.get(_ROPE_FACTORS)
    if factors is None:
        return frequencies
    if factors.encoding != "F32" or factors.shape != frequencies.shape:
        raise ArtifactError(f"tensor {_ROPE_FACTORS!r} is not {len(frequencies)} float32 numbers")
    divisors = encodings.decode(factors.data.reshape(1, -1), "F32")[0]
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise ArtifactError(f"tensor {_ROPE_FACTORS!r} holds values that are not positive numbers")
    scaled: NDArray[np.float32] = (frequencies / divisors).astype(np.float32)
    return scaled


def _read_special_ids(fields: Fields) -> tuple[int | None, list[int]]:
    """(bos id, ids that end an answer). A chat model's end of turn ends it as its end of text."""
    bos = fields.token_ids("tokenizer.ggml.bos_token_id")
    eos = fields.token_ids("tokenizer.ggml.eos_token_id")
    eos += fields.token_ids("tokenizer.ggml.eot_token_id")
    eos += fields.token_ids("tokenizer.ggml.eom_token_id")
    return bos[0] if bos else None, list(dict.fromkeys(eos))
