"""A GGUF file of Llama-3.2-1B's shape with random weights: speed does not depend on their values.

    python benchmarks/random_model.py OUT.gguf [--layers 16]

Float16, 2.5 GB. The vocabulary is made up but as large as the real one, merges included, so that
llama.cpp and our builder both load the file, and loading a tokenizer takes as long as it would.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray

# Large enough for a unit-variance input to stay of that order through 16 layers.
WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """As in Llama-3.2-1B's config; the embeddings are tied."""

    vocab_size: int = 128_256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    max_model_len: int = 131_072
    rope_theta: float = 500_000.0


NUM_SPECIAL = 256


def byte_tokens() -> list[str]:
    """The 256 bytes as GPT-2's byte-level vocabularies write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def made_up_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """(tokens, merges): the bytes, then tokens that each join two earlier ones by their merge."""
    tokens, merges = byte_tokens(), []
    known = set(tokens)
    random = np.random.default_rng(1)
    while len(tokens) < size:
        # Short parts and words of at most 16 letters, as most of a real vocabulary.
        first, second = (tokens[i] for i in random.integers(0, min(len(tokens), 4096), 2))
        if len(first + second) <= 16 and first + second not in known:
            known.add(first + second)
            tokens.append(first + second)
            merges.append(f"{first} {second}")
    return tokens, merges


def write_random_gguf(path: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write the file, whole or not at all."""
    building = path.with_suffix(".building")
    writer = GGUFWriter(building, "llama")
    _add_metadata(writer, shape)
    random = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> NDArray[np.float16]:
        values = random.standard_normal((rows, cols), np.float32)
        values *= np.float32(WEIGHT_SCALE)
        return values.astype(np.float16)

    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    writer.add_tensor("token_embd.weight", matrix(shape.vocab_size, hidden))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(shape.num_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, rows, cols in (
            ("attn_q", q_size, hidden),
            ("attn_k", kv_size, hidden),
            ("attn_v", kv_size, hidden),
            ("attn_output", hidden, q_size),
            ("ffn_gate", ffn, hidden),
            ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(rows, cols))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    building.rename(path)


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name("random weights")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_model_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = made_up_vocabulary(shape.vocab_size - NUM_SPECIAL)
    kinds = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * NUM_SPECIAL
    bos_token_id = len(tokens)
    tokens += [f"<|special {index}|>" for index in range(NUM_SPECIAL)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(bos_token_id)
    writer.add_eos_token_id(bos_token_id + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    write_random_gguf(options.out, Shape(num_layers=options.layers))
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
