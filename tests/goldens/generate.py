"""Makes the goldens: what transformers computes in float32, stored as small .npz files.

    python -m venv torch-venv
    torch-venv/bin/pip install torch==2.13.0 -e .
    torch-venv/bin/python tests/goldens/generate.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

`tiny.npz` holds logits of small random models, one of each architecture, that
`tests/tiny_models.py` makes again from a seed; a digest tells whether it made the same ones.
`smollm2.npz` holds logits and greedy continuations of the embedded default model. Its weights are
read with the gguf package and given to transformers, past this project's own reader, so that the
goldens check that too. Only the tokenizer is this project's: ids in, ids out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from prompts import prompt_texts  # noqa: E402
from tiny_models import ARCHITECTURES, make_checkpoint  # noqa: E402

from furiosa_llm.workers.artifact.artifact import Artifact  # noqa: E402
from furiosa_llm.workers.artifact.resolve import resolve_model  # noqa: E402

TINY_PROMPT_LENS = (40, 200)
TINY_POSITION_STRIDE = 13  # logits are kept after every 13th token

MAX_NEW_TOKENS = 32
END_OF_SEQUENCE = 2  # SmolLM2's <|im_end|>
NUM_LARGEST = 64  # of each kept row of logits, the largest ones
LOGIT_STRIDE = 97  # and every 97th
MIN_MARGIN = 2e-3  # between the two largest logits of every greedy step

Arrays = dict[str, NDArray[Any]]


def tiny_goldens() -> Arrays:
    """For each architecture: the checkpoint's digest, prompts, positions and logits."""
    arrays: Arrays = {}
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            path = make_checkpoint(Path(directory) / architecture, architecture)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            digest = hashlib.sha256((path / "model.safetensors").read_bytes()).digest()
        arrays[f"{architecture}.sha256"] = np.frombuffer(digest, np.uint8)
        for prompt_len in TINY_PROMPT_LENS:
            rng = np.random.default_rng(prompt_len)
            token_ids = rng.integers(3, model.config.vocab_size, prompt_len, dtype=np.int32)
            positions = np.arange(TINY_POSITION_STRIDE - 1, prompt_len, TINY_POSITION_STRIDE)
            with torch.inference_mode():
                logits = model(torch.tensor(token_ids[None].astype(np.int64))).logits[0].numpy()
            name = f"{architecture}.{prompt_len}"
            arrays[f"{name}.token_ids"] = token_ids
            arrays[f"{name}.positions"] = positions.astype(np.int32)
            arrays[f"{name}.logits"] = logits[positions]
    return arrays


def smollm2_goldens(gguf_path: Path, tokenizer: Tokenizer) -> Arrays:
    """For each prompt: its ids, the greedy continuation, and the logits that give the
    continuation's first and last token.
    """
    model = smollm2_model(gguf_path)
    arrays: Arrays = {}
    for number, text in enumerate(prompt_texts()):
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        new_ids, rows = greedy(model, prompt)
        margins = [float(np.subtract(*np.sort(row)[:-3:-1])) for row in rows]
        print(f"{number:2} margin {min(margins):.4f} {tokenizer.decode(new_ids)!r}")
        if min(margins) < MIN_MARGIN:
            raise SystemExit(f"prompt {number}, {text!r}, passes through a near tie: replace it")
        arrays[f"{number}.prompt_ids"] = np.array(prompt, np.int32)
        arrays[f"{number}.new_ids"] = np.array(new_ids, np.int32)
        kept = np.stack([rows[0], rows[-1]])
        largest = np.argsort(-kept, axis=1, kind="stable")[:, :NUM_LARGEST]
        arrays[f"{number}.largest_ids"] = largest.astype(np.int32)
        arrays[f"{number}.largest_logits"] = np.take_along_axis(kept, largest, axis=1)
        arrays[f"{number}.strided_logits"] = kept[:, ::LOGIT_STRIDE]
    return arrays


def smollm2_model(gguf_path: Path) -> transformers.LlamaForCausalLM:
    """The GGUF's model in transformers, every weight dequantised to float32."""
    reader = gguf.GGUFReader(gguf_path)

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    config = transformers.LlamaConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in (
            ("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"),
        ):  # fmt: skip
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    state = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, num_heads in (
            ("attn_q", config.num_attention_heads),
            ("attn_k", config.num_key_value_heads),
        ):
            if name.endswith(part):
                values = halves_first(values, num_heads)
        state[names[name] + ".weight"] = torch.tensor(values)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def halves_first(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """GGUF interleaves the two halves of each head's rows; transformers has them one by one."""
    rows, cols = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return pairs.swapaxes(1, 2).reshape(rows, cols)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[NDArray[np.float32]]]:
    """New tokens up to MAX_NEW_TOKENS or the end of the sequence, and each one's logits."""
    new_ids: list[int] = []
    rows: list[NDArray[np.float32]] = []
    cache = None
    inputs = prompt
    while len(new_ids) < MAX_NEW_TOKENS and END_OF_SEQUENCE not in new_ids:
        output = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].numpy())
        inputs = [int(rows[-1].argmax())]
        new_ids += inputs
    return new_ids, rows


def main() -> None:
    """Write both files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2's .gguf file")
    parser.add_argument("--cache-dir", type=Path, help="where the artifact is built")
    arguments = parser.parse_args()
    np.savez_compressed(HERE / "tiny.npz", **tiny_goldens())
    resolved = resolve_model(str(arguments.gguf), cache_dir=arguments.cache_dir)
    tokenizer_dir = Artifact.open(resolved.path).tokenizer_dir
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    np.savez_compressed(HERE / "smollm2.npz", **smollm2_goldens(arguments.gguf, tokenizer))


if __name__ == "__main__":
    main()
