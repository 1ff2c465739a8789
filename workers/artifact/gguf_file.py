"""Reads a GGUF file's metadata and tensor table, every count, length and offset checked first.

The file is mapped and walked once with a cursor that refuses to pass the end. A count is believed
only if as many of the smallest possible items still fit into the file, so a hostile file can make
us allocate no more than a small multiple of its own size.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.encodings import row_nbytes
from furiosa_llm.workers.artifact.source import StoredTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NAME_NBYTES = 65_535
_MIN_ENTRY_NBYTES = {"key": 8 + 4 + 1, "tensor": 8 + 4 + 8 + 4 + 8}

_STRING, _ARRAY = 8, 9
# The format's scalar types: code -> struct format.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says. Tensor shapes are in row-major order, the reverse of the file's."""

    metadata: dict[str, Any]  # scalars, str, lists of str, numpy arrays of numbers
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read all but its tensors' values.

    Raises: ArtifactError with the reason if the file is damaged, cut short or of an unknown kind.
    """
    try:
        if not path.is_file():
            raise ArtifactError("there is no such file")
        if path.stat().st_size == 0:
            raise ArtifactError("it is empty")
        return _read(_Cursor(np.memmap(path, np.uint8, "r")))
    except (OSError, ArtifactError) as error:
        raise ArtifactError(f"{path}: {error}") from None


class _Cursor:
    """A place in the file's bytes that never passes their end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.position = 0

    @property
    def num_left(self) -> int:
        return len(self.data) - self.position

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > self.num_left:
            raise ArtifactError(
                f"it was cut short or damaged: {nbytes} bytes are wanted at {self.position} and "
                f"{self.num_left} are left"
            )
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)).tobytes())[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).tobytes().decode("utf-8", errors="replace")

    def name(self) -> str:
        nbytes = self.scalar("Q")
        if nbytes > _MAX_NAME_NBYTES:
            raise ArtifactError(f"it is damaged: a name claims {nbytes} bytes")
        return self.take(nbytes).tobytes().decode("utf-8", errors="replace")

    def count(self, code: str, min_nbytes: int, what: str) -> int:
        count: int = self.scalar(code)
        if count * min_nbytes > self.num_left:
            raise ArtifactError(
                f"it was cut short or damaged: it claims {count} {what} and {self.num_left} bytes "
                "are left"
            )
        return count


def _read(cursor: _Cursor) -> GgufFile:
    if cursor.num_left < 24 or cursor.take(4).tobytes() != _MAGIC:
        raise ArtifactError("it is no GGUF file (its first bytes are not 'GGUF')")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ArtifactError(
            f"it has GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]}, "
            "little-endian, are read"
        )
    # Both counts come first; the tensors' is checked again once the metadata has been passed.
    num_tensors = cursor.count("Q", _MIN_ENTRY_NBYTES["tensor"], "tensors")
    num_keys = cursor.count("Q", _MIN_ENTRY_NBYTES["key"], "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name()
        if key in metadata:
            raise ArtifactError(f"it is damaged: key {key[:80]!r} occurs twice")
        metadata[key] = _read_value(cursor)
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise ArtifactError(f"it is damaged: its alignment is {str(alignment)[:40]}")
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(metadata, _place(entries, cursor.data, start, alignment))


def _read_value(cursor: _Cursor) -> Any:
    kind = cursor.scalar("I")
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise ArtifactError(f"it is damaged: a value has unknown type {kind}")
    item = cursor.scalar("I")
    if item == _STRING:
        return [cursor.string() for _ in range(cursor.count("Q", 8, "strings"))]
    if item not in _SCALARS:
        raise ArtifactError(f"it is damaged: an array has items of unknown type {item}")
    dtype = np.dtype("<" + _SCALARS[item]) if item != 7 else np.dtype(np.uint8)
    count = cursor.count("Q", dtype.itemsize, "array items")
    return np.frombuffer(cursor.take(count * dtype.itemsize).tobytes(), dtype)


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in row-major order, type code, offset)"""
    name = cursor.name()
    num_dimensions = cursor.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ArtifactError(f"it is damaged: tensor {name[:80]!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))[::-1]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _place(
    entries: list[tuple[str, tuple[int, ...], int, int]],
    data: NDArray[np.uint8],
    start: int,
    alignment: int,
) -> dict[str, StoredTensor]:
    from gguf import GGMLQuantizationType

    encoding_of = {kind.value: kind.name for kind in GGMLQuantizationType}
    tensors: dict[str, StoredTensor] = {}
    places = []
    for name, shape, code, offset in entries:
        encoding = encoding_of.get(code, f"type {code}")
        row = row_nbytes(encoding, shape[-1])
        if row is None:
            raise ArtifactError(
                f"tensor {name[:80]!r} ({encoding}, shape {list(shape)}) has a number type that is "
                "not supported, or rows that do not fit it"
            )
        nbytes = math.prod(shape[:-1]) * row
        if nbytes == 0 or offset % alignment or start + offset + nbytes > len(data):
            raise ArtifactError(
                f"it was cut short or damaged: tensor {name[:80]!r} lies at {start + offset}, "
                f"{nbytes} bytes long, and the file has {len(data)}"
            )
        if name in tensors:
            raise ArtifactError(f"it is damaged: tensor {name[:80]!r} occurs twice")
        begin = start + offset
        tensors[name] = StoredTensor(name, encoding, shape, data[begin : begin + nbytes])
        places.append((begin, begin + nbytes, name))
    places.sort()
    for before, after in itertools.pairwise(places):
        if before[1] > after[0]:
            raise ArtifactError(
                f"it is damaged: tensors {before[2][:80]!r} and {after[2][:80]!r} overlap"
            )
    return tensors
