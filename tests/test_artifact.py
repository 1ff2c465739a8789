"""An artifact opens only if its table and files agree; a build leaves a whole one or nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_models import ARCHITECTURES, make_checkpoint, tiny_artifact

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact import writer as writer_module
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.build import build_artifact
from furiosa_llm.workers.artifact.layout import tensor_shapes


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """An artifact that tests copy before they damage it."""
    return tiny_artifact(tmp_path_factory.mktemp("built"), "llama", "int8").path


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def change(path: Path, edit) -> None:
    manifest = json.loads((path / "artifact.json").read_text())
    edit(manifest)
    (path / "artifact.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_builds_in_every_weight_type(tmp_path, architecture, weights):
    artifact = tiny_artifact(tmp_path, architecture, weights)
    artifact.verify()
    assert artifact.weights == weights
    assert artifact.names == tuple(tensor_shapes(artifact.config))
    for name in artifact.names:
        tensor = artifact.tensor(name)
        assert tensor.data.ctypes.data % 64 == 0
        assert not tensor.data.flags.writeable
        if tensor.dtype == "vector":
            assert np.isfinite(artifact.vector(name)).all()
        elif name in ("embed", "lm_head") and weights == "int4":
            assert tensor.dtype == ("int6" if tensor.cols % 64 == 0 else "int8")
        elif weights == "int4" and tensor.cols % 64 == 0:
            assert tensor.dtype == "nested4"
        else:
            assert tensor.dtype == weights


def test_an_opened_artifact_tells_what_it_is(built):
    artifact = Artifact.open(built, verify=True)
    assert artifact.path == built
    assert len(artifact.artifact_id) == 32
    assert (artifact.bos_token_id, artifact.eos_token_ids) == (1, (2,))
    assert artifact.generation == {"temperature": 0.7, "top_k": 40}
    assert artifact.source["kind"] == "hf"
    assert artifact.tensor_parallel_size == 1
    assert artifact.weights_nbytes == (built / "weights.bin").stat().st_size
    assert (artifact.tokenizer_dir / "tokenizer.json").is_file()
    address = artifact.tensor("embed").data.ctypes.data
    assert artifact.tensor("embed").data.ctypes.data == address


def test_the_same_source_gives_the_same_artifact(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    first = build_artifact(checkpoint, tmp_path / "first", weights="int4")
    second = build_artifact(checkpoint, tmp_path / "second", weights="int4")
    for name in ("artifact.json", "weights.bin"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_opening_imports_nothing_heavy():
    code = (
        "import sys, furiosa_llm.workers.artifact.artifact\n"
        "heavy = {'gguf', 'transformers', 'tokenizers', 'safetensors', 'jinja2', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")


DAMAGE = {
    "another version": (lambda m: m.update(format_version=3), "format_version 3"),
    "no version": (lambda m: m.pop("format_version"), "format_version None"),
    "another config": (lambda m: m["model"].update(hidden_size=32), "makes it"),
    "a quietly changed config": (lambda m: m["model"].update(rms_norm_eps=2e-5), "was changed"),
    "config out of range": (lambda m: m["model"].update(num_layers=10**9), "num_layers"),
    "odd heads": (lambda m: m["model"].update(num_kv_heads=3), "evenly"),
    "a missing tensor": (lambda m: m["tensors"].pop("layers.1.o"), "'layers.1.o' is missing"),
    "a tensor too many": (
        lambda m: m["tensors"].update(extra=m["tensors"]["embed"]), "not part of this model",
    ),
    "another shape": (lambda m: m["tensors"]["layers.0.o"].update(rows=32), "makes it 64 x 64"),
    "another dtype": (lambda m: m["tensors"]["embed"].update(dtype="fp64"), "unknown dtype"),
    "a matrix as vector": (lambda m: m["tensors"]["embed"].update(dtype="vector"), "rotated"),
    "wrong size": (lambda m: m["tensors"]["embed"].update(nbytes=64), "has 64 bytes"),
    "rotated floats": (
        lambda m: m["tensors"]["layers.0.attn_norm"].update(rotated=True),
        "only integers can be rotated",
    ),
    "mins in int8": (lambda m: m["tensors"]["embed"].update(has_min=True), "only int4"),
    "beyond the end": (
        lambda m: m["tensors"]["lm_head"].update(offset=1 << 40), "beyond the",
    ),
    "inside the header": (lambda m: m["tensors"]["embed"].update(offset=0), "misplaced"),
    "unaligned": (
        lambda m: m["tensors"]["lm_head"].update(offset=m["tensors"]["lm_head"]["offset"] + 1),
        "misplaced",
    ),
    "overlapping": (
        lambda m: m["tensors"]["layers.1.o"].update(offset=m["tensors"]["layers.0.o"]["offset"]),
        "misplaced",
    ),
    "negative": (lambda m: m["tensors"]["embed"].update(offset=-64), "out of range"),
    "not a number": (lambda m: m["tensors"]["embed"].update(offset="0"), "not a int"),
    "a bool for a number": (lambda m: m["tensors"]["embed"].update(rows=True), "not a int"),
    "a path for a file": (
        lambda m: m["tokenizer"].update({"../x": "0" * 64}), "not a plain file name",
    ),
    "an eos outside": (lambda m: m.update(eos_token_ids=[384]), "outside the vocabulary"),
    "a bad digest": (lambda m: m["tensors"]["embed"].update(sha256="zz"), "64 hex digits"),
    "another size of weights.bin": (lambda m: m.update(weights_nbytes=1 << 30), "was changed"),
    "an absurd generation": (lambda m: m.update(generation={"x": 1e999}), "not a JSON number"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_table_is_refused_with_the_reason(copy, case):
    edit, reason = DAMAGE[case]
    change(copy, edit)
    with pytest.raises(ArtifactError, match=reason):
        Artifact.open(copy)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b'{"a": 1, "a": 2}', "occurs twice", id="duplicate key"),
        pytest.param(b"[]", "not a dict", id="no object"),
        pytest.param(b'{"format_version": 6}', "'model' is missing", id="bare"),
        pytest.param(b" " * (17 << 20), "larger than", id="huge"),
        pytest.param(b"\xff\xfe\x00", "not valid JSON", id="no text"),
        pytest.param(b"1" * 10_000, "not valid JSON", id="endless number"),
    ],
)
def test_a_hostile_manifest_is_refused(copy, text, reason):
    (copy / "artifact.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=reason):
        Artifact.open(copy)


def test_missing_short_and_swapped_files_are_refused(copy, tmp_path):
    with pytest.raises(ArtifactError, match="no such directory"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"no artifact\.json"):
        Artifact.open(tmp_path)
    weights = copy / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="cut short or swapped"):
        Artifact.open(copy)
    other = tiny_artifact(tmp_path, "llama", "int8", seed=1)
    shutil.copy(other.path / "weights.bin", weights)
    with pytest.raises(ArtifactError, match="does not belong"):
        Artifact.open(copy)
    weights.unlink()
    os.mkfifo(weights)  # opening it for reading would wait for a writer for ever
    with pytest.raises(ArtifactError, match=r"no weights\.bin"):
        Artifact.open(copy)


def test_verify_finds_one_flipped_bit_and_opening_does_not_look(copy):
    artifact = Artifact.open(copy)
    offset = artifact._manifest.tensors["layers.1.down"].offset
    with (copy / "weights.bin").open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)[0]
        file.seek(offset + 5)
        file.write(bytes([byte ^ 1]))
    Artifact.open(copy)
    with pytest.raises(ArtifactError, match=r"'layers\.1\.down' is damaged"):
        Artifact.open(copy, verify=True)


def test_verify_finds_a_changed_tokenizer(copy):
    (copy / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json"):
        Artifact.open(copy, verify=True)


def test_no_flip_or_cut_of_the_manifest_passes(copy):
    """Random damage gives ArtifactError, or (in white space, say) the very same artifact."""
    rng = random.Random(5)
    file = copy / "artifact.json"
    good, artifact_id = file.read_bytes(), Artifact.open(copy).artifact_id
    refused = 0
    for _ in range(300):
        text = bytearray(good)
        if rng.random() < 0.3:
            text = text[: rng.randrange(len(text))]
        else:
            text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        file.write_bytes(text)
        try:
            assert Artifact.open(copy).artifact_id == artifact_id
        except ArtifactError:
            refused += 1
    assert refused > 200


def test_an_existing_target_is_refused_and_left_alone(copy, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    before = (copy / "artifact.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"an artifact at .* already"):
        build_artifact(checkpoint, copy)
    assert (copy / "artifact.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="something at"):
        build_artifact(checkpoint, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    Artifact.open(build_artifact(checkpoint, tmp_path / "empty"), verify=True)


@pytest.mark.slow  # it imports transformers
def test_a_failed_build_leaves_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        build_artifact(checkpoint, tmp_path / "out" / "artifact")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, code):
    checkpoint = make_checkpoint(tmp_path / "model")

    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        build_artifact(checkpoint, tmp_path / "out" / "artifact")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_build_leaves_nothing_that_loads_and_the_next_one_cleans_up(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    out = tmp_path / "out" / "artifact"
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from furiosa_llm.workers.artifact.build import build_artifact\n"
        "die = lambda what, done, total: os.kill(os.getpid(), 9) if done > total / 2 else None\n"
        "build_artifact(sys.argv[1], Path(sys.argv[2]), progress=die)"
    )
    run = subprocess.run([sys.executable, "-c", code, checkpoint, out], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    with pytest.raises(ArtifactError, match="no artifact"):
        Artifact.open(left)
    build_artifact(checkpoint, out)
    assert [x.name for x in out.parent.iterdir()] == ["artifact"]


def test_two_builds_of_one_target_at_once_both_succeed(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    out = tmp_path / "artifact"
    barrier = threading.Barrier(2, timeout=60)
    done = []

    def build():
        def wait(what, values, total):
            if values == total:  # both are about to rename
                barrier.wait()

        done.append(build_artifact(checkpoint, out, progress=wait))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [out, out]
    Artifact.open(out, verify=True)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["artifact", "model"]


def test_a_model_too_large_is_refused_with_the_sum(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"MiB of weights \+ .* = .* and 10 MiB are available"):
        build_artifact(checkpoint, tmp_path / "out", available_memory=lambda: 10 << 20)
    assert not (tmp_path / "out").exists()


def test_unknown_weights_are_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match="'fp8' is unknown; choose auto, fp32"):
        build_artifact(make_checkpoint(tmp_path / "m"), tmp_path / "out", weights="fp8")


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    build_artifact(
        make_checkpoint(tmp_path / "m"), tmp_path / "out", progress=lambda *x: calls.append(x)
    )
    assert [x[1] for x in calls] == sorted(x[1] for x in calls)
    assert calls[-1][1] == calls[-1][2] > 0


def test_columns_that_are_not_whole_groups_stay_floats(tmp_path):
    artifact = tiny_artifact(tmp_path, "llama", "int8", intermediate_size=80)
    assert artifact.tensor("layers.0.down").dtype == "fp32"
    assert artifact.tensor("layers.0.gate_up").dtype == "int8"
    half = tiny_artifact(tmp_path, "llama", "int4", intermediate_size=80, dtype="BF16")
    assert half.tensor("layers.0.down").dtype == "bf16"


def test_slicing_does_not_show_in_the_result(tmp_path, monkeypatch):
    from furiosa_llm.workers.artifact import build as build_module

    checkpoint = make_checkpoint(tmp_path / "model")
    whole = build_artifact(checkpoint, tmp_path / "whole", weights="int8")
    monkeypatch.setattr(build_module, "_SLICE_VALUES", 64 * 16)
    sliced = build_artifact(checkpoint, tmp_path / "sliced", weights="int8")
    assert (whole / "weights.bin").read_bytes() == (sliced / "weights.bin").read_bytes()
    artifact = Artifact.open(sliced)
    qkv = artifact.tensor("layers.0.qkv")
    assert qkv.unpack().shape == (128, 64)
