"""How many bytes packed tensors take. Without numpy: a front-end reads manifests, and no tensor."""

from __future__ import annotations

GROUP = 32
PANEL_ROWS = 16
ALIGNMENT = 64

VECTOR = "vector"
MATRIX_DTYPES = ("fp32", "bf16", "int8", "int4")


def cols_multiple(dtype: str) -> int:
    """What the columns of a matrix of this dtype must be a multiple of."""
    return {"fp32": 1, "bf16": 2, "int8": GROUP, "int4": GROUP}[dtype]


def panel_nbytes(cols: int, dtype: str, has_min: bool = False) -> int:
    """Bytes from one panel's start to the next one's, a multiple of 64."""
    groups = cols // GROUP
    used = {
        "fp32": cols * PANEL_ROWS * 4,
        "bf16": cols * PANEL_ROWS * 2,
        "int8": groups * PANEL_ROWS * (GROUP + 2),
        "int4": groups * PANEL_ROWS * (GROUP // 2 + (4 if has_min else 2)),
    }[dtype]
    return -(-used // ALIGNMENT) * ALIGNMENT


def matrix_nbytes(rows: int, cols: int, dtype: str, has_min: bool = False) -> int:
    """Bytes of a whole packed matrix, the padding of its last panel included."""
    return -(-rows // PANEL_ROWS) * panel_nbytes(cols, dtype, has_min)
