"""How model files hold numbers: plain floats, and GGUF's quantised blocks.

Every function takes rows as raw bytes, (rows, row_nbytes) uint8, so that a slice of a mapped file
can be decoded without touching the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.artifact.packing import from_bf16
from furiosa_llm.workers.artifact.quantize import QuantizedRows
from furiosa_llm.workers.artifact.sizes import GROUP

Raw = NDArray[np.uint8]

_FLOAT_NBYTES = {"F32": 4, "F16": 2, "BF16": 2}

# Those that the gguf package can dequantise with numpy.
BLOCK_ENCODINGS = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0",
    "TQ2_0", "MXFP4",
})  # fmt: skip

# The weight types from the narrowest to the widest, as `--weights auto` compares them.
PRECISIONS = ("int4", "int8", "bf16", "fp32")


def precision_of(encoding: str) -> str:
    """The weight type that keeps (about) what this encoding holds."""
    if encoding == "F32":
        return "fp32"
    if encoding in ("F16", "BF16"):
        return "bf16"
    return "int8" if encoding.startswith(("Q5", "Q6", "Q8")) else "int4"


def row_nbytes(encoding: str, cols: int) -> int | None:
    """Bytes of a row of `cols` values; None if the row cannot be encoded so."""
    if encoding in _FLOAT_NBYTES:
        return cols * _FLOAT_NBYTES[encoding]
    if encoding not in BLOCK_ENCODINGS:
        return None
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    num_values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    return None if cols % num_values else cols // num_values * nbytes


def decode(raw: Raw, encoding: str) -> NDArray[np.float32]:
    """The values of some rows, (rows, cols) float32."""
    raw = np.ascontiguousarray(raw)
    if encoding == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if encoding == "F16":
        return raw.view("<f2").astype(np.float32)
    if encoding == "BF16":
        return from_bf16(raw.view("<u2"))
    blocks = decode_blocks(raw, encoding)
    if blocks is not None:
        return blocks.dequantize()
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # the builder refuses what is not finite
        values: NDArray[np.float32] = dequantize(raw, GGMLQuantizationType[encoding])
    return values


def decode_blocks(raw: Raw, encoding: str) -> QuantizedRows | None:
    """Q8_0, Q4_0 and Q4_1 as the integers and scales that they are; None for any other encoding."""
    if encoding not in ("Q8_0", "Q4_0", "Q4_1"):
        return None
    rows = len(raw)
    header = 4 if encoding == "Q4_1" else 2
    size = header + (GROUP if encoding == "Q8_0" else GROUP // 2)
    blocks = np.ascontiguousarray(raw).reshape(rows, -1, size)
    halves = np.ascontiguousarray(blocks[:, :, :header]).view("<f2")
    packed = blocks[:, :, header:]
    if encoding == "Q8_0":
        return QuantizedRows(packed.reshape(rows, -1).view(np.int8), halves[:, :, 0])
    # A byte holds value j in its low nibble and value j + 16 in its high one.
    q = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(rows, -1)
    return QuantizedRows(q, halves[:, :, 0], halves[:, :, 1] if encoding == "Q4_1" else None)
