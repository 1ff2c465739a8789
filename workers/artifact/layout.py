"""Which tensors a model of a given config consists of, and in which shapes: the artifact's table.

Builder, reader and kernels all go by this one list; docs/artifact-format.md shows it as a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.model_config import ModelConfig

# Far beyond any model that exists; they keep a damaged config from asking for absurd amounts.
_BOUNDS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_layers": (1, 1024),
    "num_heads": (1, 4096),
    "num_kv_heads": (1, 4096),
    "head_dim": (2, 4096),
    "max_model_len": (1, 1 << 28),
    "sliding_window": (0, 1 << 28),
}


@dataclass(frozen=True, slots=True)
class TensorShape:
    """What a named tensor must look like. A vector is one row of plain float32."""

    rows: int
    cols: int
    is_vector: bool = False


def tensor_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """Every tensor of the model, by name, in the order in which `weights.bin` holds them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_rows = config.q_size + 2 * config.kv_size

    def vector(size: int) -> TensorShape:
        return TensorShape(1, size, is_vector=True)

    shapes = {
        "embed": TensorShape(config.vocab_size, hidden),
        "rope_inv_freq": vector(config.head_dim // 2),
    }
    for index in range(config.num_layers):
        layer = {"attn_norm": vector(hidden), "qkv": TensorShape(qkv_rows, hidden)}
        if config.attention_bias:
            layer["qkv_bias"] = vector(qkv_rows)
        if config.qk_norm:
            layer |= {"q_norm": vector(config.head_dim), "k_norm": vector(config.head_dim)}
        layer |= {
            "o": TensorShape(hidden, config.q_size),
            "ffn_norm": vector(hidden),
            "gate_up": TensorShape(2 * inner, hidden),
            "down": TensorShape(hidden, inner),
        }
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm"] = vector(hidden)
    if not config.tied_embeddings:
        shapes["lm_head"] = TensorShape(config.vocab_size, hidden)
    return shapes


def check_config(config: ModelConfig) -> None:
    """Refuse a config whose numbers are out of range or contradict each other: ArtifactError."""
    for field, (low, high) in _BOUNDS.items():
        value = getattr(config, field)
        if not low <= value <= high:
            raise ArtifactError(f"the model's {field} is {value}; it must be {low} to {high}")
    if config.num_heads % config.num_kv_heads:
        raise ArtifactError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key/value heads"
            " evenly"
        )
    if config.head_dim % 2:
        raise ArtifactError(f"head_dim is {config.head_dim}; rotary embeddings need it even")
    if not (math.isfinite(config.rms_norm_eps) and 0 < config.rms_norm_eps < 1):
        raise ArtifactError(f"rms_norm_eps is {config.rms_norm_eps}; it must lie between 0 and 1")
