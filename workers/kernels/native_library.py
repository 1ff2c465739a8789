"""The native kernel's C surface (native/api.h), mirrored for ctypes and loaded once.

ctypes releases the GIL for the length of every call. A library whose ABI version or struct sizes
differ from what is written here is refused: it would read the wrong memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.errors import ArtifactError, FuriosaLLMError, InvalidRequestError

ABI_VERSION = 2
ISA_VARIABLE = "FURIOSA_SERVE_ISA"
KNOWN_ISAS = ("amx", "avx512", "avxvnni", "avx2", "neon", "portable")  # of all CPUs, best first

# FsStatus
_OK, _INVALID_BATCH, _INVALID_ARTIFACT, _INVALID_CONFIG = 0, 1, 2, 3

DTYPE_CODES = {"fp32": 0, "vector": 0, "bf16": 1, "int8": 2, "int4": 3, "nested4": 4, "int6": 5}


class FsTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("nbytes", c_int64),
        ("dtype", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("has_min", c_int32),
        ("rotated", c_int32),
    )


class FsEngineConfig(ctypes.Structure):
    _fields_ = (
        ("vocab_size", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("sliding_window", c_int32),
        ("rms_norm_eps", c_float),
        ("num_blocks", c_int32),
        ("block_size", c_int32),
        ("kv_dtype", c_int32),
        ("max_num_batched_tokens", c_int32),
        ("num_pes", c_int32),
        ("cpu_offsets", c_void_p),
        ("cpus", c_void_p),
        ("tensors", POINTER(FsTensor)),
        ("num_tensors", c_int64),
    )


# The arrays of FsBatch, in its order, with the type of each: those of StepBatch.
BATCH_ARRAYS: dict[str, type[np.generic]] = {
    "token_ids": np.int32,
    "row_offsets": np.int32,
    "context_lens": np.int32,
    "block_ids": np.int32,
    "block_offsets": np.int32,
    "sample_rows": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "seed": np.uint64,
    "choice_index": np.int32,
    "num_logprobs": np.int32,
    "history_ids": np.int32,
    "history_offsets": np.int32,
    "history_prompt_lens": np.int32,
    "bias_ids": np.int32,
    "bias_values": np.float32,
    "bias_offsets": np.int32,
    "suppressed_ids": np.int32,
    "suppressed_offsets": np.int32,
}


class FsBatch(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("num_samples", c_int32),
        ("max_logprobs", c_int32),
        ("num_block_ids", c_int64),
        ("num_history_ids", c_int64),
        ("num_bias_ids", c_int64),
        ("num_suppressed_ids", c_int64),
        *((name, c_void_p) for name in BATCH_ARRAYS),
    )


# The arrays of FsResult, in its order: those of StepResult.
RESULT_ARRAYS = ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs")


class FsResult(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in RESULT_ARRAYS)


class FsMessage(ctypes.Structure):
    _fields_ = (("text", c_char * 512),)


_STRUCTS = (FsTensor, FsEngineConfig, FsBatch, FsResult, FsMessage)  # in fs_struct_size's order

_TIMING = (c_double, POINTER(c_double), POINTER(FsMessage))  # the last arguments of fs_time_*

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fs_abi_version": (c_int32, ()),
    "fs_struct_size": (c_int64, (c_int32,)),
    "fs_isa_name": (c_char_p, (c_int32,)),
    "fs_engine_create": (
        c_int32,
        (POINTER(FsEngineConfig), c_char_p, POINTER(c_void_p), POINTER(FsMessage)),
    ),
    "fs_engine_destroy": (None, (c_void_p,)),
    "fs_engine_step": (
        c_int32,
        (c_void_p, POINTER(FsBatch), POINTER(FsResult), POINTER(FsMessage)),
    ),
    "fs_engine_logits": (c_int32, (c_void_p, POINTER(FsBatch), c_void_p, POINTER(FsMessage))),
    "fs_matmul": (
        c_int32,
        (c_char_p, POINTER(FsTensor), c_void_p, c_int32, c_void_p, POINTER(FsMessage)),
    ),
    "fs_time_matmul": (
        c_int32,
        (c_char_p, POINTER(FsTensor), c_int32, c_int32, c_int32, *_TIMING),
    ),
    "fs_time_attention": (
        c_int32,
        (c_char_p, POINTER(FsEngineConfig), c_int32, c_int32, *_TIMING),
    ),
    "fs_sample": (
        c_int32,
        (c_char_p, POINTER(FsBatch), c_int32, c_void_p, POINTER(FsResult), POINTER(FsMessage)),
    ),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises: FuriosaLLMError if it is not built or does not fit."""
    candidates = sorted(Path(__file__).parent.glob("_native*.so"))
    if not candidates:
        raise FuriosaLLMError(
            "the native kernel is not built: install a C++17 compiler and install the package "
            "again, or use the numpy backend"
        )
    return load_library(candidates[0])


def load_library(path: Path) -> ctypes.CDLL:
    """The library of that file. Raises: FuriosaLLMError if it does not load or does not fit."""
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result_type, argument_types) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result_type, argument_types
    except (OSError, AttributeError) as error:
        raise FuriosaLLMError(f"the native kernel cannot be loaded: {error}") from error
    sizes = [loaded.fs_struct_size(i) for i in range(len(_STRUCTS))]
    if loaded.fs_abi_version() != ABI_VERSION or sizes != [ctypes.sizeof(s) for s in _STRUCTS]:
        raise FuriosaLLMError(
            f"the native kernel {path.name} was built from other sources: install the package again"
        )
    return loaded


def available_isas() -> tuple[str, ...]:
    """The kernel families that this CPU can run, best first."""
    names: list[str] = []
    while (name := library().fs_isa_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def resolve_isa(name: str | None = None) -> str:
    """The family to use: `name`, else FURIOSA_SERVE_ISA, else the best.

    Raises: InvalidRequestError if that is not one that this CPU can run.
    """
    asked = name or os.environ.get(ISA_VARIABLE) or None
    isas = available_isas()
    if asked is None:
        return isas[0]
    if asked not in isas:
        wrong = "which this CPU cannot run" if asked in KNOWN_ISAS else "which is no kernel family"
        raise InvalidRequestError(
            f"{ISA_VARIABLE} is {asked!r}, {wrong}: this CPU has {', '.join(isas)}; use one of "
            "these, or leave it unset for the first",
            param="isa",
        )
    return asked


def check(status: int, message: FsMessage) -> None:
    """Raise what a status other than 0 stands for."""
    if status == _OK:
        return
    text = message.text.decode(errors="replace")
    if status in (_INVALID_BATCH, _INVALID_CONFIG):
        raise InvalidRequestError(text)
    raise ArtifactError(text) if status == _INVALID_ARTIFACT else FuriosaLLMError(text)
