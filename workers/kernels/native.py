"""The native executor: a whole step in one call into C++ (native/engine.h), the GIL released.

The weights are the artifact's map itself; the engine holds the KV cache, one thread per PE and
the step's buffers. The kernel family is chosen once, when the executor is made.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import EngineShutDownError, InvalidRequestError
from furiosa_llm.workers.artifact.artifact import Artifact, Tensor
from furiosa_llm.workers.executor import Float32, StepBatch, StepResult
from furiosa_llm.workers.kernels.native_library import (
    BATCH_ARRAYS,
    DTYPE_CODES,
    RESULT_ARRAYS,
    FsBatch,
    FsEngineConfig,
    FsMessage,
    FsResult,
    FsTensor,
    check,
    library,
    resolve_isa,
)

KV_CACHE_DTYPES = ("fp32", "bf16", "int8")

# The tensor table's order: FsGlobalTensor, then FsLayerTensor for each layer.
_GLOBAL_TENSORS = ("embed", "lm_head", "final_norm", "rope_inv_freq")
_LAYER_TENSORS = (
    "attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "ffn_norm", "gate_up", "down",
)  # fmt: skip


class NativeExecutor:
    """Implements `Executor` with the C++ kernels.

    Args:
        artifact: the model; it is kept alive as long as the executor.
        num_blocks, block_size: the KV cache; memory is taken as blocks are first written.
        kv_cache_dtype: fp32, bf16 or int8.
        cpus: for each PE the CPUs it runs on; an empty tuple leaves that PE unbound. PE 0 is the
            thread that calls, bound while a step runs.
        max_num_batched_tokens: the most tokens in one step; a larger one is refused.
        isa: a kernel family (`available_isas`); None: FURIOSA_SERVE_ISA, else the best.
    Raises: ArtifactError for tensors that do not fit the config; InvalidRequestError for an
        argument out of range; FuriosaLLMError if the kernel is not built.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: str,
        cpus: tuple[tuple[int, ...], ...],
        max_num_batched_tokens: int,
        isa: str | None = None,
    ) -> None:
        if kv_cache_dtype not in KV_CACHE_DTYPES:
            raise InvalidRequestError(
                f"the KV cache type is {kv_cache_dtype!r}; it must be one of "
                f"{', '.join(KV_CACHE_DTYPES)}",
                param="kv_cache_dtype",
            )
        self._handle: int | None = None
        self._library = library()
        self._isa = resolve_isa(isa)
        self._artifact = artifact
        self._vocab_size = artifact.config.vocab_size
        tensors = _tensor_table(artifact)
        cpu_offsets = np.cumsum([0, *(len(pe) for pe in cpus)], dtype=np.int32)
        flat_cpus = np.array(list(itertools.chain.from_iterable(cpus)), dtype=np.int32)
        model = artifact.config
        config = FsEngineConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            sliding_window=model.sliding_window,
            rms_norm_eps=model.rms_norm_eps,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_dtype=DTYPE_CODES[kv_cache_dtype],
            max_num_batched_tokens=max_num_batched_tokens,
            num_pes=len(cpus),
            cpu_offsets=cpu_offsets.ctypes.data,
            cpus=flat_cpus.ctypes.data,
            tensors=tensors,
            num_tensors=len(tensors),
        )
        handle, message = ctypes.c_void_p(), FsMessage()
        status = self._library.fs_engine_create(
            ctypes.byref(config), self._isa.encode(), ctypes.byref(handle), ctypes.byref(message)
        )
        check(status, message)
        self._handle = handle.value

    @property
    def isa(self) -> str:
        """The kernel family; tokens are bit-identical within one family and weight type."""
        return self._isa

    def execute(self, batch: StepBatch) -> StepResult:
        """Run the whole step. Raises: InvalidRequestError for a batch that contradicts itself or
        the engine (nothing has run then); FuriosaLLMError if the model's logits are not finite.
        """
        handle = self._open_handle()
        native_batch, result = _batch_struct(batch), _empty_result(batch)
        message = FsMessage()
        status = self._library.fs_engine_step(
            handle,
            ctypes.byref(native_batch),
            ctypes.byref(_result_struct(result)),
            ctypes.byref(message),
        )
        check(status, message)
        return result

    def logits(self, batch: StepBatch) -> Float32:
        """The same forward step, KV write included; (S, vocab) logits instead of samples."""
        handle = self._open_handle()
        native_batch, message = _batch_struct(batch), FsMessage()
        logits = np.empty((len(batch.sample_rows), self._vocab_size), np.float32)
        status = self._library.fs_engine_logits(
            handle, ctypes.byref(native_batch), logits.ctypes.data, ctypes.byref(message)
        )
        check(status, message)
        return logits

    def close(self) -> None:
        """Free the KV cache and threads; idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.fs_engine_destroy(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _open_handle(self) -> int:
        if self._handle is None:
            raise EngineShutDownError("the executor is closed")
        return self._handle


def matmul(tensor: Tensor, x: Float32, *, isa: str | None = None) -> Float32:
    """One packed matrix product on one thread, for tests and benchmarks.

    Args:
        tensor: a packed matrix whose data starts at a multiple of 64 bytes.
        x: (rows, tensor.cols) float32.
        isa: as NativeExecutor's.
    Returns: x times the matrix transposed: (rows, tensor.rows) float32, a new array.
    """
    x = np.ascontiguousarray(x, np.float32)
    assert x.shape == (len(x), tensor.cols), f"x is {x.shape}"
    y = np.empty((len(x), tensor.rows), np.float32)
    message = FsMessage()
    status = library().fs_matmul(
        resolve_isa(isa).encode(),
        ctypes.byref(tensor_struct(tensor)),
        x.ctypes.data,
        len(x),
        y.ctypes.data,
        ctypes.byref(message),
    )
    check(status, message)
    return y


def sample(logits: Float32, batch: StepBatch, *, isa: str | None = None) -> StepResult:
    """The native sampler alone: `workers.sampler.sample` with the same arguments and result."""
    logits = np.array(logits, np.float32, order="C")  # a copy: the sampler edits it
    num_samples, vocab_size = logits.shape
    assert num_samples == len(batch.sample_rows), f"logits are {logits.shape}"
    native_batch, result, message = _batch_struct(batch), _empty_result(batch), FsMessage()
    status = library().fs_sample(
        resolve_isa(isa).encode(),
        ctypes.byref(native_batch),
        vocab_size,
        logits.ctypes.data,
        ctypes.byref(_result_struct(result)),
        ctypes.byref(message),
    )
    check(status, message)
    return result


def _tensor_table(artifact: Artifact) -> Any:
    """The C array of all tensors; a name that the artifact lacks is an entry without data."""
    names = [*_GLOBAL_TENSORS]
    for index in range(artifact.config.num_layers):
        names += [f"layers.{index}.{name}" for name in _LAYER_TENSORS]
    present = set(artifact.names)
    entries = [
        tensor_struct(artifact.tensor(name)) if name in present else FsTensor() for name in names
    ]
    return (FsTensor * len(entries))(*entries)


def tensor_struct(tensor: Tensor) -> FsTensor:
    """The C view of a tensor, whose data must outlive it."""
    return FsTensor(
        data=tensor.data.ctypes.data,
        nbytes=tensor.data.nbytes,
        dtype=DTYPE_CODES[tensor.dtype],
        rows=tensor.rows,
        cols=tensor.cols,
        has_min=tensor.has_min,
        rotated=tensor.rotated,
    )


def _batch_struct(batch: StepBatch) -> FsBatch:
    """Pointers into the batch's own arrays, whose types and lengths are checked here."""
    num_rows, num_samples = len(batch.context_lens), len(batch.sample_rows)
    lengths = {
        "row_offsets": num_rows + 1,
        "block_offsets": num_rows + 1,
        "history_offsets": num_samples + 1,
        "bias_offsets": num_samples + 1,
        "bias_values": len(batch.bias_ids),
        "suppressed_offsets": num_samples + 1,
    }
    flat = ("token_ids", "context_lens", "block_ids", "history_ids", "bias_ids", "suppressed_ids")
    pointers = {}
    for name, dtype in BATCH_ARRAYS.items():
        array: NDArray[Any] = getattr(batch, name)
        expected = lengths.get(name, len(array) if name in flat else num_samples)
        if array.dtype != dtype or array.shape != (expected,) or not array.flags.c_contiguous:
            raise InvalidRequestError(
                f"{name} is {array.dtype} {array.shape}; it must be a contiguous "
                f"{np.dtype(dtype)} ({expected},)"
            )
        pointers[name] = array.ctypes.data
    return FsBatch(
        num_tokens=len(batch.token_ids),
        num_rows=num_rows,
        num_samples=num_samples,
        max_logprobs=_num_columns(batch),
        num_block_ids=len(batch.block_ids),
        num_history_ids=len(batch.history_ids),
        num_bias_ids=len(batch.bias_ids),
        num_suppressed_ids=len(batch.suppressed_ids),
        **pointers,
    )


def _num_columns(batch: StepBatch) -> int:
    return max(0, int(batch.num_logprobs.max(initial=0)))


def _empty_result(batch: StepBatch) -> StepResult:
    num_samples, num_columns = len(batch.sample_rows), _num_columns(batch)
    return StepResult(
        token_ids=np.empty(num_samples, np.int32),
        logprobs=np.zeros(num_samples, np.float32),
        ranks=np.zeros(num_samples, np.int32),
        top_token_ids=np.full((num_samples, num_columns), -1, np.int32),
        top_logprobs=np.zeros((num_samples, num_columns), np.float32),
    )


def _result_struct(result: StepResult) -> FsResult:
    return FsResult(**{name: getattr(result, name).ctypes.data for name in RESULT_ARRAYS})
