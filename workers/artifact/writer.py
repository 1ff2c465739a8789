"""Writes an artifact: in a temporary directory beside its place, renamed when it is whole.

`artifact.json` is written last and the rename is atomic, so whatever kills a build leaves nothing
that loads. A building directory holds a lock while its process lives; the next build of the same
target removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.artifact import Artifact, is_artifact
from furiosa_llm.workers.artifact.manifest import (
    HEADER_NBYTES,
    MANIFEST_NAME,
    TOKENIZER_DIR,
    WEIGHTS_NAME,
    Manifest,
    TensorEntry,
    entry_nbytes,
    weights_header,
)
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.sizes import ALIGNMENT, VECTOR


class ArtifactWriter:
    """A context manager: add the tensors, put the tokenizer's files in place, `finish`.

    Leaving it without `finish` removes everything that was written.

    Attributes:
        tokenizer_dir: where the tokenizer's files go before `finish`.
    Raises: ArtifactError if the target exists (an empty directory may), or cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._tensors: dict[str, TensorEntry] = {}
        self._finished = False
        with self._disk_errors():
            _refuse_existing(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            prefix = _building_prefix(target)
            self._directory = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            self.tokenizer_dir = self._directory / TOKENIZER_DIR
            self.tokenizer_dir.mkdir()
            # Locked before it has the name by which `_remove_abandoned` looks for it.
            unlocked = self._directory / f"{WEIGHTS_NAME}.new"
            self._weights = unlocked.open("xb")
            fcntl.flock(self._weights, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(self._directory / WEIGHTS_NAME)
            self._weights.write(bytes(HEADER_NBYTES))

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._finished:
            with contextlib.suppress(OSError):  # a full disk may refuse the last flush, too
                self._weights.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    def add_vector(self, name: str, values: NDArray[np.float32]) -> None:
        """Append a vector, (cols,)."""
        packed = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
        self._add(name, VECTOR, 1, len(values), [packed])

    def add_matrix(
        self,
        name: str,
        rows: int,
        cols: int,
        dtype: str,
        panels: Iterable[NDArray[np.uint8]],
        *,
        has_min: bool = False,
        rotated: bool = False,
    ) -> None:
        """Append a packed matrix that comes in slices of whole panels."""
        self._add(name, dtype, rows, cols, panels, has_min, rotated)

    def finish(
        self,
        *,
        config: ModelConfig,
        weights: str,
        bos_token_id: int | None,
        eos_token_ids: list[int],
        generation: dict[str, Any],
        source: dict[str, str],
    ) -> Path:
        """Complete the artifact and give it its name. Returns: the target.

        If another process has put the identical artifact there meanwhile, that one stays.
        """
        with self._disk_errors():
            manifest = Manifest(
                config=config,
                weights=weights,
                tensors=self._tensors,
                weights_nbytes=self._weights.tell(),
                tokenizer=_hash_and_sync(self.tokenizer_dir),
                bos_token_id=bos_token_id,
                eos_token_ids=eos_token_ids,
                generation=generation,
                source=source,
            )
            Manifest.from_json(manifest.to_json())  # what this writes, every reader accepts
            self._weights.seek(0)
            self._weights.write(weights_header(manifest.artifact_id))
            self._weights.flush()
            os.fsync(self._weights.fileno())
            # What was written in pieces is cached in small pages; read anew, it comes in huge ones.
            os.posix_fadvise(self._weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with (self._directory / MANIFEST_NAME).open("xb") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            self._directory.chmod(0o777 & ~_umask())  # mkdtemp makes it 0700
            _sync_directory(self._directory)
            self._rename(manifest.artifact_id)
            self._weights.close()
            return self._target

    def _rename(self, artifact_id: str) -> None:
        try:
            self._directory.rename(self._target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if not is_artifact(self._target):
                raise ArtifactError(f"{self._target} appeared while it was being built") from None
            if Artifact.open(self._target).artifact_id != artifact_id:
                raise ArtifactError(
                    f"another artifact appeared at {self._target} while this one was being built"
                ) from None
            return  # the same, from another process; ours is removed on the way out
        self._finished = True
        _sync_directory(self._target.parent)

    def _add(
        self,
        name: str,
        dtype: str,
        rows: int,
        cols: int,
        slices: Iterable[NDArray[np.uint8]],
        has_min: bool = False,
        rotated: bool = False,
    ) -> None:
        assert name not in self._tensors, f"tensor {name} was added twice"
        digest = hashlib.sha256()
        with self._disk_errors():
            self._weights.write(bytes(-self._weights.tell() % ALIGNMENT))
            offset = self._weights.tell()
        for piece in slices:  # outside the guard: what reads the source has errors of its own
            with self._disk_errors():
                self._weights.write(piece.data)
            digest.update(piece.data)
        nbytes = self._weights.tell() - offset
        entry = TensorEntry(dtype, rows, cols, has_min, rotated, offset, nbytes, digest.hexdigest())
        assert nbytes == entry_nbytes(entry), f"tensor {name}: {nbytes} bytes were packed"
        self._tensors[name] = entry

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ArtifactError(
                    f"the disk is full: {self._target} could not be written ({error.strerror}); "
                    "free some space or choose another place (--cache-dir)"
                ) from error
            raise ArtifactError(f"cannot write the artifact {self._target}: {error}") from error


def _refuse_existing(target: Path) -> None:
    if target.is_symlink() or target.exists():
        if target.is_dir() and not any(target.iterdir()):
            return
        kind = "an artifact" if is_artifact(target) else "something"
        raise ArtifactError(
            f"there is {kind} at {target} already: remove it or choose another place"
        )


def _building_prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _remove_abandoned(target: Path) -> None:
    """Remove what killed builds of this target left: directories whose lock nobody holds."""
    for directory in target.parent.glob(f"{_glob_escape(_building_prefix(target))}*"):
        try:
            with (directory / WEIGHTS_NAME).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # it lives, or has only just begun
        shutil.rmtree(directory, ignore_errors=True)


def _glob_escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _hash_and_sync(directory: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    _sync_directory(directory)
    return digests


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
