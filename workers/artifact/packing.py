"""Packed matrices: rows in panels of 16, interleaved as docs/artifact-format.md lays down.

Everything here works on whole panels, so a matrix may be packed in slices of rows (each but the
last a multiple of 16) and the slices joined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact.quantize import QuantizedRows, quantize
from furiosa_llm.workers.artifact.sizes import (
    FLOAT_DTYPES,
    GROUP,
    PANEL_ROWS,
    cols_multiple,
    panel_nbytes,
    scale_group,
)

Bytes = NDArray[np.uint8]


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def from_bf16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns as the float32 values that they are."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_matrix(values: NDArray[np.float32], dtype: str, *, rotated: bool = True) -> Bytes:
    """Convert and pack a matrix.

    Args:
        values: (rows, cols) float32; cols a multiple of `cols_multiple(dtype)`.
        dtype: fp32, bf16, or one of `quantize`.
        rotated: of the integer ones, whether groups are rotated before (see `quantize`).
    Returns: 1-D uint8 of `matrix_nbytes(rows, cols, dtype)` bytes, a new array.
    Raises: ValueError for values that the dtype cannot hold (see `quantize`).
    """
    cols = values.shape[1]
    _check_cols(cols, dtype)
    if dtype not in FLOAT_DTYPES:
        values = np.ascontiguousarray(values, np.float32)
        return pack_quantized(quantize(values, dtype, rotated=rotated))
    panels = _in_panels(np.asarray(values, dtype=np.float32))
    if dtype == "fp32":
        return _join([panels.transpose(0, 2, 1)], panel_nbytes(cols, dtype))
    halves = to_bf16(panels).reshape(len(panels), PANEL_ROWS, cols // 2, 2)
    return _join([halves.transpose(0, 2, 1, 3)], panel_nbytes(cols, dtype))


def pack_quantized(blocks: QuantizedRows) -> Bytes:
    """Pack integers and scales as they are. Returns 1-D uint8, as `pack_matrix` does."""
    cols, dtype = blocks.q.shape[1], blocks.dtype
    _check_cols(cols, dtype)
    panels = _in_panels((blocks.q + 32).view(np.uint8) if dtype == "int6" else blocks.q)
    # (panels, groups, quads, rows, 4)
    quads = panels.reshape(len(panels), PANEL_ROWS, cols // GROUP, 8, 4).transpose(0, 2, 3, 1, 4)
    if dtype == "int6":
        quads = _in_six_bits(quads)
    elif dtype != "int8":  # quad j low, quad j + 4 high
        quads = quads[:, :, :4] | (quads[:, :, 4:] << 4)
    parts = [quads, _in_panels(blocks.scales).transpose(0, 2, 1)]
    if blocks.mins is not None:
        parts.append(_in_panels(blocks.mins).transpose(0, 2, 1))
    if blocks.factors is not None and blocks.shifts is not None:
        pairs = (len(panels), PANEL_ROWS, cols // (2 * GROUP), 2)
        parts.append(_in_panels(blocks.shifts).reshape(pairs).transpose(0, 2, 1, 3))
        factors = _in_panels(blocks.factors).reshape(pairs).transpose(0, 2, 1, 3)
        parts.append(factors[..., 0] | (factors[..., 1] << 4))
    return _join(parts, panel_nbytes(cols, dtype, blocks.mins is not None, blocks.rotated))


def unpack_quantized(
    data: Bytes,
    rows: int,
    cols: int,
    dtype: str,
    has_min: bool = False,
    rotated: bool = False,
) -> QuantizedRows:
    """The inverse of `pack_quantized`; new arrays."""
    num_scales = cols // scale_group(cols, dtype, rotated)
    num_panels = -(-rows // PANEL_ROWS)
    panels = data.reshape(num_panels, -1)
    data_nbytes = PANEL_ROWS * {"int8": cols, "int6": cols * 3 // 4}.get(dtype, cols // 2)
    scales_nbytes = num_scales * PANEL_ROWS * 2
    quads = panels[:, :data_nbytes].reshape(num_panels, cols // GROUP, -1, PANEL_ROWS, 4)
    if dtype == "int6":
        quads = _from_six_bits(quads) - np.uint8(32)
    elif dtype != "int8":
        quads = np.concatenate([quads & 15, quads >> 4], axis=2)
    q = quads.transpose(0, 3, 1, 2, 4).reshape(-1, cols)[:rows]

    def halves(start: int) -> NDArray[np.float16]:
        raw = np.ascontiguousarray(panels[:, start : start + scales_nbytes]).view(np.float16)
        wide = raw.reshape(num_panels, num_scales, PANEL_ROWS).transpose(0, 2, 1)
        return wide.reshape(-1, num_scales)[:rows]

    scales = halves(data_nbytes)
    if dtype == "nested4":
        num_pairs = cols // (2 * GROUP)
        shifts, both = np.split(
            panels[:, data_nbytes + scales_nbytes :][:, : num_pairs * PANEL_ROWS * 3],
            [num_pairs * PANEL_ROWS * 2],
            axis=1,
        )
        shifts = shifts.reshape(num_panels, num_pairs, PANEL_ROWS, 2)
        both = both.reshape(num_panels, num_pairs, PANEL_ROWS, 1)
        factors = np.concatenate([both & 15, both >> 4], axis=3)

        def by_row(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return pairs.transpose(0, 2, 1, 3).reshape(-1, 2 * num_pairs)[:rows]

        return QuantizedRows(
            q,
            scales,
            rotated=rotated,
            factors=by_row(factors),
            shifts=by_row(shifts).view(np.int8),
        )
    mins = halves(data_nbytes + scales_nbytes) if has_min else None
    if dtype == "int6":
        return QuantizedRows(q.view(np.int8), scales, rotated=rotated, bits=6)
    return QuantizedRows(q.view(np.int8) if dtype == "int8" else q, scales, mins, rotated)


def unpack_matrix(
    data: Bytes,
    rows: int,
    cols: int,
    dtype: str,
    has_min: bool = False,
    rotated: bool = False,
) -> NDArray[np.float32]:
    """The values of a packed matrix, (rows, cols) float32: the inverse of `pack_matrix`."""
    if dtype not in FLOAT_DTYPES:
        return unpack_quantized(data, rows, cols, dtype, has_min, rotated).dequantize()
    num_panels = -(-rows // PANEL_ROWS)
    panels = data.reshape(num_panels, panel_nbytes(cols, dtype))
    if dtype == "fp32":
        wide = np.ascontiguousarray(panels).view(np.float32).reshape(num_panels, cols, PANEL_ROWS)
        return wide.transpose(0, 2, 1).reshape(-1, cols)[:rows]
    used = np.ascontiguousarray(panels[:, : cols * PANEL_ROWS * 2]).view(np.uint16)
    pairs = used.reshape(num_panels, cols // 2, PANEL_ROWS, 2).transpose(0, 2, 1, 3)
    return from_bf16(pairs.reshape(-1, cols)[:rows])


def _in_six_bits(quads: NDArray[Any]) -> NDArray[Any]:
    """Eight quads of values of 6 bits (panels, groups, 8, ...) as six of bytes: of each four, the
    last one's bits are the upper two of the other three.
    """
    fours = quads.reshape(*quads.shape[:2], 2, 4, *quads.shape[3:])
    last = fours[:, :, :, 3]
    upper = np.stack([last << 6, last >> 2 << 6, last >> 4 << 6], axis=3)
    return (fours[:, :, :, :3] | upper).reshape(*quads.shape[:2], 6, *quads.shape[3:])


def _from_six_bits(quads: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `_in_six_bits`."""
    threes = quads.reshape(*quads.shape[:2], 2, 3, *quads.shape[3:])
    upper = threes >> 6
    last = upper[:, :, :, :1] | upper[:, :, :, 1:2] << 2 | upper[:, :, :, 2:] << 4
    eight = np.concatenate([threes & 63, last], axis=3)
    return eight.reshape(*quads.shape[:2], 8, *quads.shape[3:])


def _check_cols(cols: int, dtype: str) -> None:
    assert cols % cols_multiple(dtype) == 0, f"{cols} columns cannot be {dtype}"


def _in_panels(rows: NDArray[Any]) -> NDArray[Any]:
    """(rows, n) as (panels, 16, n), the last panel padded with zero rows."""
    missing = -len(rows) % PANEL_ROWS
    if missing:
        rows = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
    return rows.reshape(-1, PANEL_ROWS, rows.shape[1])


def _join(parts: list[NDArray[Any]], panel_size: int) -> Bytes:
    """Panels whose bytes are each part's in turn, padded to the panel's size."""
    num_panels = len(parts[0])
    packed = np.zeros((num_panels, panel_size), np.uint8)
    start = 0
    for part in parts:
        raw = np.ascontiguousarray(part).view(np.uint8).reshape(num_panels, -1)
        packed[:, start : start + raw.shape[1]] = raw
        start += raw.shape[1]
    return packed.reshape(-1)
