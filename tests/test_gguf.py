"""GGUF files: read exactly, their tokenizers converted, and damaged ones refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import config_of, make_checkpoint, random_weights
from tokenizers import Tokenizer

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.build import build_artifact
from furiosa_llm.workers.artifact.gguf_file import read_gguf
from furiosa_llm.workers.artifact.packing import unpack_quantized

FAMILIES = {"llama": "llama", "llama3": "llama", "mistral": "llama", "qwen2": "qwen2",
            "qwen3": "qwen3"}  # fmt: skip
F32, Q8_0, Q4_0, Q4_1 = (gguf.GGMLQuantizationType[x] for x in ("F32", "Q8_0", "Q4_0", "Q4_1"))

_NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """(tokens, merges, token types): GPT-2's bytes, a few merges, special tokens, 384 in all."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "1 2"]
    tokens = special + list(bytes_to_unicode().values()) + [x.replace(" ", "") for x in merges]
    spare = [f"<unused{i}>" for i in range(384 - len(tokens))]
    return tokens + spare, merges, [3] * 3 + [1] * (len(tokens) - 3) + [3] * len(spare)


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Llama's q and k rows as the usual conversion stores them: each head's halves interleaved."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def make_gguf(
    path: Path,
    family: str = "llama",
    kinds: Any = F32,
    *,
    metadata: dict[str, Any] | None = None,
    pre: str = "smollm",
    **overrides: Any,
) -> Path:
    """Write the tiny model of `family` as a GGUF file.

    Args:
        kinds: the matrices' type, or a function from a tensor's GGUF name to it.
        metadata: extra uint32 (or bool, str) keys.
        pre: the tokenizer's way of splitting.
        overrides: fields of the config.
    """
    config = config_of(family, **overrides)
    arch = FAMILIES[family]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if family == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    tokens, merges, types = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in (metadata or {}).items():
        kind = {bool: gguf.GGUFValueType.BOOL, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(key, value, kind.get(type(value), gguf.GGUFValueType.UINT32))
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, values in random_weights(config).items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = permuted(values, config[heads])
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        name = name.removeprefix("model.")
        kind = kinds(name) if callable(kinds) else kinds
        if values.ndim == 1 or kind == F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(config: dict[str, Any]) -> np.ndarray:
    """Llama 3's scaling as the usual conversion writes it: one divisor a pair of values."""
    scaling = config["rope_scaling"]
    dim = config["hidden_size"] // config["num_attention_heads"]
    divisors = []
    for index in range(0, dim, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (index / dim)
        original = scaling["original_max_position_embeddings"]
        if wavelength < original / scaling["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / scaling["low_freq_factor"]:
            divisors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_and_its_checkpoint_are_the_same_model(tmp_path, family):
    theirs = build_artifact(make_checkpoint(tmp_path / "hf", family), tmp_path / "a")
    ours = build_artifact(make_gguf(tmp_path / "model.gguf", family), tmp_path / "b")
    expected, artifact = Artifact.open(theirs), Artifact.open(ours, verify=True)
    assert artifact.weights == "fp32"
    assert artifact.names == expected.names
    for field in ("hidden_size", "head_dim", "sliding_window", "attention_bias", "qk_norm",
                  "tied_embeddings", "vocab_size", "rms_norm_eps", "max_model_len"):  # fmt: skip
        assert getattr(artifact.config, field) == getattr(expected.config, field), field
    for name in artifact.names:
        if name == "rope_inv_freq":
            np.testing.assert_allclose(artifact.vector(name), expected.vector(name), rtol=1e-6)
        else:
            np.testing.assert_array_equal(
                artifact.tensor(name).data, expected.tensor(name).data, err_msg=name
            )


@pytest.mark.parametrize(
    ("kind", "weights", "has_min"),
    [(Q8_0, "int8", False), (Q4_0, "int4", False), (Q4_1, "int4", True)],
)
def test_blocks_that_we_keep_are_taken_over_exactly(tmp_path, kind, weights, has_min):
    file = make_gguf(tmp_path / "model.gguf", "qwen3", kind)
    artifact = Artifact.open(build_artifact(file, tmp_path / "out"))
    assert artifact.weights == weights
    stored = read_gguf(file).tensors
    down = artifact.tensor("layers.1.down")
    assert (down.dtype, down.has_min, down.rotated) == (weights, has_min, False)
    raw = stored["blk.1.ffn_down.weight"].data.reshape(down.rows, -1)
    np.testing.assert_array_equal(down.unpack(), gguf.dequantize(raw, kind))
    qkv = artifact.tensor("layers.0.qkv")
    values = qkv.unpack()
    parts = [
        gguf.dequantize(
            stored[f"blk.0.attn_{x}.weight"].data.reshape(-1, raw.shape[1] // 3 * 2), kind
        )
        for x in "qkv"
    ]
    np.testing.assert_array_equal(values, np.concatenate(parts))


def test_llama_rows_of_quantised_q_and_k_are_put_back_in_order(tmp_path):
    file = make_gguf(tmp_path / "model.gguf", "llama", Q8_0)
    qkv = Artifact.open(build_artifact(file, tmp_path / "out")).tensor("layers.0.qkv")
    values = qkv.unpack()
    weights = random_weights(config_of("llama"))
    for start, part in ((0, "q"), (64, "k"), (96, "v")):
        expected = weights[f"model.layers.0.self_attn.{part}_proj.weight"]
        got = values[start : start + len(expected)]
        assert np.abs(got - expected).max() < np.abs(expected).max() / 100


def test_a_mixture_of_q4_0_and_q4_1_fuses_exactly(tmp_path):
    file = make_gguf(
        tmp_path / "model.gguf", "qwen3", lambda name: Q4_1 if "ffn_up" in name else Q4_0
    )
    gate_up = Artifact.open(build_artifact(file, tmp_path / "out")).tensor("layers.0.gate_up")
    assert (gate_up.dtype, gate_up.has_min) == ("int4", True)
    blocks = unpack_quantized(gate_up.data, gate_up.rows, gate_up.cols, "int4", True)
    gate = read_gguf(file).tensors["blk.0.ffn_gate.weight"].data.reshape(96, -1)
    np.testing.assert_allclose(
        blocks.dequantize()[:96], gguf.dequantize(gate, Q4_0), rtol=0, atol=1e-5
    )


def test_a_fused_matrix_takes_its_widest_part(tmp_path):
    file = make_gguf(
        tmp_path / "model.gguf", "qwen3", lambda name: Q8_0 if "attn_v" in name else Q4_0
    )
    artifact = Artifact.open(build_artifact(file, tmp_path / "out"))
    assert artifact.tensor("layers.0.qkv").dtype == "int8"
    assert artifact.tensor("layers.0.down").dtype == "int4"
    assert artifact.weights == "int4"


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_any_source_becomes_any_weight_type(tmp_path, weights):
    file = make_gguf(tmp_path / "model.gguf", "llama", gguf.GGMLQuantizationType.Q5_1)
    artifact = Artifact.open(build_artifact(file, tmp_path / "out", weights=weights), verify=True)
    assert artifact.tensor("layers.0.down").dtype == weights


def test_the_tokenizer_round_trips_and_knows_its_special_tokens(tmp_path):
    artifact = Artifact.open(build_artifact(make_gguf(tmp_path / "m.gguf"), tmp_path / "out"))
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    for text in (
        "hello world",
        "  a  12 b\n\t",
        "naïve 漢字 🙂",
        "x<|im_end|>y",
        "def f(x):\n  pass",
    ):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert max(ids) < artifact.config.vocab_size
    assert tokenizer.encode("x<|im_end|>").ids[-1] == 2
    assert tokenizer.encode("hello").tokens == ["hello"]
    assert tokenizer.encode("a12").tokens == ["a", "1", "2"], "digits stand alone"
    assert tokenizer.encode("a  1").tokens == ["a", "ĠĠ", "1"]
    config = json.loads((artifact.tokenizer_dir / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    assert (artifact.bos_token_id, artifact.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({}, [8]),
        ({"tokenizer.ggml.add_bos_token": True}, [1, 8]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1, 8, 2]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_asks(tmp_path, asked, ids):
    file = make_gguf(tmp_path / "m.gguf", metadata=asked)
    artifact = Artifact.open(build_artifact(file, tmp_path / "out"))
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    letter = tokenizer.token_to_id("a")
    assert tokenizer.encode("a").ids == [letter if x == 8 else x for x in ids]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [letter]


def test_words_are_taken_whole_where_the_vocabulary_says_so(tmp_path):
    file = make_gguf(tmp_path / "m.gguf", pre="llama-bpe")
    artifact = Artifact.open(build_artifact(file, tmp_path / "out"))
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.encode("12").tokens[-1] == "12"
    assert tokenizer.encode("12").ids[0] == 1, "this vocabulary begins with bos by default"


def test_an_unknown_splitting_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"'martian'\) that is not known"):
        build_artifact(make_gguf(tmp_path / "m.gguf", pre="martian"), tmp_path / "out")


def test_end_of_turn_ends_an_answer_too(tmp_path):
    file = make_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 0})
    assert Artifact.open(build_artifact(file, tmp_path / "out")).eos_token_ids == (2, 0)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"split.count": 2}, "one of several parts"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count 8"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"tokenizer.ggml.unknown_token_id": 999}, "no token of its vocabulary"),
        ({"general.alignment": 7}, "alignment is 7"),
    ],
)
def test_variants_that_we_do_not_run_are_refused_by_name(tmp_path, metadata, reason):
    file = make_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ArtifactError, match=reason):
        build_artifact(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_with_the_list(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match="'mamba' is not supported; supported are llama, "):
        build_artifact(tmp_path / "m.gguf", tmp_path / "out")


def header(num_tensors: int, num_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def key(name: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + rest


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"GGML" + bytes(99), "no GGUF file", id="magic"),
        pytest.param(header(0, 0, version=1) + bytes(9), "version 1", id="old"),
        pytest.param(header(0, 0, version=3 << 24) + bytes(9), "little-endian", id="big-endian"),
        pytest.param(header(HUGE, 0), "claims 4611686018427387904 tensors", id="tensors"),
        pytest.param(header(0, HUGE), "claims 4611686018427387904 keys", id="keys"),
        pytest.param(
            header(0, 1, struct.pack("<Q", HUGE) + bytes(99)), "name claims", id="key name"
        ),
        pytest.param(
            header(0, 1, key(b"a", struct.pack("<IQ", 8, HUGE)) + bytes(9)),
            "cut short",
            id="string",
        ),
        pytest.param(
            header(0, 1, key(b"a", struct.pack("<IIQ", 9, 8, HUGE))), "strings", id="strings"
        ),
        pytest.param(
            header(0, 1, key(b"a", struct.pack("<IIQ", 9, 12, HUGE))), "array items", id="array"
        ),
        pytest.param(
            header(0, 1, key(b"a", struct.pack("<IIQ", 9, 9, 1)) + bytes(9)),
            "items of unknown type 9",
            id="nested arrays",
        ),
        pytest.param(
            header(0, 1, key(b"a", struct.pack("<IQ", 77, 1))), "unknown type 77", id="value type"
        ),
        pytest.param(
            header(0, 2, key(b"a", struct.pack("<II", 4, 1)) * 2), "occurs twice", id="twice"
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<I", 9)) + bytes(99)), "9 dimensions", id="dims"
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)) + bytes(99)),
            "lies at",
            id="shape",
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<IQIQ", 1, 8, 0, HUGE)) + bytes(99)),
            "lies at",
            id="offset",
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<IQIQ", 1, 0, 0, 0)) + bytes(99)),
            "lies at",
            id="no values",
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<IQIQ", 1, 8, 9999, 0)) + bytes(99)),
            "type 9999",
            id="number type",
        ),
        pytest.param(
            header(1, 0, key(b"t", struct.pack("<IQIQ", 1, 31, 8, 0)) + bytes(99)),
            "rows that do not fit",
            id="ragged blocks",
        ),
        pytest.param(
            header(
                2,
                0,
                b"".join(key(x, struct.pack("<IQIQ", 1, 8, 0, 0)) for x in (b"t", b"u"))
                + bytes(99),
            ),
            "overlap",
            id="overlap",
        ),
    ],
)
def test_a_hostile_file_is_refused_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason):
        read_gguf(file)


@pytest.mark.slow
def test_random_damage_gives_an_artifact_error_or_a_model(tmp_path):
    """Cuts anywhere, flips in the metadata and the tensor table: nothing else may come out."""
    rng = random.Random(11)
    good = make_gguf(tmp_path / "good.gguf", "llama", Q8_0).read_bytes()
    tables = good.index(b"blk.1.ffn_norm.weight") + 100
    refused = 0
    for trial in range(120):
        content = bytearray(good)
        if trial % 3 == 0:
            content = content[: rng.randrange(len(content))]
        else:
            for _ in range(rng.choice([1, 1, 4])):
                content[rng.randrange(tables)] ^= 1 << rng.randrange(8)
        file = tmp_path / "bad.gguf"
        file.write_bytes(content)
        out = tmp_path / f"out{trial}"
        try:
            build_artifact(file, out)
            Artifact.open(out, verify=True)
        except ArtifactError:
            refused += 1
            assert not out.exists(), f"trial {trial} left something"
    assert refused > 40


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    file = make_gguf(tmp_path / "m.gguf", "llama", F32)
    stored = read_gguf(file).tensors["blk.0.ffn_down.weight"]
    offset = stored.data.ctypes.data - stored.data.base.ctypes.data
    del stored
    with file.open("r+b") as handle:
        handle.seek(offset)
        handle.write(struct.pack("<f", bad))
    for weights in ("fp32", "bf16", "int8", "int4"):
        with pytest.raises(ArtifactError, match=r"'layers\.0\.down' .*not finite"):
            build_artifact(file, tmp_path / "out", weights=weights)
