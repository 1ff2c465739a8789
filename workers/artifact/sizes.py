"""How many bytes packed tensors take. Without numpy: a front-end reads manifests, and no tensor."""

from __future__ import annotations

GROUP = 32
SCALE_GROUPS = (192, 128, 64)  # inputs that share a scale, where it need not be one group
PANEL_ROWS = 16
ALIGNMENT = 64

VECTOR = "vector"
WEIGHT_TYPES = ("fp32", "bf16", "int8", "int4")  # what a user may ask for
MATRIX_DTYPES = (*WEIGHT_TYPES, "nested4", "int6")  # what a matrix may be
FLOAT_DTYPES = ("fp32", "bf16")  # of these; the others are integers and scales


def cols_multiple(dtype: str) -> int:
    """What the columns of a matrix of this dtype must be a multiple of."""
    return {
        "fp32": 1,
        "bf16": 2,
        "int8": GROUP,
        "int4": GROUP,
        "nested4": 2 * GROUP,
        "int6": 2 * GROUP,
    }[dtype]


def weight_type(dtype: str) -> str:
    """What a user calls a matrix of this dtype, or, of int6, the next wider."""
    return {"nested4": "int4", "int6": "int8"}.get(dtype, dtype)


def scale_group(cols: int, dtype: str, rotated: bool) -> int:
    """How many neighbouring inputs share a scale: 192, 128 or 64, the most of these that rows are
    whole groups of, in nested4, int6 and rotated int8, which lose little by it and are multiplied
    much faster; else 32.
    """
    if dtype in ("nested4", "int6") or (dtype == "int8" and rotated):
        return next((size for size in SCALE_GROUPS if cols % size == 0), GROUP)
    return GROUP


def panel_nbytes(cols: int, dtype: str, has_min: bool = False, rotated: bool = False) -> int:
    """Bytes from one panel's start to the next one's, a multiple of 64."""
    num_scales = cols // scale_group(cols, dtype, rotated)
    used = {
        "fp32": cols * 4,
        "bf16": cols * 2,
        "int8": cols + num_scales * 2,
        "int4": cols // 2 + num_scales * (4 if has_min else 2),
        "int6": cols * 3 // 4 + num_scales * 2,
        "nested4": cols // 2 + num_scales * 2 + cols // GROUP * 3 // 2,
    }[dtype]
    return -(-used * PANEL_ROWS // ALIGNMENT) * ALIGNMENT


def matrix_nbytes(
    rows: int, cols: int, dtype: str, has_min: bool = False, rotated: bool = False
) -> int:
    """Bytes of a whole packed matrix, the padding of its last panel included."""
    return -(-rows // PANEL_ROWS) * panel_nbytes(cols, dtype, has_min, rotated)
