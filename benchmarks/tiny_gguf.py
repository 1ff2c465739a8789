"""A GGUF file of a model too small to take time, to measure what is around the model of a server.

    python benchmarks/tiny_gguf.py SOURCE.gguf TINY.gguf

The tokenizer is the first part of the source's, the weights are random.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS = 512, 32, 32, 2


def write_tiny(source: Path, target: Path) -> None:
    """Write a llama of one layer, whole or not at all."""
    fields = GGUFReader(source).fields

    def value(name: str) -> Any:
        return fields[name].contents()

    building = target.with_suffix(".building")
    writer = GGUFWriter(building, "llama")
    writer.add_name("tiny")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    tokens = value("tokenizer.ggml.tokens")[:VOCAB_SIZE]
    known = set(tokens)
    merges = [
        merge
        for merge in value("tokenizer.ggml.merges")
        if {*merge.split(" "), merge.replace(" ", "")} <= known
    ]
    writer.add_tokenizer_model(value("tokenizer.ggml.model"))
    writer.add_tokenizer_pre(value("tokenizer.ggml.pre"))
    writer.add_token_list(tokens)
    writer.add_token_types(value("tokenizer.ggml.token_type")[:VOCAB_SIZE])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(value("tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(value("tokenizer.ggml.eos_token_id"))
    choose = np.random.default_rng(0)

    def matrix(rows: int, cols: int) -> Any:
        return choose.standard_normal((rows, cols), dtype=np.float32) / np.float32(cols**0.5)

    norm = np.ones(HIDDEN_SIZE, np.float32)
    writer.add_tensor("token_embd.weight", matrix(VOCAB_SIZE, HIDDEN_SIZE))
    writer.add_tensor("output_norm.weight", norm)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", norm)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix(HIDDEN_SIZE, HIDDEN_SIZE))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE))
    writer.add_tensor("blk.0.ffn_down.weight", matrix(HIDDEN_SIZE, INTERMEDIATE_SIZE))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    building.rename(target)


if __name__ == "__main__":
    write_tiny(Path(sys.argv[1]), Path(sys.argv[2]))
