"""Write a GGUF file's llama model as a Hugging Face checkpoint in bf16, for peers that read those.

python benchmarks/gguf_to_checkpoint.py MODEL.gguf DIRECTORY
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact import encodings
from furiosa_llm.workers.artifact.gguf_file import read_gguf
from furiosa_llm.workers.artifact.gguf_model import read_gguf_model
from furiosa_llm.workers.artifact.model_config import ModelConfig

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def name_of(name: str) -> str:
    """A tensor's name in a checkpoint."""
    if name in _NAMES:
        return _NAMES[name]
    _, layer, kind, _ = name.split(".")  # blk.3.attn_q.weight
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def halves(matrix: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The file interleaves the halves of each q and k head; a checkpoint has them one by one."""
    rows, cols = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return pairs.swapaxes(1, 2).reshape(rows, cols)


def convert(gguf: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files to `directory`."""
    source, file = read_gguf_model(gguf), read_gguf(gguf)
    config = source.config
    assert config.architecture == "LlamaForCausalLM", config.architecture
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, stored in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        num_rows = stored.shape[0] if len(stored.shape) == 2 else 1
        values = encodings.decode(stored.data.reshape(num_rows, -1), stored.encoding)
        values = values.reshape(stored.shape)
        if ".attn_q." in name or ".attn_k." in name:
            heads = config.num_heads if ".attn_q." in name else config.num_kv_heads
            values = halves(values, heads)
        tensors[name_of(name)] = bf16(values)
    _write_safetensors(directory / "model.safetensors", tensors)
    theta = float(file.metadata.get("llama.rope.freq_base", 10000.0))
    (directory / "config.json").write_text(
        json.dumps(_config_json(config, theta, source.bos_token_id, source.eos_token_ids), indent=1)
    )
    source.write_tokenizer(directory)


def _config_json(
    config: ModelConfig, theta: float, bos: int | None, eos: list[int]
) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_model_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": "bfloat16",
    }


def _write_safetensors(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            out.write(values.tobytes())


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
