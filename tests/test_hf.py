"""Hugging Face checkpoints: every family is read exactly, other variants are refused by name."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import ARCHITECTURES, config_of, make_checkpoint, random_weights, tiny_artifact
from tokenizers import Tokenizer

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.build import build_artifact, read_source
from furiosa_llm.workers.artifact.hf import read_checkpoint
from furiosa_llm.workers.artifact.packing import from_bf16, to_bf16
from furiosa_llm.workers.artifact.rope import inverse_frequencies
from furiosa_llm.workers.artifact.safetensors_file import read_safetensors


def matrix_of(artifact: Artifact, name: str) -> np.ndarray:
    tensor = artifact.tensor(name)
    return tensor.unpack()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_where_it_belongs(tmp_path, architecture):
    weights = random_weights(config_of(architecture))
    artifact = tiny_artifact(tmp_path, architecture, "fp32")
    np.testing.assert_array_equal(
        matrix_of(artifact, "embed"), weights["model.embed_tokens.weight"]
    )
    assert artifact.config.tied_embeddings == ("lm_head" not in artifact.names)
    if not artifact.config.tied_embeddings:
        np.testing.assert_array_equal(matrix_of(artifact, "lm_head"), weights["lm_head.weight"])
    np.testing.assert_array_equal(artifact.vector("final_norm"), weights["model.norm.weight"])
    for index in range(artifact.config.num_layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        for name, parts in {
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "o": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }.items():
            expected = np.concatenate([weights[f"{theirs}{part}.weight"] for part in parts])
            np.testing.assert_array_equal(matrix_of(artifact, ours + name), expected)
        for name, part in (("attn_norm", "input"), ("ffn_norm", "post_attention")):
            expected = weights[f"{theirs}{part}_layernorm.weight"]
            np.testing.assert_array_equal(artifact.vector(ours + name), expected)
        if artifact.config.attention_bias:
            biases = [weights[f"{theirs}self_attn.{x}_proj.bias"] for x in "qkv"]
            np.testing.assert_array_equal(
                artifact.vector(ours + "qkv_bias"), np.concatenate(biases)
            )
        if artifact.config.qk_norm:
            for part in ("q_norm", "k_norm"):
                expected = weights[f"{theirs}self_attn.{part}.weight"]
                np.testing.assert_array_equal(artifact.vector(ours + part), expected)


@pytest.mark.parametrize(("dtype", "weights"), [("F32", "fp32"), ("F16", "bf16"), ("BF16", "bf16")])
def test_auto_keeps_the_precision_of_the_checkpoint(tmp_path, dtype, weights):
    artifact = tiny_artifact(tmp_path, "llama", "auto", dtype=dtype)
    assert artifact.weights == weights
    expected = random_weights(config_of("llama"))["lm_head.weight"]
    if dtype == "F16":
        expected = expected.astype(np.float16).astype(np.float32)
    if weights == "bf16":
        expected = from_bf16(to_bf16(expected))
    np.testing.assert_array_equal(matrix_of(artifact, "lm_head"), expected)


def test_shards_are_the_same_model(tmp_path):
    whole = tiny_artifact(tmp_path, "qwen2", "int8")
    shards = tiny_artifact(tmp_path, "qwen2", "int8", num_shards=3)
    assert [whole.tensor(x).data.tobytes() for x in whole.names] == [
        shards.tensor(x).data.tobytes() for x in shards.names
    ]


def test_our_reader_agrees_with_the_safetensors_package(tmp_path):
    weights = random_weights(config_of("llama"))
    save_file(weights, tmp_path / "x.safetensors")
    ours, theirs = (
        read_safetensors(tmp_path / "x.safetensors"),
        load_file(tmp_path / "x.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert (ours[name].encoding, ours[name].shape) == ("F32", values.shape)
        assert ours[name].data.tobytes() == values.tobytes()


def test_the_tokenizer_is_copied_whole(tmp_path):
    artifact = tiny_artifact(tmp_path, "llama", "fp32")
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    text = "The quick fox: naïve 漢字 🙂\n\t  x"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((artifact.tokenizer_dir / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in config["chat_template"]
    assert not list(artifact.tokenizer_dir.glob("*.safetensors"))


@pytest.mark.slow  # it imports transformers
def test_a_tokenizer_without_its_json_is_converted(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model", "qwen2")
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(x if isinstance(x, str) else " ".join(x) for x in model["merges"])
    (checkpoint / "merges.txt").write_text("#version: 0.2\n" + merges)
    (checkpoint / "tokenizer.json").unlink()
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    artifact = Artifact.open(build_artifact(checkpoint, tmp_path / "out"))
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("The quick fox").ids) == "The quick fox"


@pytest.mark.parametrize(
    ("generation", "bos", "eos"),
    [
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, 3, (4, 5)),
        ({"eos_token_id": 4}, 1, (4,)),
        ({}, 1, (2,)),
        (None, 1, (2,)),
    ],
)
def test_special_ids_come_from_generation_config_then_config(tmp_path, generation, bos, eos):
    checkpoint = make_checkpoint(tmp_path / "model")
    if generation is None:
        (checkpoint / "generation_config.json").unlink()
    else:
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    artifact = Artifact.open(build_artifact(checkpoint, tmp_path / "out"))
    assert (artifact.bos_token_id, artifact.eos_token_ids) == (bos, eos)


@pytest.mark.parametrize(
    ("architecture", "changes", "window"),
    [
        ("mistral", {}, 16),
        ("mistral", {"sliding_window": None}, 0),
        ("mistral", {"sliding_window": 256}, 0),
        ("llama", {"sliding_window": 16}, 0),
        ("qwen2", {}, 0),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, 0),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 128),
        ("mistral", {"layer_types": ["full_attention"] * 3}, 0),
    ],
)
def test_the_sliding_window_is_the_one_that_applies(tmp_path, architecture, changes, window):
    checkpoint = make_checkpoint(tmp_path / "model", architecture, **changes)
    assert read_checkpoint(checkpoint).config.sliding_window == window


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}},
    ],
)
def test_both_spellings_of_rope_parameters_are_read(tmp_path, changes):
    source = read_checkpoint(make_checkpoint(tmp_path / "model", **changes))
    expected = 5e5 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(source.vectors["rope_inv_freq"], expected, rtol=1e-7)


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configs_as_transformers_writes_them_are_read(tmp_path, architecture):
    from transformers import AutoConfig

    ours = make_checkpoint(tmp_path / "ours", architecture)
    theirs = Path(shutil.copytree(ours, tmp_path / "theirs"))
    AutoConfig.from_pretrained(ours).save_pretrained(theirs)
    assert (theirs / "config.json").read_text() != (ours / "config.json").read_text()
    expected, source = read_checkpoint(ours), read_checkpoint(theirs)
    assert source.config == expected.config
    np.testing.assert_array_equal(
        source.vectors["rope_inv_freq"], expected.vectors["rope_inv_freq"]
    )


def test_linear_and_llama3_scaling():
    plain = inverse_frequencies(64, 10000.0, {})
    linear = inverse_frequencies(64, 10000.0, {"type": "linear", "factor": 4})
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    scaling = {
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = inverse_frequencies(128, 500000.0, scaling)
    plain = inverse_frequencies(128, 500000.0, {})
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert 20 < short.sum() < 60
    assert long.sum() > 20
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(scaled) < 0).all()


UNSUPPORTED = {
    "architecture": ({"architectures": ["MambaForCausalLM"]}, "supported are LlamaForCausalLM, "),
    "no architecture": ({"architectures": None}, "'None' is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not read"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not"),
    "rope by layer": ({"rope_parameters": {"full": {"rope_theta": 1e4}}}, "differ by layer"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "positive number"),
    "rope nothing": ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    "rope theta": ({"rope_theta": 0}, "rope_theta is 0"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "mixed windows": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
         "max_window_layers": 1}, "starts at layer 1",
    ),
    "missing field": ({"hidden_size": None}, "hidden_size is missing"),
    "a float for a count": ({"num_hidden_layers": 2.0}, "must be an integer"),
    "a bool for a count": ({"num_hidden_layers": True}, "must be an integer"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "absurd": ({"num_hidden_layers": 10**12}, "num_layers is 1000000000000"),
    "another shape": ({"intermediate_size": 64}, r"gate_proj\.weight' has shape \[96, 64\]"),
    "more layers than tensors": ({"num_hidden_layers": 3}, "is missing"),
    "fewer layers than tensors": ({"num_hidden_layers": 1}, "does not have"),
    "eos": ({"eos_token_id": "two"}, "eos_token_id must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_we_do_not_run_is_refused_by_name(tmp_path, case):
    changes, reason = UNSUPPORTED[case]
    checkpoint = make_checkpoint(tmp_path / "model")
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(ArtifactError, match=reason):
        build_artifact(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_no_kernel_adds_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    weights = random_weights(config_of("llama"))
    weights["model.layers.0.self_attn.o_proj.bias"] = np.ones(64, np.float32)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"o_proj\.bias"):
        build_artifact(checkpoint, tmp_path / "out")


def test_files_that_are_not_there_are_named(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model", num_shards=2)
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (checkpoint / name).unlink()
        with pytest.raises(ArtifactError, match=r"no such file|neither"):
            build_artifact(checkpoint, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        read_source(tmp_path)
    (checkpoint / "config.json").write_text("[1")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_source(checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\0b", "..", 5, ["x"], {}])
def test_an_index_cannot_reach_outside(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path / "model", num_shards=2)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ArtifactError, match=r"not a plain file name|no such file"):
        read_source(checkpoint)


def safetensors(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "too few", id="empty"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"{}", "claims", id="header beyond the end"),
        pytest.param(safetensors(b"\xff"), "not valid JSON", id="no text"),
        pytest.param(safetensors(b"[" * 50_000), "not valid JSON", id="deep"),
        pytest.param(safetensors([]), "not a JSON object", id="no object"),
        pytest.param(safetensors({"x": 3}), "not described", id="no entry"),
        pytest.param(safetensors({"x": entry("F8_E4M3")}), "'F8_E4M3'; supported", id="dtype"),
        pytest.param(safetensors({"x": entry([])}), "number type", id="dtype no string"),
        pytest.param(safetensors({"x": entry(shape=[-4])}), "malformed shape", id="negative"),
        pytest.param(safetensors({"x": entry(shape="4")}), "malformed shape", id="shape no list"),
        pytest.param(safetensors({"x": entry(shape=[1 << 70])}), "malformed shape", id="huge"),
        pytest.param(safetensors({"x": entry(offsets=[0])}), "malformed offsets", id="offsets"),
        pytest.param(safetensors({"x": entry(offsets=[0, 80])}), "lies at 0..80", id="beyond"),
        pytest.param(safetensors({"x": entry(offsets=[16, 0])}), "lies at", id="backwards"),
        pytest.param(safetensors({"x": entry(shape=[5])}), "does not fit its 16", id="shape"),
        pytest.param(
            safetensors({"x": entry(), "y": entry(offsets=[8, 24])}), "overlap", id="overlap"
        ),
    ],
)
def test_a_hostile_safetensors_file_is_refused(tmp_path, content, reason):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason):
        read_safetensors(file)


def test_random_damage_gives_an_artifact_error_or_a_model(tmp_path):
    rng = random.Random(23)
    checkpoint = make_checkpoint(tmp_path / "model")
    file = checkpoint / "model.safetensors"
    good = file.read_bytes()
    header_nbytes = 8 + struct.unpack("<Q", good[:8])[0]
    refused = 0
    for trial in range(120):
        content = bytearray(good)
        if trial % 3 == 0:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(header_nbytes)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        out = tmp_path / "out"
        try:
            build_artifact(checkpoint, out)
            Artifact.open(out, verify=True)
            shutil.rmtree(out)
        except ArtifactError:
            refused += 1
            assert not out.exists()
    assert refused > 60


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def fuzzed_checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fuzz") / "model", "qwen2")


@pytest.mark.slow
@given(st.sampled_from([*sorted(config_of("qwen2")), "rope_scaling", "layer_types"]), json_values)
@settings(max_examples=80, deadline=None)
def test_any_value_in_config_gives_an_artifact_error_or_a_model(fuzzed_checkpoint, field, value):
    config = config_of("qwen2") | {field: value}
    (fuzzed_checkpoint / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(ArtifactError):
        read_checkpoint(fuzzed_checkpoint)
