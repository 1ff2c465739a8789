"""`artifact.json`: its fields, written in one way and read with every field checked."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact.layout import check_config, tensor_shapes
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.sizes import (
    ALIGNMENT,
    FLOAT_DTYPES,
    MATRIX_DTYPES,
    VECTOR,
    WEIGHT_TYPES,
    cols_multiple,
    matrix_nbytes,
)

FORMAT_VERSION = 6
MAGIC = b"FURIOSA1"
HEADER_NBYTES = 4096
MANIFEST_NAME = "artifact.json"
WEIGHTS_NAME = "weights.bin"
TOKENIZER_DIR = "tokenizer"

MAX_MANIFEST_NBYTES = 16 << 20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of the tensor table: what it is and where it lies in `weights.bin`."""

    dtype: str  # of MATRIX_DTYPES, or vector
    rows: int
    cols: int
    has_min: bool
    rotated: bool
    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of `artifact.json`. `artifact_id` is derived from everything else in it."""

    config: ModelConfig
    weights: str
    tensors: dict[str, TensorEntry]
    weights_nbytes: int
    tokenizer: dict[str, str]  # file name -> sha256
    bos_token_id: int | None
    eos_token_ids: list[int]
    generation: dict[str, Any]
    source: dict[str, str]
    tensor_parallel_size: int = 1

    @property
    def artifact_id(self) -> str:
        return _id_of(self._fields())

    def to_json(self) -> bytes:
        known = self._fields()
        text = json.dumps({"artifact_id": _id_of(known)} | known, indent=1, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read and check. Raises: ArtifactError with what is wrong, whatever the bytes are."""
        try:
            loaded = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except RecursionError:
            raise ArtifactError("artifact.json is nested too deeply") from None
        except ValueError as error:
            raise ArtifactError(f"artifact.json is not valid JSON: {error}") from None
        table = _take(loaded, dict, "artifact.json")
        version = table.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"the artifact has format_version {version!r} and this release reads "
                f"{FORMAT_VERSION} only: build it again from its source"
            )
        manifest = cls(
            config=_read_config(_field(table, "model", dict)),
            weights=_field(table, "weights", str),
            tensors={
                name: _read_entry(name, entry)
                for name, entry in _field(table, "tensors", dict).items()
            },
            weights_nbytes=_field(table, "weights_nbytes", int),
            tokenizer=_read_tokenizer(_field(table, "tokenizer", dict)),
            bos_token_id=_read_token_id(table.get("bos_token_id")),
            eos_token_ids=[_take_token_id(x) for x in _field(table, "eos_token_ids", list)],
            generation=_field(table, "generation", dict),
            source=_field(table, "source", dict),
            tensor_parallel_size=_field(table, "tensor_parallel_size", int),
        )
        manifest._check()
        stored = _field(table, "artifact_id", str)
        known = {key: value for key, value in table.items() if key != "artifact_id"}
        try:
            belongs = stored == _id_of(known)
        except (ValueError, RecursionError):  # a number like 1e999; brackets by the thousand
            belongs = False
        if not belongs:
            raise ArtifactError(
                f"artifact.json was changed after it was written: its artifact_id {stored[:40]!r} "
                "does not belong to its contents"
            )
        return manifest

    def _fields(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.config),
            "weights": self.weights,
            "weights_nbytes": self.weights_nbytes,
            "tokenizer": self.tokenizer,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "generation": self.generation,
            "source": self.source,
            "tensor_parallel_size": self.tensor_parallel_size,
            "tensors": {name: asdict(entry) for name, entry in self.tensors.items()},
        }

    def _check(self) -> None:
        """What can be checked without the files: shapes, names, sizes and places."""
        check_config(self.config)
        if self.weights not in WEIGHT_TYPES:
            raise ArtifactError(
                f"the artifact's weights are {self.weights[:40]!r}; known are "
                f"{', '.join(WEIGHT_TYPES)}"
            )
        if not 1 <= self.tensor_parallel_size <= 1024:
            raise ArtifactError(
                f"tensor_parallel_size is {self.tensor_parallel_size}; it must be 1 to 1024"
            )
        vocab_size = self.config.vocab_size
        for token_id in [self.bos_token_id, *self.eos_token_ids]:
            if token_id is not None and token_id >= vocab_size:
                raise ArtifactError(f"token id {token_id} is outside the vocabulary ({vocab_size})")
        self._check_shapes()
        self._check_places()

    def _check_shapes(self) -> None:
        shapes = tensor_shapes(self.config)
        if missing := shapes.keys() - self.tensors.keys():
            raise ArtifactError(f"tensor {min(missing)!r} is missing from the artifact")
        if extra := self.tensors.keys() - shapes.keys():
            raise ArtifactError(f"tensor {min(extra)[:80]!r} is not part of this model")
        for name, shape in shapes.items():
            entry = self.tensors[name]
            if (entry.rows, entry.cols) != (shape.rows, shape.cols):
                raise ArtifactError(
                    f"tensor {name!r} is {entry.rows} x {entry.cols} and the model's config makes "
                    f"it {shape.rows} x {shape.cols}"
                )
            if (entry.dtype == VECTOR) != shape.is_vector:
                raise ArtifactError(f"tensor {name!r} cannot have dtype {entry.dtype!r}")
            if entry.nbytes != entry_nbytes(entry):
                raise ArtifactError(
                    f"tensor {name!r} has {entry.nbytes} bytes and its shape makes it "
                    f"{entry_nbytes(entry)}"
                )

    def _check_places(self) -> None:
        end = HEADER_NBYTES
        for name, entry in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if entry.offset % ALIGNMENT or entry.offset < end:
                raise ArtifactError(
                    f"tensor {name!r} at offset {entry.offset} is misplaced: it must lie at a "
                    f"multiple of {ALIGNMENT} after what comes before it, which ends at {end}"
                )
            end = entry.offset + entry.nbytes
            if end > self.weights_nbytes:
                raise ArtifactError(
                    f"tensor {name!r} ends at {end}, beyond the {self.weights_nbytes} bytes of "
                    f"{WEIGHTS_NAME}"
                )


def weights_header(artifact_id: str) -> bytes:
    """The first page of `weights.bin`."""
    return (MAGIC + artifact_id.encode()).ljust(HEADER_NBYTES, b"\0")


def entry_nbytes(entry: TensorEntry) -> int:
    """The bytes that an entry's dtype and shape take."""
    if entry.dtype == VECTOR:
        return entry.cols * 4
    return matrix_nbytes(entry.rows, entry.cols, entry.dtype, entry.has_min, entry.rotated)


def _id_of(known: dict[str, Any]) -> str:
    canonical = json.dumps(known, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _read_config(table: dict[str, Any]) -> ModelConfig:
    kinds: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
    known = {field.name: kinds[str(field.type)] for field in fields(ModelConfig)}
    if unknown := table.keys() - known.keys():
        raise ArtifactError(f"artifact.json: model has an unknown field {min(unknown)[:80]!r}")
    return ModelConfig(**{name: _field(table, name, kind) for name, kind in known.items()})


def _read_entry(name: str, value: Any) -> TensorEntry:
    table = _take(value, dict, f"tensor {name[:80]!r}")
    entry = TensorEntry(
        dtype=_field(table, "dtype", str),
        rows=_field(table, "rows", int),
        cols=_field(table, "cols", int),
        has_min=_field(table, "has_min", bool),
        rotated=_field(table, "rotated", bool),
        offset=_field(table, "offset", int),
        nbytes=_field(table, "nbytes", int),
        sha256=_take_digest(table.get("sha256"), name),
    )
    if entry.dtype not in (*MATRIX_DTYPES, VECTOR):
        raise ArtifactError(f"tensor {name[:80]!r} has an unknown dtype {entry.dtype[:40]!r}")
    if entry.dtype != VECTOR and entry.cols % cols_multiple(entry.dtype):
        raise ArtifactError(f"tensor {name[:80]!r}: {entry.cols} columns cannot be {entry.dtype}")
    if entry.has_min and entry.dtype != "int4":
        raise ArtifactError(f"tensor {name[:80]!r} is {entry.dtype}: only int4 can have mins")
    if entry.rotated and entry.dtype in (*FLOAT_DTYPES, VECTOR):
        raise ArtifactError(f"tensor {name[:80]!r} is {entry.dtype}: only integers can be rotated")
    return entry


def _read_tokenizer(table: dict[str, Any]) -> dict[str, str]:
    for name in table:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ArtifactError(f"tokenizer file {name[:80]!r} is not a plain file name")
    return {name: _take_digest(digest, name) for name, digest in table.items()}


def _read_token_id(value: Any) -> int | None:
    return None if value is None else _take_token_id(value)


def _take_token_id(value: Any) -> int:
    token_id: int = _take(value, int, "a token id")
    return token_id


def _take_digest(value: Any, name: str) -> str:
    digest: str = _take(value, str, f"the sha256 of {name[:80]!r}")
    if len(digest) != 64 or not _HEX.issuperset(digest):
        raise ArtifactError(f"the sha256 of {name[:80]!r} is not 64 hex digits")
    return digest


def _field(table: dict[str, Any], name: str, kind: type) -> Any:
    if name not in table:
        raise ArtifactError(f"artifact.json: field {name!r} is missing")
    return _take(table[name], kind, f"field {name!r}")


def _take(value: Any, kind: type, what: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not kind:
        raise ArtifactError(
            f"artifact.json: {what} is a {type(value).__name__}, not a {kind.__name__}"
        )
    if type(value) is int and not 0 <= value < 1 << 62:
        raise ArtifactError(f"artifact.json: {what} is out of range")
    if type(value) is float and not math.isfinite(value):
        raise ArtifactError(f"artifact.json: {what} is not finite")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
