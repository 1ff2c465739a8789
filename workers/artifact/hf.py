"""Reads a Hugging Face checkpoint directory: config.json and safetensors. No code of it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.hf_tokenizer import copy_tokenizer
from furiosa_llm.workers.artifact.json_file import Fields
from furiosa_llm.workers.artifact.layout import check_config
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.rope import inverse_frequencies
from furiosa_llm.workers.artifact.safetensors_file import read_safetensors
from furiosa_llm.workers.artifact.source import ModelSource, StoredTensor, gather

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_MAX_SHARDS = 1024

_ATTENTION = "model.layers.{}.self_attn."
_NAMES = {
    "embed": ("model.embed_tokens.weight",),
    "lm_head": ("lm_head.weight",),
    "final_norm": ("model.norm.weight",),
    "attn_norm": ("model.layers.{}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "qkv": tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"),
    "qkv_bias": tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"),
    "q_norm": (f"{_ATTENTION}q_norm.weight",),
    "k_norm": (f"{_ATTENTION}k_norm.weight",),
    "o": (f"{_ATTENTION}o_proj.weight",),
    "gate_up": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight",),
}
_GENERATION_FIELDS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
)  # fmt: skip


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint directory."""
    return (path / "config.json").is_file()


def read_checkpoint(path: Path) -> ModelSource:
    """Map a checkpoint's weights and read its config.

    Raises: ArtifactError naming what is damaged, missing or not supported.
    """
    fields = Fields.read(path / "config.json")
    stored = _read_weights(path)
    config = _read_config(fields, stored)
    ignored = {x for x in stored if x.endswith(".rotary_emb.inv_freq")}  # old checkpoints have it
    if config.tied_embeddings:
        ignored.add("lm_head.weight")
    matrices, vectors = gather(config, stored, _NAMES, ignored=frozenset(ignored))
    vectors["rope_inv_freq"] = _read_rope(fields, config)
    bos_token_ids, eos_token_ids, generation = _read_generation(path, fields)
    return ModelSource(
        kind="hf",
        name=path.resolve().name,
        config=config,
        matrices=matrices,
        vectors=vectors,
        write_tokenizer=lambda directory: copy_tokenizer(path, directory),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=eos_token_ids,
        generation=generation,
    )


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    if not (path / _INDEX_NAME).is_file():
        if not (path / _SINGLE_NAME).is_file():
            raise ArtifactError(
                f"{path} has neither {_SINGLE_NAME} nor {_INDEX_NAME}: only safetensors weights "
                "are read (a pickled .bin checkpoint could run code); convert them first"
            )
        return read_safetensors(path / _SINGLE_NAME)
    file_of = Fields.read(path / _INDEX_NAME).mapping("weight_map")
    names = {str(name) for name in file_of.values()}
    if len(names) > _MAX_SHARDS:
        raise ArtifactError(
            f"{_INDEX_NAME} names {len(names)} files; at most {_MAX_SHARDS} are read"
        )
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ArtifactError(f"{_INDEX_NAME}: {name[:80]!r} is not a plain file name")
    files = {name: read_safetensors(path / name) for name in sorted(names)}
    stored = {}
    for tensor, name in file_of.items():
        if tensor not in files[str(name)]:
            raise ArtifactError(
                f"{_INDEX_NAME}: tensor {tensor[:80]!r} is not in {str(name)[:80]!r}"
            )
        stored[tensor] = files[str(name)][tensor]
    return stored


def _read_config(fields: Fields, stored: dict[str, StoredTensor]) -> ModelConfig:
    architecture = _architecture(fields)
    if fields.table.get("quantization_config") is not None:
        raise ArtifactError(
            "config.json has a quantization_config: quantised checkpoints are not read; use the "
            "original one and quantise it with --weights int8 or int4"
        )
    activation = fields.table.get("hidden_act", "silu")
    if activation != "silu":
        raise ArtifactError(f"config.json: hidden_act {str(activation)[:40]!r} is not supported")
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if num_heads <= 0:
        raise ArtifactError(f"config.json: num_attention_heads is {num_heads}")
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    max_model_len = fields.integer("max_position_embeddings")
    num_layers = fields.integer("num_hidden_layers")
    bias_name = _NAMES["qkv_bias"][0].format(0)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", default_head_dim),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_model_len=max_model_len,
        sliding_window=_sliding_window(fields, architecture, num_layers, max_model_len),
        attention_bias=architecture == "Qwen2ForCausalLM" or bias_name in stored,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )
    check_config(config)
    return config


def _architecture(fields: Fields) -> str:
    names = fields.table.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise ArtifactError(
            f"architecture {str(name)[:80]!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return str(name)


def _sliding_window(fields: Fields, architecture: str, num_layers: int, max_model_len: int) -> int:
    """The window that all layers share; 0 where attention is full or the window never closes."""
    if architecture == "LlamaForCausalLM" or fields.table.get("sliding_window") is None:
        return 0
    is_qwen = architecture.startswith("Qwen")
    if is_qwen and not fields.flag("use_sliding_window", False):
        return 0
    window = fields.integer("sliding_window")
    if is_qwen:
        first = fields.integer("max_window_layers", num_layers)  # earlier layers are full
        if first >= num_layers:
            return 0
        if first > 0:
            raise ArtifactError(
                f"config.json: the sliding window starts at layer {first}; a model must have it in "
                "all layers or in none"
            )
    kinds = fields.table.get("layer_types") or ["sliding_attention"]
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise ArtifactError("config.json: layers that differ in layer_types are not supported")
    return window if kinds[0] == "sliding_attention" and window < max_model_len else 0


def _read_rope(fields: Fields, config: ModelConfig) -> NDArray[np.float32]:
    """Both spellings: rope_theta with rope_scaling, and the newer rope_parameters with both."""
    parameters = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ArtifactError("config.json: RoPE parameters that differ by layer are not supported")
    partial = Fields("config.json", {**fields.table, **parameters})
    if partial.number("partial_rotary_factor", 1.0) != 1.0:
        raise ArtifactError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = partial.number("rope_theta", 10000.0)
    scaling: dict[str, Any] = {"original_max_position_embeddings": config.max_model_len}
    return inverse_frequencies(config.head_dim, theta, scaling | parameters)


def _read_generation(
    path: Path, config_fields: Fields
) -> tuple[list[int], list[int], dict[str, Any]]:
    """(bos ids, eos ids, sampling defaults): generation_config.json's, else config.json's."""
    file = path / "generation_config.json"
    fields = Fields.read(file) if file.is_file() else Fields(file.name, {})
    bos = fields.token_ids("bos_token_id") or config_fields.token_ids("bos_token_id")
    eos = fields.token_ids("eos_token_id") or config_fields.token_ids("eos_token_id")
    take = {"do_sample": fields.flag, "top_k": fields.integer}
    generation = {
        name: take.get(name, fields.number)(name)
        for name in _GENERATION_FIELDS
        if fields.table.get(name) is not None
    }
    return bos, eos, generation
