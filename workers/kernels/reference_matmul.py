"""Packed matrices for the numpy executor, unpacked once at load.

Both kinds give each row of a product the same bits however many rows are multiplied with it and
however many threads the BLAS library has. BLAS alone promises neither: its choice of kernel, and
so its order of sums, depends on the shapes. Here the shapes are fixed (`FloatMatrix`) or the sums
are exact (`QuantizedMatrix`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact.artifact import Tensor
from furiosa_llm.workers.artifact.packing import from_bf16, to_bf16, unpack_quantized
from furiosa_llm.workers.artifact.rotation import INPUTS_FACTOR, hadamard
from furiosa_llm.workers.artifact.sizes import FLOAT_DTYPES, GROUP, scale_group
from furiosa_llm.workers.executor import Float32, Int32

# One BLAS call multiplies (TILE_ROWS, at most MAX_COLS) by (PANEL_ROWS, the same) transposed. That
# is small enough for OpenBLAS to stay on one thread (8 * 16 * 2048 multiplications is its bound).
TILE_ROWS = 8
PANEL_ROWS = 16
MAX_COLS = 2048

INPUT_LEVELS = 127  # the largest of a group of quantised inputs
LEAST_SCALE = np.float32(2.0**-100)  # the inverse of less may be no float


class Matrix(Protocol):
    """W, of `rows` outputs and `cols` inputs."""

    def product(self, x: Float32) -> Float32:
        """x (n, cols) times W transposed: (n, rows) float32, a new array."""
        ...

    def take_rows(self, ids: Int32) -> Float32:
        """Rows of W, dequantised: (n, cols) float32, a new array. For embeddings."""
        ...


def load_matrix(tensor: Tensor, *, limits_pairs: bool = False) -> Matrix:
    """The matrix that an artifact's tensor holds, of whichever dtype.

    Args:
        limits_pairs: quantise the inputs of our own (rotated) int8 as the native AVX2 family does,
            which adds products up in 16 bits (see `quantize_activations`): 64 share a scale.
    """
    if tensor.dtype in FLOAT_DTYPES:
        return FloatMatrix(tensor.unpack(), rounds_inputs=tensor.dtype == "bf16")
    is_own_int8 = tensor.dtype == "int8" and tensor.rotated
    return QuantizedMatrix(tensor, limits_pairs=limits_pairs and is_own_int8)


class FloatMatrix:
    """float32 weights and activations, multiplied in tiles of one fixed shape.

    With bf16 weights, activations are rounded to bf16 too: what processors have instructions for.
    A tile is padded with zero rows. That a row's result does not depend on its place in the tile
    is how BLAS kernels are made, but nowhere promised; so it is checked at load, and where it does
    not hold the tile has one row only.
    """

    def __init__(self, weights: Float32, *, rounds_inputs: bool = False) -> None:
        rows, cols = weights.shape
        self._rounds_inputs = rounds_inputs
        num_panels = -(-rows // PANEL_ROWS)
        padded = np.zeros((num_panels * PANEL_ROWS, cols), np.float32)
        padded[:rows] = weights
        self._rows = rows
        self._panels = padded.reshape(num_panels, PANEL_ROWS, cols)
        self._tile_rows = TILE_ROWS if self._is_place_irrelevant() else 1

    def product(self, x: Float32) -> Float32:
        if self._rounds_inputs:
            x = from_bf16(to_bf16(x))
        y = np.empty((len(x), self._rows), np.float32)
        tile = np.zeros((self._tile_rows, x.shape[1]), np.float32)
        for start in range(0, len(x), self._tile_rows):
            chunk = x[start : start + self._tile_rows]
            tile[: len(chunk)] = chunk  # what is left of the last tile is not used
            y[start : start + len(chunk)] = self._tile_product(tile)[: len(chunk)]
        return y

    def take_rows(self, ids: Int32) -> Float32:
        rows: Float32 = self._panels.reshape(-1, self._panels.shape[2])[ids]
        return rows

    def _tile_product(self, tile: Float32) -> Float32:
        """(tile rows, rows). Columns beyond MAX_COLS are added piece by piece, left to right."""
        total = None
        for start in range(0, tile.shape[1], MAX_COLS):
            cols = slice(start, start + MAX_COLS)
            part = np.matmul(tile[:, cols], self._panels[:, :, cols].transpose(0, 2, 1))
            total = part if total is None else total + part
        assert total is not None
        y: Float32 = total.transpose(1, 0, 2).reshape(len(tile), -1)[:, : self._rows]
        return y

    def _is_place_irrelevant(self) -> bool:
        row = np.random.default_rng(0).standard_normal(self._panels.shape[2], np.float32)
        y = self._tile_product(np.tile(row, (TILE_ROWS, 1)))
        return bool((y == y[0]).all())


class QuantizedMatrix:
    """Groups of small integers times activations quantised the same way.

    y = sum over the groups, left to right, of (sum of q_w * q_x) * (scale_w * scale_x), and with
    mins also of min_w * (scale_x * sum of q_x); in float32. The inner sums stay below
    192 * 128 * 127 < 2^24, so float32 holds them exactly and BLAS may add in any order.
    Where the weights are rotated, x is rotated before it is quantised.
    """

    def __init__(self, tensor: Tensor, *, limits_pairs: bool = False) -> None:
        blocks = unpack_quantized(
            tensor.data, tensor.rows, tensor.cols, tensor.dtype, tensor.has_min, tensor.rotated
        )
        self._rotated = tensor.rotated
        self._limits_pairs = limits_pairs
        scale = scale_group(tensor.cols, tensor.dtype, tensor.rotated)
        self._group = min(scale, 2 * GROUP) if limits_pairs else scale
        per_scale = scale // self._group
        integers = blocks.integers().reshape(tensor.rows, -1, self._group)
        q = integers.transpose(1, 0, 2).astype(np.float32)
        if blocks.dtype == "int4" and blocks.mins is None:
            q -= 8
        self._q = np.ascontiguousarray(q)  # (groups, rows, group)
        self._scales = _by_group(blocks.scales.repeat(per_scale, axis=1))  # (groups, rows, 1)
        self._mins = None if blocks.mins is None else _by_group(blocks.mins)

    def product(self, x: Float32) -> Float32:
        # Tiles only bound the memory that the inner sums take.
        tiles = [self._tile_product(x[i : i + TILE_ROWS]) for i in range(0, len(x), TILE_ROWS)]
        return np.concatenate(tiles) if tiles else np.empty((0, self._q.shape[1]), np.float32)

    def take_rows(self, ids: Int32) -> Float32:
        q = self._q[:, ids] * self._scales[:, ids]
        if self._mins is not None:
            q += self._mins[:, ids]
        rows = q.transpose(1, 0, 2).reshape(len(ids), -1)
        return hadamard(rows) * INPUTS_FACTOR if self._rotated else rows

    def _tile_product(self, x: Float32) -> Float32:
        rotated = hadamard(x) if self._rotated else x
        q, scales = quantize_activations(rotated, self._group, limits_pairs=self._limits_pairs)
        if self._rotated:
            scales *= INPUTS_FACTOR
        dots = np.matmul(self._q, q.transpose(1, 2, 0))  # (groups, rows, n)
        total = np.zeros(dots.shape[1:], np.float32)
        for group in range(len(dots)):
            scale_x = scales[:, group]
            total += dots[group] * (self._scales[group] * scale_x)
            if self._mins is not None:
                total += self._mins[group] * (scale_x * q[:, group].sum(axis=1))
        return np.ascontiguousarray(total.T)


def quantize_activations(
    x: Float32, group: int = GROUP, *, limits_pairs: bool = False
) -> tuple[Float32, Float32]:
    """Quantise each row in groups: scale = max|x| / 127, q = x * (127 / max|x|).

    Args:
        x: (n, cols) float32, cols a multiple of `group`.
        group: see `scale_group`.
        limits_pairs: the largest |a| + |b| of the inputs' pairs takes the place of max|x|.
    Returns: q (n, groups, group), whole numbers of -127 .. 127 held as float32 (halves went to
        even); scales (n, groups) float32, 0 for a group of zeros or of less than LEAST_SCALE.
    """
    groups = x.reshape(len(x), x.shape[1] // group, group)
    sizes = np.abs(groups)
    if limits_pairs:
        sizes = sizes[:, :, ::2] + sizes[:, :, 1::2]
    largest = sizes.max(axis=2)
    scales = largest / np.float32(INPUT_LEVELS)
    scales[scales < LEAST_SCALE] = 0
    inverse = np.divide(
        np.float32(INPUT_LEVELS), largest, out=np.zeros_like(scales), where=scales > 0
    )
    return np.rint(groups * inverse[:, :, None]), scales


def _by_group(values: NDArray[np.float16]) -> Float32:
    """(rows, groups) as (groups, rows, 1) float32."""
    return np.ascontiguousarray(values.T).astype(np.float32)[:, :, None]
