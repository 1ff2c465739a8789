"""Matrices as groups of small integers: `int8`, `int6`, `int4` and `nested4`.

Groups of 32 are the blocks of GGUF's Q8_0, Q4_0 and Q4_1. What we quantise ourselves is rotated
before (rotation.py) unless that makes it worse, and several neighbouring groups share a scale (see
`scale_group`); blocks taken over from a file are neither.

nested4 is what our own 4-bit weights are then. A scale alone would serve so many of them badly; but
it need not: each 32 have a small factor and shift of their own, both integers, so that what the
scale multiplies is an int8 again. Q4_K of llama.cpp (Kawrakow 2023) nests its scales so, in
groups of 256. int6 is for what our own 4-bit weights would lose too much in: embeddings and heads.

Rows are independent and a group never crosses a row, so a matrix may be quantised in slices of
rows with the same result; that is how the builders keep their memory bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact.rotation import INPUTS_FACTOR, WEIGHTS_FACTOR, hadamard
from furiosa_llm.workers.artifact.sizes import GROUP, scale_group

# Plain Q4_0 maps the largest value of a group to -8. Letting it fall elsewhere between 7 and 9
# trades a little clipping of that value for a finer grid under the other 31, which is where most
# of the error is. Twice these many grids are tried: either sign may have the long (-8) side.
_INT4_EXTREMES = (8.0, 7.7, 7.4, 7.1, 8.4, 8.8)

# Where the largest value of a group may fall. Plain Q8_0 knows 127 alone. A coarser grid often
# meets the other 31 better; of 6 bits, so may a finer one that cuts the largest off.
_INT8_EXTREMES = tuple(range(127, 100, -1))
_INT6_EXTREMES = tuple(31 + step / 2 for step in range(4, -14, -1))

# What the larger factor of a nested group would be, and how much of the way from a group's least to
# its largest value its grid spans.
_NESTED4_EXTREMES = (15, 14, 13, 12, 11)
_NESTED4_SPANS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)

_MAX_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a matrix in groups: w = scale * q, with what `q` is offset by said here.

    int8: w = scale * q, q int8. int6: the same, q in -32..31. int4: q uint8 in 0..15;
    w = scale * (q - 8), or, where there are mins, w = scale * q + min. nested4:
    w = scale * (factor * (q - 8) + shift), where what is in parentheses is an int8. With `rotated`
    those w are WEIGHTS_FACTOR * H times the weights.
    """

    q: NDArray[np.int8] | NDArray[np.uint8]  # (rows, cols)
    scales: NDArray[np.float16]  # (rows, groups)
    mins: NDArray[np.float16] | None = None  # (rows, groups)
    rotated: bool = False
    factors: NDArray[np.uint8] | None = None  # nested4: (rows, cols / 32), 1..15
    shifts: NDArray[np.int8] | None = None  # nested4: (rows, cols / 32)
    bits: int = 8  # that q takes, where it is int8

    @property
    def dtype(self) -> str:
        if self.factors is not None:
            return "nested4"
        return f"int{self.bits}" if self.q.dtype == np.int8 else "int4"

    def integers(self) -> NDArray[np.int8] | NDArray[np.uint8]:
        """(rows, cols): what the scales multiply; but with mins, or in int4, see the class."""
        if self.factors is None or self.shifts is None:
            return self.q
        steps = self.q.reshape(*self.factors.shape, -1).astype(np.int16) - 8
        integers = steps * self.factors[:, :, None] + self.shifts[:, :, None]
        return integers.astype(np.int8).reshape(self.q.shape)

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
        values = self.integers().reshape(*self.scales.shape, -1).astype(np.float32)
        if self.mins is not None:
            values = values * scales + self.mins.astype(np.float32)[:, :, None]
        elif self.dtype == "int4":
            values = (values - np.float32(8)) * scales
        else:
            values = values * scales
        flat = values.reshape(rows, cols)
        return hadamard(flat) * INPUTS_FACTOR if self.rotated else flat


def quantize(values: NDArray[np.float32], dtype: str, *, rotated: bool = True) -> QuantizedRows:
    """Quantise `values` (rows, cols) to `int8`, `int6`, `int4` or `nested4`.

    Args:
        values: cols a multiple of `cols_multiple(dtype)`.
        rotated: whether runs of 32 are rotated before.

    Raises: ValueError for values that are not finite, or so large that a scale is not a float16.
    """
    groups = _groups_of(values, dtype, rotated)
    quantizers = {
        "int8": _quantize_int8,
        "int6": _quantize_int6,
        "int4": _quantize_int4,
        "nested4": _quantize_nested4,
    }
    return replace(quantizers[dtype](groups), rotated=rotated)


def should_rotate(values: NDArray[np.float32], dtype: str) -> bool:
    """Whether to rotate a matrix of which these are some rows: always for int8, whose kernels are
    faster so, and for int6; for four bits, if it leaves clearly less error. Where weights lie on a
    grid of few steps already, as those of a model distributed in 4 bits do, it leaves more.
    """
    if dtype in ("int8", "int6"):
        return True
    errors = [
        np.square(quantize(values, dtype, rotated=rotated).dequantize() - values).sum()
        for rotated in (True, False)
    ]
    return bool(errors[0] < 0.9 * errors[1])


def _quantize_int8(groups: NDArray[np.float32]) -> QuantizedRows:
    """Symmetric, -127..127."""
    return QuantizedRows(*_on_symmetric_grids(groups, 127, _INT8_EXTREMES))


def _quantize_int6(groups: NDArray[np.float32]) -> QuantizedRows:
    """Symmetric, -31..31."""
    return QuantizedRows(*_on_symmetric_grids(groups, 31, _INT6_EXTREMES), bits=6)


def _on_symmetric_grids(
    groups: NDArray[np.float32], largest: int, extremes: tuple[float, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Integers of -largest..largest (rows, cols) and their scales (rows, groups): per group the
    grid of least squared error among a few.

    As for int4, each candidate's integers get their own least-squares scale. The error is measured
    with that scale as it is stored, a float16, so that its rounding counts.
    """
    amax = np.abs(groups).max(axis=2)
    best_scales = np.zeros(amax.shape, np.float16)
    best_error = np.full_like(amax, np.inf)
    for extreme in extremes:
        q = _nearest(groups, _inverse_of_grid(amax, extreme), largest)
        dot = np.einsum("rgk,rgk->rg", groups, q)
        norm = np.einsum("rgk,rgk->rg", q, q)
        scales = _as_float16(dot / np.maximum(norm, 1))
        wide = scales.astype(np.float32)
        error = wide * (wide * norm - 2 * dot)  # but for <w, w>, the same for every candidate
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
    q = _nearest(groups, _inverse(best_scales), largest)
    return q.astype(np.int8).reshape(len(q), -1), best_scales


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


def _quantize_nested4(groups: NDArray[np.float32]) -> QuantizedRows:
    """Per group the scale of least squared error among a few, and for each 32 of it the factor and
    the shift, next to those of their own best grid, that leave the least.
    """
    rows, num_parts = len(groups), groups.shape[2] // GROUP
    least = np.abs(groups).max(axis=2) / np.float32(127)  # or the integers would be no int8
    _as_float16(least)  # refused before anything overflows
    parts = groups.reshape(rows, -1, GROUP)
    step, middle = _affine_grids(parts)
    widest = step.reshape(rows, -1, num_parts).max(axis=2)
    best_scales = np.zeros(widest.shape, np.float16)
    best_error = np.full(widest.shape, np.inf, np.float32)
    for extreme in _NESTED4_EXTREMES:
        scales = _as_float16(np.maximum(widest / np.float32(extreme), least))
        wide = np.repeat(scales.astype(np.float32), num_parts, axis=1)
        factors = np.rint(step * _inverse_of(wide))
        errors = _nested_on(parts, wide, factors, middle, 0)[0]
        error = errors.reshape(rows, -1, num_parts).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
    wide = np.repeat(best_scales.astype(np.float32), num_parts, axis=1)
    lower = np.floor(step * _inverse_of(wide))
    best: list[NDArray[np.float32]] | None = None
    for factors in (lower, lower + 1):
        for nudge in (-0.25, 0.25):  # both integers where the best shift lies between two
            tried = _nested_on(parts, wide, factors, middle, nudge)
            if best is None:
                best = tried
                continue
            better = tried[0] < best[0]
            best = [
                np.where(better[:, :, None] if new.ndim == 3 else better, new, old)
                for new, old in zip(tried, best, strict=True)
            ]
    assert best is not None
    _, factors, shifts, q = best
    return QuantizedRows(
        (q + 8).astype(np.uint8).reshape(rows, -1),
        best_scales,
        factors=factors.astype(np.uint8),
        shifts=shifts.astype(np.int8),
    )


def _affine_grids(parts: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The step of the best of a few grids of 16 values for each group, and where its middle lies.

    A candidate spans a part of the way from the least to the largest value. Once the integers are
    rounded, the best line through them follows from their covariance with the values.
    """
    low, high = parts.min(axis=2), parts.max(axis=2)
    mean = parts.mean(axis=2)
    best_gain = np.full(low.shape, -1, np.float32)
    best_step, best_middle = np.zeros_like(low), mean
    for span in _NESTED4_SPANS:
        inverse = _inverse_of((high - low) * np.float32(span / 15))
        centred = parts - ((low + high) / 2)[:, :, None]
        n = np.clip(np.rint(centred * inverse[:, :, None] + np.float32(7.5)), 0, 15)
        mean_n = n.mean(axis=2)
        covariance = np.einsum("rgk,rgk->rg", n, parts) / GROUP - mean_n * mean
        variance = np.einsum("rgk,rgk->rg", n, n) / GROUP - mean_n * mean_n
        step = np.maximum(covariance, 0) * _inverse_of(variance)
        gain = covariance * step
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_step = np.where(better, step, best_step)
        best_middle = np.where(better, mean + step * (np.float32(7.5) - mean_n), best_middle)
    return best_step, best_middle


def _nested_on(
    parts: NDArray[np.float32],
    scales: NDArray[np.float32],
    factors: NDArray[np.float32],
    middle: NDArray[np.float32],
    nudge: float,
) -> list[NDArray[np.float32]]:
    """The squared error that is left with these scales and factors, for shifts that put the grid's
    middle nearest to `middle` (+ `nudge`): [error, factors, shifts, q - 8] of each 32.
    """
    inverse = _inverse_of(scales)
    factors = np.clip(factors, 1, 15)
    shifts = np.rint(middle * inverse + factors / 2 + np.float32(nudge))
    shifts = np.clip(shifts, 8 * factors - 128, 127 - 7 * factors)
    scaled = parts * inverse[:, :, None]
    q = np.rint((scaled - shifts[:, :, None]) * _inverse_of(factors)[:, :, None])
    q = np.clip(q, -8, 7)
    difference = q * factors[:, :, None] + shifts[:, :, None] - scaled
    error = np.einsum("rgk,rgk->rg", difference, difference) * scales * scales
    return [error, factors, shifts, q]


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
    return _inverse_of(scales.astype(np.float32))


def _inverse_of(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / x, and 0 where that is no finite number."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / x
    return np.where(np.isfinite(inverse), inverse, 0).astype(np.float32)
