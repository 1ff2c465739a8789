"""How fast single kernels are, on threads of their own: for benchmarks/kernels.py.

Each figure is seconds of one call, the best of several that take `min_seconds` together. Inputs
and weights or layers are used in turn, so with enough of them every call reads memory, not cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from furiosa_llm.workers.artifact.artifact import Tensor
from furiosa_llm.workers.kernels.native import tensor_struct
from furiosa_llm.workers.kernels.native_library import (
    DTYPE_CODES,
    FsEngineConfig,
    FsMessage,
    FsTensor,
    check,
    library,
    resolve_isa,
)


def time_matmul(
    tensors: Sequence[Tensor],
    num_rows: int,
    *,
    num_pes: int,
    isa: str | None = None,
    min_seconds: float = 0.2,
) -> float:
    """Of `num_rows` rows times one of the matrices, which are all of one shape and type."""
    structs = (FsTensor * len(tensors))(*(tensor_struct(tensor) for tensor in tensors))
    return _timed(
        library().fs_time_matmul, isa, min_seconds, structs, len(tensors), num_rows, num_pes
    )


def time_attention(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_cache_dtype: str,
    context: int,
    num_sequences: int,
    num_tokens: int,
    num_layers: int,
    num_pes: int,
    isa: str | None = None,
    min_seconds: float = 0.2,
) -> float:
    """Of one layer's attention, for the last `num_tokens` of sequences of `context` tokens.

    Args:
        context: a multiple of 16.
        num_layers: caches to use in turn.
    """
    block_size = 16
    config = FsEngineConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        num_blocks=num_sequences * (context // block_size),
        block_size=block_size,
        kv_dtype=DTYPE_CODES[kv_cache_dtype],
        num_pes=num_pes,
    )
    return _timed(
        library().fs_time_attention,
        isa,
        min_seconds,
        ctypes.byref(config),
        num_sequences,
        num_tokens,
    )


def _timed(function: Any, isa: str | None, min_seconds: float, *arguments: Any) -> float:
    seconds, message = ctypes.c_double(), FsMessage()
    name = resolve_isa(isa).encode()
    status = function(name, *arguments, min_seconds, ctypes.byref(seconds), ctypes.byref(message))
    check(status, message)
    return seconds.value
