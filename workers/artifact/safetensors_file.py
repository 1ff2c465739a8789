"""Reads safetensors files without copying, every offset checked against the file before use.

The safetensors package has no bfloat16 for numpy; the format is a JSON header and raw bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.source import StoredTensor

_ITEM_NBYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_NBYTES = 100_000_000  # the format's own limit


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map a file and list its tensors.

    Raises: ArtifactError with the reason if the file is damaged or of an unknown number type.
    """
    try:
        return _read(path)
    except (OSError, ArtifactError) as error:
        raise ArtifactError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ArtifactError("there is no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ArtifactError(f"it has {size} bytes, too few for a safetensors file")
        (header_nbytes,) = struct.unpack("<Q", start)
        if header_nbytes > min(size - 8, _MAX_HEADER_NBYTES):
            raise ArtifactError(
                f"its header claims {header_nbytes} bytes and the file has {size}: it was cut "
                "short, or is no safetensors file"
            )
        text = file.read(header_nbytes)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise ArtifactError("its header is not a JSON object")
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r")[8 + header_nbytes :] if header else np.empty(0, np.uint8)
    tensors = {}
    places = []
    for name, entry in header.items():
        encoding, shape, begin, end = _check_entry(name, entry, len(data))
        places.append((begin, end, name))
        tensors[name] = StoredTensor(name, encoding, shape, data[begin:end])
    places.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(places):
        if begin < end:
            raise ArtifactError(f"tensors {name[:80]!r} and {other[:80]!r} overlap")
    return tensors


def _check_entry(name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ArtifactError(f"tensor {name[:80]!r} is not described by a JSON object")
    encoding: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(encoding, str) or encoding not in _ITEM_NBYTES:
        raise ArtifactError(
            f"tensor {name[:80]!r} has number type {str(encoding)[:40]!r}; supported are "
            f"{', '.join(_ITEM_NBYTES)}"
        )
    if not _are_counts(shape) or len(shape) > 8:
        raise ArtifactError(f"tensor {name[:80]!r} has a malformed shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ArtifactError(f"tensor {name[:80]!r} has malformed offsets")
    begin, end = offsets
    if not begin <= end <= size:
        raise ArtifactError(
            f"tensor {name[:80]!r} lies at {begin}..{end} of {size} bytes: the file was cut short "
            "or damaged"
        )
    if math.prod(shape) * _ITEM_NBYTES[encoding] != end - begin:
        raise ArtifactError(f"tensor {name[:80]!r}: its shape does not fit its {end - begin} bytes")
    return encoding, tuple(shape), begin, end


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 62 for x in value)
