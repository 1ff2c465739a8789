"""A model as its files hold it, under the artifact's names: what the readers give the builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact import encodings
from furiosa_llm.workers.artifact.layout import check_config, tensor_shapes
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.quantize import QuantizedRows


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a model file, its bounds checked, its bytes still in the file's map."""

    name: str
    encoding: str  # F32, F16, BF16, or a GGUF block type such as Q8_0
    shape: tuple[int, ...]  # the last dimension is contiguous
    data: NDArray[np.uint8]  # 1-D


@dataclass(frozen=True, slots=True)
class SourceMatrix:
    """A matrix to be read in slices of rows, or a part of one that the artifact fuses."""

    name: str
    encoding: str
    cols: int
    raw: NDArray[np.uint8]  # (rows, row_nbytes)
    row_order: NDArray[np.intp] | None = None  # where each row is in `raw`; None: in order

    @property
    def rows(self) -> int:
        return len(self.raw)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32."""
        return encodings.decode(self._slice(start, stop), self.encoding)

    def blocks(self, start: int, stop: int) -> QuantizedRows | None:
        """Rows [start, stop) as the stored integers, where the encoding is one that we keep."""
        return encodings.decode_blocks(self._slice(start, stop), self.encoding)

    def _slice(self, start: int, stop: int) -> NDArray[np.uint8]:
        return (
            self.raw[start:stop] if self.row_order is None else self.raw[self.row_order[start:stop]]
        )


@dataclass(frozen=True, slots=True)
class ModelSource:
    """All that the builder needs of a model, whatever kind of file it comes from."""

    kind: str  # hf or gguf
    name: str
    config: ModelConfig
    matrices: dict[str, list[SourceMatrix]]  # artifact's name -> the parts it fuses, in row order
    vectors: dict[str, NDArray[np.float32]]
    write_tokenizer: Callable[[Path], None]  # puts the tokenizer's files into a directory
    bos_token_id: int | None
    eos_token_ids: list[int]
    generation: dict[str, Any]


# The artifact's name (without its layer) -> the parts it fuses, under the file's names.
NameTable = Mapping[str, tuple[str, ...]]
RowOrder = Callable[[str, int], "NDArray[np.intp] | None"]  # (artifact's name, part index)


def gather(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    names: NameTable,
    *,
    ignored: frozenset[str],
    row_order: RowOrder = lambda name, part: None,
) -> tuple[dict[str, list[SourceMatrix]], dict[str, NDArray[np.float32]]]:
    """Find every tensor that the config calls for, each in its exact shape.

    Args:
        stored: the file's tensors.
        names: where each is; "{}" stands for the layer's index.
        ignored: stored tensors that the model does not need.
        row_order: where rows must be put back in order.
    Returns: the matrices as parts, the vectors as float32. `rope_inv_freq` is not among them.
    Raises: ArtifactError for one that is missing, misshapen, or left over.
    """
    check_config(config)
    left = set(stored) - ignored
    matrices: dict[str, list[SourceMatrix]] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for name, shape in tensor_shapes(config).items():
        if name == "rope_inv_freq":
            continue
        layer, _, kind = name.removeprefix("layers.").rpartition(".")
        parts = [_find(stored, part.format(layer)) for part in names[kind]]
        left.difference_update(part.name for part in parts)
        sizes = _part_sizes(config, kind, shape.cols if shape.is_vector else shape.rows)
        orders = [row_order(kind, index) for index in range(len(parts))]
        if shape.is_vector:
            vectors[name] = np.concatenate(
                [_vector(*x) for x in zip(parts, sizes, orders, strict=True)]
            )
        else:
            matrices[name] = [
                _matrix(part, size, shape.cols, order)
                for part, size, order in zip(parts, sizes, orders, strict=True)
            ]
    if left:
        raise ArtifactError(
            f"the model holds tensor {min(left)[:80]!r}, which a plain {config.architecture} does "
            "not have: this variant is not supported"
        )
    return matrices, vectors


def _find(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    if name not in stored:
        raise ArtifactError(f"tensor {name!r} is missing from the model's files")
    return stored[name]


def _part_sizes(config: ModelConfig, kind: str, size: int) -> list[int]:
    if kind in ("qkv", "qkv_bias"):
        return [config.q_size, config.kv_size, config.kv_size]
    if kind == "gate_up":
        return [config.intermediate_size, config.intermediate_size]
    return [size]


def _matrix(
    stored: StoredTensor, rows: int, cols: int, order: NDArray[np.intp] | None
) -> SourceMatrix:
    _check_shape(stored, (rows, cols))
    raw = stored.data.reshape(rows, -1)
    return SourceMatrix(stored.name, stored.encoding, cols, raw, order)


def _vector(stored: StoredTensor, size: int, order: NDArray[np.intp] | None) -> NDArray[np.float32]:
    _check_shape(stored, (size,))
    values = encodings.decode(stored.data.reshape(1, -1), stored.encoding)[0]
    if not np.isfinite(values).all():
        raise ArtifactError(f"tensor {stored.name!r} holds values that are not finite")
    ordered: NDArray[np.float32] = values if order is None else values[order]
    return ordered


def _check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise ArtifactError(
            f"tensor {stored.name!r} has shape {list(stored.shape)} and the model's config makes "
            f"it {list(expected)}"
        )
