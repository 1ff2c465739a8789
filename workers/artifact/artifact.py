"""A built model, opened: its config, and its weights mapped read-only and shared.

Opening reads `artifact.json` and one page of `weights.bin`; the rest comes in through the page
cache as the kernels touch it, one copy for all workers of a machine. This module is on the way up
of every worker, which needs numpy anyway, and of the front-end, which asks for no tensor and does
without numpy.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.manifest import (
    HEADER_NBYTES,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    TOKENIZER_DIR,
    WEIGHTS_NAME,
    Manifest,
    weights_header,
)
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.sizes import VECTOR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HASH_CHUNK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A packed matrix (or a vector) in the map. See docs/artifact-format.md for the bytes."""

    dtype: str  # of MATRIX_DTYPES, or vector
    rows: int
    cols: int
    has_min: bool  # int4 only
    rotated: bool  # integers only: see rotation.py
    data: NDArray[np.uint8]  # 1-D, read-only; its address holds while the artifact lives

    def unpack(self) -> NDArray[np.float32]:
        """A matrix's values, (rows, cols) float32, a new array."""
        from furiosa_llm.workers.artifact.packing import unpack_matrix

        return unpack_matrix(
            self.data, self.rows, self.cols, self.dtype, self.has_min, self.rotated
        )


class Artifact:
    """An opened artifact directory; make one with `Artifact.open`.

    Attributes:
        path: the directory.
        artifact_id: 32 hex digits that stand for its whole content.
        config: the model's shape.
        weights: the type of the matrices: fp32, bf16, int8 or int4.
        names: the tensors, in the order of the file.
        weights_nbytes: the size of `weights.bin`.
        tokenizer_dir: the directory of the tokenizer's files.
        bos_token_id, eos_token_ids: as the source's files say.
        generation: the source's generation defaults, such as temperature.
        source: {"kind": hf or gguf, "name": the name of the directory or file}.
        tensor_parallel_size: the default.
    """

    def __init__(self, path: Path, manifest: Manifest, mapped: mmap.mmap) -> None:
        self.path = path
        self.config: ModelConfig = manifest.config
        self.artifact_id = manifest.artifact_id
        self.weights = manifest.weights
        self.names = tuple(sorted(manifest.tensors, key=lambda n: manifest.tensors[n].offset))
        self.weights_nbytes = manifest.weights_nbytes
        self.tokenizer_dir = path / TOKENIZER_DIR
        self.bos_token_id = manifest.bos_token_id
        self.eos_token_ids = tuple(manifest.eos_token_ids)
        self.generation: dict[str, Any] = manifest.generation
        self.source = manifest.source
        self.tensor_parallel_size = manifest.tensor_parallel_size
        self._manifest = manifest
        self._mapped = mapped  # read-only

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Artifact:
        """Open the artifact at `path`, every place and shape in it checked.

        Args:
            path: an artifact directory.
            verify: also read all of it and compare every sha256.
        Raises: ArtifactError with the reason if anything is missing, damaged or contradictory.
        """
        path = Path(path)
        try:
            manifest = Manifest.from_json(_read_manifest(path))
            mapped = _map_weights(path / WEIGHTS_NAME, manifest)
        except OSError as error:
            reason = error.strerror or error
            raise ArtifactError(f"cannot open the artifact {path}: {reason}") from None
        except ArtifactError as error:
            raise ArtifactError(f"cannot open the artifact {path}: {error}") from None
        artifact = cls(path, manifest, mapped)
        if verify:
            artifact.verify()
        return artifact

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, its data a view into the map. Raises: KeyError if unknown."""
        import numpy as np

        entry = self._manifest.tensors[name]
        data = np.frombuffer(self._mapped, np.uint8, count=entry.nbytes, offset=entry.offset)
        return Tensor(entry.dtype, entry.rows, entry.cols, entry.has_min, entry.rotated, data)

    def vector(self, name: str) -> NDArray[np.float32]:
        """The vector of this name, (cols,) float32, a read-only view into the map."""
        import numpy as np

        tensor = self.tensor(name)
        assert tensor.dtype == VECTOR, f"{name} is a matrix"
        return tensor.data.view(np.float32)

    def verify(self) -> None:
        """Read everything and compare it with its sha256. Raises: ArtifactError naming the part."""
        for name in self.names:
            digest = hashlib.sha256(self.tensor(name).data.data).hexdigest()
            if digest != self._manifest.tensors[name].sha256:
                raise ArtifactError(
                    f"{self.path}: tensor {name!r} is damaged (its sha256 differs): build the "
                    "artifact again"
                )
        for name, expected in self._manifest.tokenizer.items():
            if _sha256_of(self.tokenizer_dir / name) != expected:
                raise ArtifactError(f"{self.path}: tokenizer file {name!r} is missing or changed")


def is_artifact(path: Path) -> bool:
    """Whether `path` looks like an artifact directory; `Artifact.open` tells whether it is one."""
    return (path / MANIFEST_NAME).is_file()


def _read_manifest(path: Path) -> bytes:
    if not path.is_dir():
        raise ArtifactError("there is no such directory")
    manifest = path / MANIFEST_NAME
    if not manifest.is_file():
        raise ArtifactError(f"it has no {MANIFEST_NAME}, so it is no artifact")
    with manifest.open("rb") as file:
        text = file.read(MAX_MANIFEST_NBYTES + 1)
    if len(text) > MAX_MANIFEST_NBYTES:
        raise ArtifactError(f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_NBYTES} bytes")
    return text


def _map_weights(path: Path, manifest: Manifest) -> mmap.mmap:
    if not path.is_file():  # also keeps a FIFO from blocking the open
        raise ArtifactError(f"it has no {WEIGHTS_NAME}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != manifest.weights_nbytes or size < HEADER_NBYTES:
            raise ArtifactError(
                f"{WEIGHTS_NAME} has {size} bytes and should have {manifest.weights_nbytes}: it "
                "was cut short or swapped"
            )
        header = file.read(HEADER_NBYTES)
        if header != weights_header(manifest.artifact_id):
            raise ArtifactError(
                f"{WEIGHTS_NAME} does not belong to this {MANIFEST_NAME}: its header differs"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # In huge pages a decode step reads its weights a seventh faster. Pages that are cached already
    # stay as they are, and a system that has no huge pages for files says no: both are fine.
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _sha256_of(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_NBYTES):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
