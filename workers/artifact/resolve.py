"""From what a user calls a model to an artifact directory, building one in the cache if need be.

An artifact's own directory is the common case and comes first: what fetches, reads and builds
models (numpy and more) is imported only for the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.artifact import Artifact, is_artifact
from furiosa_llm.workers.artifact.file_lock import file_lock
from furiosa_llm.workers.artifact.manifest import FORMAT_VERSION
from furiosa_llm.workers.artifact.memory import available_memory_bytes

if TYPE_CHECKING:
    from furiosa_llm.workers.artifact.build import Progress
    from furiosa_llm.workers.artifact.known_models import Download, KnownModel


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """An artifact directory, opened.

    `temporary` is None unless the artifact was built without a cache: then it owns the directory,
    which `cleanup()` (or the end of the process) removes.
    """

    artifact: Artifact
    temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        """The artifact's directory."""
        return self.artifact.path


def resolve_model(
    model: str,
    *,
    cache_dir: Path | None,
    weights: str = "auto",
    progress: Progress | None = None,
    download: Download | None = None,
    available_memory: Callable[[], int | None] = available_memory_bytes,
) -> ResolvedModel:
    """Find or build the artifact of a model.

    Args:
        model: an artifact directory, a checkpoint directory, a .gguf file, or a known model's id.
        cache_dir: where built artifacts are kept and found again; None: in a temporary directory.
        weights: auto, fp32, bf16, int8 or int4. An artifact's weights are what they are.
        progress: see `build_artifact` and `fetch_known_model`.
        download: see `fetch_known_model`.
        available_memory: see `build_artifact`.
    Raises: ArtifactError if the model is none of these, is damaged, or does not fit.
    """
    path = Path(model).expanduser()
    if weights == "auto" and _exists(path) and is_artifact(path):
        return ResolvedModel(Artifact.open(path))

    from furiosa_llm.workers.artifact import hf
    from furiosa_llm.workers.artifact.build import WEIGHT_CHOICES, build_artifact
    from furiosa_llm.workers.artifact.known_models import fetch_known_model, find_known_model

    if weights not in WEIGHT_CHOICES:
        raise ArtifactError(f"weights {weights!r} is unknown; choose {', '.join(WEIGHT_CHOICES)}")
    known = None if _exists(path) else find_known_model(model)
    if known is None:
        if not _exists(path):
            raise _unknown(model, "there is no such file or directory")
        if is_artifact(path):
            return ResolvedModel(_open_checked(path, weights))
        if path.is_dir() and not hf.is_checkpoint(path):
            raise _unknown(model, "the directory has neither artifact.json nor config.json")

    def build(out: Path, cache: Path) -> Path:
        source = (
            path
            if known is None
            else fetch_known_model(known, cache, progress=progress, download=download)
        )
        return build_artifact(
            source, out, weights=weights, progress=progress, available_memory=available_memory
        )

    if cache_dir is None:
        temporary = tempfile.TemporaryDirectory(prefix="furiosa-serve-")
        try:
            directory = Path(temporary.name)
            return ResolvedModel(Artifact.open(build(directory / "artifact", directory)), temporary)
        except BaseException:
            temporary.cleanup()
            raise
    cache_dir = cache_dir.expanduser()
    artifacts = cache_dir / "artifacts"
    name = _cache_name(path, known, weights)
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
        with file_lock(artifacts / f".{name}.lock"):
            return ResolvedModel(_find_or_build(artifacts / name, lambda x: build(x, cache_dir)))
    except OSError as error:
        raise ArtifactError(f"the cache directory {cache_dir} cannot be used: {error}") from error


def _find_or_build(out: Path, build: Callable[[Path], Path]) -> Artifact:
    if out.exists():
        try:
            return Artifact.open(out)
        except ArtifactError:
            shutil.rmtree(out)  # it is ours, and damaged: make it anew
    return Artifact.open(build(out))


def _open_checked(path: Path, weights: str) -> Artifact:
    artifact = Artifact.open(path)
    if weights not in ("auto", artifact.weights):
        raise ArtifactError(
            f"the artifact {path} has {artifact.weights} weights, not {weights}: leave --weights "
            f"at auto, or build one with --weights {weights} from the model it was made of"
        )
    return artifact


def _cache_name(path: Path, known: KnownModel | None, weights: str) -> str:
    """Name, weight type and a fingerprint of the source: what is changed or renewed is rebuilt."""
    from furiosa_llm.workers.artifact.build import BUILDER_VERSION

    if known is not None:
        name, parts = known.name, [known.sha256]
    else:
        path = path.resolve()
        name = path.name if path.is_dir() else path.stem
        files = sorted(x for x in path.iterdir() if x.is_file()) if path.is_dir() else [path]
        parts = [str(path)]
        for file in files:
            stat = file.stat()
            parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    text = json.dumps([FORMAT_VERSION, BUILDER_VERSION, *parts])
    fingerprint = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:100].lstrip('.')}-{weights}-{fingerprint}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null byte: no path at all
        return False


def _unknown(model: str, reason: str) -> ArtifactError:
    from furiosa_llm.workers.artifact.known_models import KNOWN_MODELS

    known = ", ".join(x.name for x in KNOWN_MODELS)
    return ArtifactError(
        f"model {model[:200]!r} cannot be used: {reason}. It must be an artifact directory "
        "(artifact.json), a checkpoint directory (config.json and safetensors), a .gguf file, or "
        f"the id of a known model ({known})"
    )
