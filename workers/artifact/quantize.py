"""Matrices as groups of small integers: `int8` and `int4`.

Groups of 32 are the blocks of GGUF's Q8_0 and Q4_0. What we quantise ourselves is rotated before
(rotation.py) unless that makes it worse, and rotated int8 has groups of 64 where rows are whole
ones; blocks taken over from a file are neither.

Rows are independent and a group never crosses a row, so a matrix may be quantised in slices of
rows with the same result; that is how the builders keep their memory bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact.rotation import INPUTS_FACTOR, WEIGHTS_FACTOR, hadamard
from furiosa_llm.workers.artifact.sizes import scale_group

# Plain Q4_0 maps the largest value of a group to -8. Letting it fall elsewhere between 7 and 9
# trades a little clipping of that value for a finer grid under the other 31, which is where most
# of the error is. Twice these many grids are tried: either sign may have the long (-8) side.
_INT4_EXTREMES = (8.0, 7.7, 7.4, 7.1, 8.4, 8.8)

# Where the largest value of a group may fall. Plain Q8_0 knows 127 alone. A coarser grid often
# meets the other 31 better.
_INT8_EXTREMES = range(127, 100, -1)

_MAX_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a matrix in groups: w = scale * q, with what `q` is offset by said here.

    int8: w = scale * q, q int8. int4: q uint8 in 0..15; w = scale * (q - 8), or, where there are
    mins, w = scale * q + min. With `rotated` those w are WEIGHTS_FACTOR * H times the weights.
    """

    q: NDArray[np.int8] | NDArray[np.uint8]  # (rows, cols)
    scales: NDArray[np.float16]  # (rows, groups)
    mins: NDArray[np.float16] | None = None  # (rows, groups)
    rotated: bool = False

    @property
    def dtype(self) -> str:
        return "int8" if self.q.dtype == np.int8 else "int4"

    def with_mins(self) -> QuantizedRows:
        """The same int4 values in the form that has mins: scale * (q - 8) = scale * q + (-8 scale).

        Exact, but for scales above 8188, whose eightfold a float16 cannot hold: ValueError.
        """
        if self.mins is not None:
            return self
        mins = self.scales.astype(np.float32) * np.float32(-8)
        return QuantizedRows(self.q, self.scales, _as_float16(mins), self.rotated)

    def dequantize(self) -> NDArray[np.float32]:
        """(rows, cols) float32: each value one float32 product (and sum) of its parts, and, where
        they are rotated, rotated back.
        """
        rows, cols = self.q.shape
        scales = self.scales.astype(np.float32)[:, :, None]
        values = self.q.reshape(*self.scales.shape, -1).astype(np.float32)
        if self.mins is not None:
            values = values * scales + self.mins.astype(np.float32)[:, :, None]
        elif self.dtype == "int4":
            values = (values - np.float32(8)) * scales
        else:
            values = values * scales
        flat = values.reshape(rows, cols)
        return hadamard(flat) * INPUTS_FACTOR if self.rotated else flat


def quantize(values: NDArray[np.float32], dtype: str, *, rotated: bool = True) -> QuantizedRows:
    """Quantise `values` (rows, cols), cols a multiple of 32, to `int8` or `int4`.

    Args:
        rotated: whether runs of 32 are rotated before.

    Raises: ValueError for values that are not finite, or so large that a scale is not a float16.
    """
    groups = _groups_of(values, dtype, rotated)
    quantized = _quantize_int8(groups) if dtype == "int8" else _quantize_int4(groups)
    return replace(quantized, rotated=rotated)


def should_rotate(values: NDArray[np.float32], dtype: str) -> bool:
    """Whether to rotate a matrix of which these are some rows: always for int8, whose kernels are
    faster so; for int4, if it leaves clearly less error. Where weights lie on a grid of few steps
    already, as those of a model distributed in 4 bits do, it leaves more.
    """
    if dtype == "int8":
        return True
    errors = [
        np.square(quantize(values, dtype, rotated=rotated).dequantize() - values).sum()
        for rotated in (True, False)
    ]
    return bool(errors[0] < 0.9 * errors[1])


def _quantize_int8(groups: NDArray[np.float32]) -> QuantizedRows:
    """Symmetric, -127..127: per group the grid of least squared error among a few.

    As for int4, each candidate's integers get their own least-squares scale. The error is measured
    with that scale as it is stored, a float16, so that its rounding counts.
    """
    amax = np.abs(groups).max(axis=2)
    best_scales = np.zeros(amax.shape, np.float16)
    best_error = np.full_like(amax, np.inf)
    for extreme in _INT8_EXTREMES:
        q = _nearest(groups, _inverse_of_grid(amax, extreme), 127)
        dot = np.einsum("rgk,rgk->rg", groups, q)
        norm = np.einsum("rgk,rgk->rg", q, q)
        scales = _as_float16(dot / np.maximum(norm, 1))
        wide = scales.astype(np.float32)
        error = wide * (wide * norm - 2 * dot)  # but for <w, w>, the same for every candidate
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
    q = _nearest(groups, _inverse(best_scales), 127)
    return QuantizedRows(q.astype(np.int8).reshape(len(q), -1), best_scales)


def _quantize_int4(groups: NDArray[np.float32]) -> QuantizedRows:
    """Symmetric, -8..7: per group the grid of least squared error among a few.

    For each candidate grid the integers are rounded, the least-squares scale for those integers
    is <w, q> / <q, q>, and the error it leaves is <w, w> - <w, q>^2 / <q, q>; the candidate that
    leaves the least wins. The scale's sign says which side of zero has the eighth step.
    """
    amax = np.abs(groups).max(axis=2)
    best_scale = np.zeros_like(amax)
    best_gain = np.full_like(amax, -1)
    for extreme in _INT4_EXTREMES:
        nearest = np.rint(groups * _inverse_of_grid(amax, extreme)[:, :, None])
        for sign in (1, -1):
            q = np.clip(nearest, -8, 7) if sign > 0 else np.clip(nearest, -7, 8)
            dot = np.einsum("rgk,rgk->rg", groups, q)
            norm = np.maximum(np.einsum("rgk,rgk->rg", q, q), 1)
            gain = dot * dot / norm
            better = gain > best_gain
            best_gain = np.where(better, gain, best_gain)
            best_scale = np.where(better, sign * dot / norm, best_scale)
    scales = _as_float16(best_scale)
    q = np.clip(np.rint(groups * _inverse(scales)[:, :, None]), -8, 7) + 8
    return QuantizedRows(q.astype(np.uint8).reshape(len(q), -1), scales)


def _groups_of(values: NDArray[np.float32], dtype: str, rotated: bool) -> NDArray[np.float32]:
    rows, cols = values.shape
    group = scale_group(cols, dtype, rotated)
    assert cols % group == 0, f"{cols} columns are not whole groups of {group}"
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite (NaN or infinity)")
    if rotated:
        with np.errstate(over="ignore", invalid="ignore"):
            values = hadamard(values) * WEIGHTS_FACTOR
        if not np.isfinite(values).all():
            raise ValueError("it holds values too large for a scale in float16; use bf16")
    return values.reshape(rows, cols // group, group)


def _nearest(
    groups: NDArray[np.float32], inverse: NDArray[np.float32], largest: int
) -> NDArray[np.float32]:
    """The integers, as floats, nearest to each value on its group's grid."""
    q: NDArray[np.float32] = np.clip(np.rint(groups * inverse[:, :, None]), -largest, largest)
    return q


def _inverse_of_grid(amax: NDArray[np.float32], extreme: float) -> NDArray[np.float32]:
    """1 / step of the grid on which a group's largest value falls on `extreme`; 0 for zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(amax > 0, np.float32(extreme) / amax, 0)
    return np.where(np.isfinite(inverse), inverse, 0).astype(np.float32)


def _as_float16(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = float(np.abs(scales).max(initial=0))
    if largest > _MAX_FLOAT16:
        raise ValueError(f"it needs a scale of {largest:g}, more than a float16 holds; use bf16")
    return scales.astype(np.float16)


def _inverse(scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """1 / scale, and 0 where the scale is 0 (a group of zeros, or one too small for float16)."""
    wide = scales.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
