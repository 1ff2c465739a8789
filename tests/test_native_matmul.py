"""Matrix products of the native kernel, alone: each family against what the product is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from furiosa_llm.workers.artifact.artifact import Tensor
from furiosa_llm.workers.artifact.packing import from_bf16, pack_matrix, pack_quantized, to_bf16
from furiosa_llm.workers.artifact.quantize import QuantizedRows, quantize
from furiosa_llm.workers.artifact.rotation import hadamard
from furiosa_llm.workers.artifact.sizes import cols_multiple, scale_group
from furiosa_llm.workers.kernels import native, native_library

ISAS = native_library.available_isas()
WEIGHTS = ("fp32", "bf16", "int8", "int4")
# int8-file, nested4-plain: not rotated, as blocks from a file and weights on a grid are.
DTYPES = (*WEIGHTS, "int4-min", "int8-file", "int6", "nested4", "nested4-plain")


def is_whole(dtype: str, cols: int) -> bool:
    """Whether rows of so many columns are whole groups."""
    return cols % cols_multiple(dtype.partition("-")[0]) == 0


def packed_tensor(values: np.ndarray, dtype: str) -> Tensor:
    """A matrix of one of DTYPES; `int4-min` is int4 with mins."""
    kind, _, variant = dtype.partition("-")
    rotated = kind not in ("fp32", "bf16") and variant not in ("file", "plain")
    if variant == "min":
        packed = pack_quantized(quantize(values, "int4").with_mins())
    else:
        packed = pack_matrix(values, kind, rotated=rotated)
    return aligned_tensor(kind, packed, values.shape, has_min=variant == "min", rotated=rotated)


def aligned_tensor(
    kind: str,
    packed: np.ndarray,
    shape: tuple[int, ...],
    *,
    has_min: bool = False,
    rotated: bool = False,
) -> Tensor:
    """The packed matrix where the kernels want it: at a multiple of 64 bytes."""
    rows, cols = shape
    room = np.zeros(len(packed) + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(packed)] = packed
    return Tensor(kind, rows, cols, has_min, rotated, room[start : start + len(packed)])


def rounded_as_kernels_do(x: np.ndarray, tensor: Tensor, isa: str) -> np.ndarray:
    """The values that inputs stand for when they are multiplied with this matrix."""
    if tensor.dtype == "fp32":
        return x
    if tensor.dtype == "bf16":
        return from_bf16(to_bf16(x))
    return quantized_as_kernels_do(x, tensor, isa)


def quantized_as_kernels_do(x: np.ndarray, tensor: Tensor, isa: str) -> np.ndarray:
    """The values that inputs stand for once they are quantised for this matrix."""
    group = scale_group(tensor.cols, tensor.dtype, tensor.rotated)
    limits_pairs = isa == "avx2" and tensor.rotated and tensor.dtype == "int8"
    if limits_pairs:
        group = min(group, 64)
    groups = (hadamard(x) if tensor.rotated else x).reshape(len(x), -1, group)
    sizes = np.abs(groups)
    if limits_pairs:  # two products are added up in 16 bits
        sizes = sizes[:, :, ::2] + sizes[:, :, 1::2]
    largest = sizes.max(axis=2, keepdims=True)
    levels = np.float32(127)
    scales = largest / levels
    inverse = np.divide(levels, largest, out=np.zeros_like(scales), where=scales > 0)
    values = np.rint(groups * inverse).astype(np.float64) * scales
    if tensor.rotated:  # back: the transform is its own inverse but for a factor
        values = hadamard(values.reshape(x.shape)) / 32
    return values.reshape(x.shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (dtype, shape)
        for shape in [(16, 32), (37, 160), (112, 64), (37, 192), (21, 256), (16, 384)]
        for dtype in DTYPES
        if is_whole(dtype, shape[1])
    ],
)
def test_matmul_is_the_product(isa: str, dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    tensor = packed_tensor(rng.standard_normal(shape).astype(np.float32), dtype)
    x = rng.standard_normal((13, shape[1])).astype(np.float32)
    x[4, :32] = 0
    weights = tensor.unpack().astype(np.float64)
    inputs = rounded_as_kernels_do(x, tensor, isa).astype(np.float64)

    y = native.matmul(tensor, x, isa=isa)

    # Left-to-right float32 sums: an ulp of the running sum at each of the terms, at worst.
    bound = 2.0**-23 * shape[1] * (np.abs(inputs) @ np.abs(weights).T) / 8 + 1e-6
    assert (np.abs(y - inputs @ weights.T) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_bits_do_not_depend_on_the_number_of_rows(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    tensor = packed_tensor(rng.standard_normal((40, 384)).astype(np.float32), dtype)
    x = rng.standard_normal((17, 384)).astype(np.float32)
    whole = native.matmul(tensor, x, isa=isa)
    for count in range(1, 17):
        assert np.array_equal(native.matmul(tensor, x[:count], isa=isa), whole[:count])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_of_many_rows_unpacks_panels_without_changing_a_bit(isa: str, dtype: str) -> None:
    """Rows enough for every way that a kernel has, inputs enough for several chunks of a panel."""
    rng = np.random.default_rng(4)
    tensor = packed_tensor(rng.standard_normal((20, 1728)).astype(np.float32), dtype)
    x = rng.standard_normal((130, 1728)).astype(np.float32)
    x[7] = 0
    one_by_one = np.concatenate([native.matmul(tensor, row[None], isa=isa) for row in x])
    for count in (11, 12, 15, 16, 24, 27, 28, 39, 40, 65, 130):
        assert np.array_equal(native.matmul(tensor, x[:count], isa=isa), one_by_one[:count])


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_of_bf16_weights_are_rounded_half_to_even(isa: str) -> None:
    """Ties both ways and their neighbours, times the identity; more than whole vectors of them."""
    size = 90
    tensor = packed_tensor(np.eye(size, dtype=np.float32), "bf16")
    upper = np.random.default_rng(6).integers(0x3D00, 0x4300, 3 * size).astype(np.uint32)
    lower = np.resize(np.array([0x8000, 0x7FFF, 0x8001, 0, 0xFFFF], np.uint32), 3 * size)
    x = (upper << 16 | lower).view(np.float32).reshape(3, size).copy()
    x[1] *= -1
    assert np.array_equal(native.matmul(tensor, x, isa=isa), from_bf16(to_bf16(x)))
    x[2, 70] = np.uint32(0x7FFFFFFF).view(np.float32)  # a NaN that rounding would turn into -0
    x[1, 89] = -x[2, 70]
    assert np.isnan(native.matmul(tensor, x, isa=isa)[1:]).all()


def test_matmul_extremes_stay_exact() -> None:
    """All inputs and all weights at their largest: no integer sum saturates."""
    for dtype, q, value in (("int8", -128, -128.0), ("int4", 0, -8.0), ("int4", 15, 7.0)):
        tensor = replace(packed_tensor(np.ones((16, 32), np.float32), dtype), rotated=False)
        bytes_ = tensor.data.copy()
        num_data = 16 * 32 // (1 if dtype == "int8" else 2)
        bytes_[:num_data] = np.int8(q).view(np.uint8) if dtype == "int8" else q * 17
        bytes_[num_data : num_data + 32] = np.ones(16, np.float16).view(np.uint8)
        tensor.data[:] = bytes_
        for isa in ISAS:
            for num_rows in (5, 48):
                y = native.matmul(tensor, np.full((num_rows, 32), -127, np.float32), isa=isa)
                assert (y == value * -127 * 32).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("q", "factor", "shift", "value"),
    [(0, 15, -8, -128), (15, 15, 22, 127), (0, 1, -120, -128), (15, 1, 120, 127), (8, 15, 0, 0)],
)
def test_extremes_of_nested4_stay_exact(
    isa: str, q: int, factor: int, shift: int, value: int
) -> None:
    shape = (16, 64)
    blocks = QuantizedRows(
        np.full(shape, q, np.uint8),
        np.ones((16, 1), np.float16),
        factors=np.full((16, 2), factor, np.uint8),
        shifts=np.full((16, 2), shift, np.int8),
    )
    tensor = aligned_tensor("nested4", pack_quantized(blocks), shape)
    for num_rows in (5, 48):
        for x in (-127, 127):
            y = native.matmul(tensor, np.full((num_rows, 64), x, np.float32), isa=isa)
            assert (y == value * x * 64).all()
