"""Builds an artifact from a model source: chooses each matrix's type, packs it, writes it.

Matrices stream through in slices of rows, so that a build needs little memory whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError
from furiosa_llm.workers.artifact import gguf_model, hf
from furiosa_llm.workers.artifact.encodings import PRECISIONS, precision_of
from furiosa_llm.workers.artifact.layout import tensor_shapes
from furiosa_llm.workers.artifact.memory import available_memory_bytes
from furiosa_llm.workers.artifact.packing import pack_matrix, pack_quantized
from furiosa_llm.workers.artifact.quantize import QuantizedRows, should_rotate
from furiosa_llm.workers.artifact.sizes import (
    FLOAT_DTYPES,
    PANEL_ROWS,
    WEIGHT_TYPES,
    cols_multiple,
    matrix_nbytes,
    weight_type,
)
from furiosa_llm.workers.artifact.source import ModelSource, SourceMatrix
from furiosa_llm.workers.artifact.writer import ArtifactWriter

# Raised when the same source would be built into something else, so that caches build it anew.
BUILDER_VERSION = 5

WEIGHT_CHOICES = ("auto", *WEIGHT_TYPES)

# (what is being done, bytes or files done, of how many)
Progress = Callable[[str, int, int], None]

_SAMPLE_ROWS = 64
_SLICE_VALUES = 2 << 20
# A slice is held as float32 and, while it is quantised, as a dozen arrays of that size.
_WORKING_NBYTES = _SLICE_VALUES * 4 * 12


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """How one matrix of the artifact will be stored."""

    dtype: str
    has_min: bool = False
    is_exact: bool = False  # the stored integers are taken over as they are


def build_artifact(
    source: str | Path,
    out: Path,
    *,
    weights: str = "auto",
    progress: Progress | None = None,
    available_memory: Callable[[], int | None] = available_memory_bytes,
) -> Path:
    """Build the model at `source` into a new artifact directory `out`.

    Args:
        source: a checkpoint directory or a .gguf file.
        weights: the type of the matrices; `auto` keeps the source's own precision.
        progress: called with ("packing", values done, values in all) as the build goes on.
        available_memory: bytes that this machine can still give; None if it cannot be known.
    Returns: `out`.
    Raises: ArtifactError if the source is damaged or not supported, does not fit in memory, `out`
        exists, or the disk is full. Nothing is left behind then.
    """
    return write_artifact(
        read_source(Path(source)),
        out,
        weights=weights,
        progress=progress,
        available_memory=available_memory,
    )


def read_source(path: Path) -> ModelSource:
    """Open a checkpoint directory or a GGUF file. Raises: ArtifactError."""
    try:
        if path.is_dir():
            if not hf.is_checkpoint(path):
                raise ArtifactError(f"{path} is no checkpoint directory: it has no config.json")
            return hf.read_checkpoint(path)
        return gguf_model.read_gguf_model(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def write_artifact(
    source: ModelSource,
    out: Path,
    *,
    weights: str = "auto",
    progress: Progress | None = None,
    available_memory: Callable[[], int | None] = available_memory_bytes,
) -> Path:
    """`build_artifact` for a source that is open already."""
    if weights not in WEIGHT_CHOICES:
        raise ArtifactError(f"weights {weights!r} is unknown; choose {', '.join(WEIGHT_CHOICES)}")
    plans = {name: plan_matrix(name, parts, weights) for name, parts in source.matrices.items()}
    _check_memory(source, plans, available_memory())
    num_values = sum(part.rows * part.cols for parts in source.matrices.values() for part in parts)
    num_done = 0
    with ArtifactWriter(out) as writer:
        source.write_tokenizer(writer.tokenizer_dir)
        for name, shape in tensor_shapes(source.config).items():
            if shape.is_vector:
                writer.add_vector(name, source.vectors[name])
                continue
            plan = plans[name]
            rotated = _is_rotated(name, source.matrices[name], plan)
            panels = _packed_slices(name, source.matrices[name], plan, rotated)
            writer.add_matrix(
                name,
                shape.rows,
                shape.cols,
                plan.dtype,
                panels,
                has_min=plan.has_min,
                rotated=rotated,
            )
            num_done += shape.rows * shape.cols
            if progress is not None:
                progress("packing", num_done, num_values)
        return writer.finish(
            config=source.config,
            weights=_main_dtype(source, plans) if weights == "auto" else weights,
            bos_token_id=source.bos_token_id,
            eos_token_ids=source.eos_token_ids,
            generation=source.generation,
            source={"kind": source.kind, "name": source.name},
        )


def plan_matrix(name: str, parts: list[SourceMatrix], weights: str) -> MatrixPlan:
    """Choose how to store a matrix.

    `auto` takes the widest of its parts' own precisions. With int4 the embedding and the LM head
    are int6, or int8 where that has no room: most of what int4 costs in quality it would cost
    there. Columns that are not whole groups keep a float type.
    """
    own = max((precision_of(part.encoding) for part in parts), key=PRECISIONS.index)
    dtype = own if weights == "auto" else weights
    if weights == "int4" and name in ("embed", "lm_head"):
        dtype = "int6" if parts[0].cols % cols_multiple("int6") == 0 else "int8"
    if dtype in ("int8", "int4") and parts[0].cols % cols_multiple(dtype):
        dtype = own if own in FLOAT_DTYPES else "bf16"
    if parts[0].cols % cols_multiple(dtype):
        dtype = "fp32"
    kept = {"int8": {"Q8_0"}, "int4": {"Q4_0", "Q4_1"}}.get(dtype, set())
    encodings = {part.encoding for part in parts}
    is_exact = encodings <= kept
    if dtype == "int4" and not is_exact and parts[0].cols % cols_multiple("nested4") == 0:
        dtype = "nested4"
    return MatrixPlan(dtype, is_exact and "Q4_1" in encodings, is_exact)


def _is_rotated(name: str, parts: list[SourceMatrix], plan: MatrixPlan) -> bool:
    """Whether to rotate the matrix before it is quantised, judged by some rows of each part."""
    if plan.is_exact or plan.dtype in FLOAT_DTYPES:
        return False
    rows = [part.values(0, min(_SAMPLE_ROWS, part.rows)) for part in parts]
    try:
        return should_rotate(np.concatenate(rows), plan.dtype)
    except ValueError as error:
        raise _cannot_become(name, plan.dtype, error) from None


def _cannot_become(name: str, dtype: str, error: ValueError) -> ArtifactError:
    return ArtifactError(f"tensor {name!r} cannot become {dtype}: {error}")


def _packed_slices(
    name: str, parts: list[SourceMatrix], plan: MatrixPlan, rotated: bool
) -> Iterator[NDArray[np.uint8]]:
    """The matrix's panels, a slice of rows at a time."""
    rows, cols = sum(part.rows for part in parts), parts[0].cols
    step = max(_SLICE_VALUES // cols // PANEL_ROWS, 1) * PANEL_ROWS
    for start in range(0, rows, step):
        pieces = list(_pieces(parts, start, min(start + step, rows)))
        try:
            if plan.is_exact:
                yield pack_quantized(_join_blocks(pieces, plan.has_min))
            else:
                values = np.concatenate([part.values(*piece) for part, piece in pieces])
                if not np.isfinite(values).all():
                    raise ValueError("it holds values that are not finite (NaN or infinity)")
                yield pack_matrix(values, plan.dtype, rotated=rotated)
        except ValueError as error:
            raise _cannot_become(name, plan.dtype, error) from None


def _pieces(
    parts: list[SourceMatrix], start: int, stop: int
) -> Iterator[tuple[SourceMatrix, tuple[int, int]]]:
    """Which rows of which parts make up rows [start, stop) of the fused matrix."""
    first = 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, part.rows)
        if low < high:
            yield part, (low, high)
        first += part.rows


def _join_blocks(
    pieces: list[tuple[SourceMatrix, tuple[int, int]]], has_min: bool
) -> QuantizedRows:
    blocks = []
    for part, piece in pieces:
        block = part.blocks(*piece)
        assert block is not None, f"{part.name} is {part.encoding}"
        blocks.append(block.with_mins() if has_min else block)
    scales = np.concatenate([x.scales for x in blocks])
    mins = np.concatenate([x.mins for x in blocks if x.mins is not None]) if has_min else None
    for numbers in (scales, mins):
        if numbers is not None and not np.isfinite(numbers).all():
            raise ValueError("it holds scales that are not finite (NaN or infinity)")
    return QuantizedRows(np.concatenate([x.q for x in blocks]), scales, mins)


def _main_dtype(source: ModelSource, plans: dict[str, MatrixPlan]) -> str:
    """The type that most values of the layers have."""
    num_values = dict.fromkeys(WEIGHT_TYPES, 0)
    for name, parts in source.matrices.items():
        if name.startswith("layers."):
            num_values[weight_type(plans[name].dtype)] += sum(p.rows * p.cols for p in parts)
    return max(WEIGHT_TYPES, key=num_values.__getitem__)


def _check_memory(source: ModelSource, plans: dict[str, MatrixPlan], available: int | None) -> None:
    """Refuse a model whose weights, mapped, would not fit beside the build's own arrays."""
    weights = sum(
        matrix_nbytes(sum(part.rows for part in parts), parts[0].cols, plan.dtype, plan.has_min)
        for parts, plan in ((source.matrices[name], plan) for name, plan in plans.items())
    )
    needed = weights + _WORKING_NBYTES
    if available is not None and needed > available:
        raise ArtifactError(
            f"{source.name} does not fit in memory: {_mib(weights)} of weights + "
            f"{_mib(_WORKING_NBYTES)} to work with = {_mib(needed)}, and {_mib(available)} are "
            "available; choose narrower weights (--weights int8 or int4) or a smaller model"
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
