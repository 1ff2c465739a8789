"""The numpy executor: the oracle of the native one, and the backend where that cannot be built.

It runs any artifact, simply: weights are unpacked once at load, each step goes layer by layer
through `reference_ops`. Products with int8 and int4 weights quantise their activations just as the
native kernels do. Bits do not depend on the batch, on chunks or on threads (`reference_matmul`
and `reference_ops` say why).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import EngineShutDownError, InvalidRequestError
from furiosa_llm.workers import sampler
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.model_config import ModelConfig
from furiosa_llm.workers.artifact.packing import from_bf16, to_bf16
from furiosa_llm.workers.executor import Float32, Int32, StepBatch, StepResult
from furiosa_llm.workers.kernels.reference_matmul import Matrix, load_matrix
from furiosa_llm.workers.kernels.reference_ops import (
    PIECE_LEN,
    attend,
    quantize_heads,
    rms_norm,
    rotate,
    rotation,
    swiglu,
)

KV_CACHE_DTYPES = ("fp32", "bf16", "int8")


class ReferenceExecutor:
    """Implements `Executor` in numpy.

    Args:
        artifact: the model.
        num_blocks, block_size: the KV cache; memory is taken as blocks are first written.
        kv_cache_dtype: fp32, bf16 or int8.
        limits_pairs: see `load_matrix`.
    Raises: InvalidRequestError for another kv_cache_dtype.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: str,
        limits_pairs: bool = False,
    ) -> None:
        if kv_cache_dtype not in KV_CACHE_DTYPES:
            raise InvalidRequestError(
                f"the KV cache type is {kv_cache_dtype!r}; it must be one of "
                f"{', '.join(KV_CACHE_DTYPES)}",
                param="kv_cache_dtype",
            )
        self._config = artifact.config
        self._weights: _Weights | None = _Weights.of(artifact, limits_pairs)
        self._cache: _KVCache | None = _KVCache(
            artifact.config, num_blocks, block_size, kv_cache_dtype
        )

    @property
    def isa(self) -> str:
        """The kernel family."""
        return "numpy"

    def execute(self, batch: StepBatch) -> StepResult:
        """Run the whole step. Raises: FuriosaLLMError if the model's logits are not finite."""
        return sampler.sample(self.logits(batch), batch)

    def logits(self, batch: StepBatch) -> Float32:
        """The same forward step, KV write included; (S, vocab) logits instead of samples."""
        hidden = self._forward(batch)
        last_tokens = batch.row_offsets[batch.sample_rows + 1] - 1
        return self._project(hidden[last_tokens])

    def all_logits(self, batch: StepBatch) -> Float32:
        """The logits after every token of the step, not only a sampling row's last: (T, vocab)."""
        return self._project(self._forward(batch))

    def close(self) -> None:
        """Free the weights and the KV cache; idempotent."""
        self._weights = self._cache = None

    def _project(self, hidden: Float32) -> Float32:
        weights, eps = self._open()[0], self._config.rms_norm_eps
        return weights.lm_head.product(rms_norm(hidden, weights.final_norm, eps))

    def _forward(self, batch: StepBatch) -> Float32:
        """The residual stream after the last layer, (T, hidden_size); writes the KV cache."""
        weights, cache = self._open()
        config, eps = self._config, self._config.rms_norm_eps
        rows = _rows_of(batch)
        positions = np.concatenate([row.positions for row in rows])
        slots = np.concatenate([cache.slots(row.block_ids, row.positions) for row in rows])
        cos, sin = rotation(positions, weights.inv_freq)
        x = weights.embed.take_rows(batch.token_ids)
        for index, layer in enumerate(weights.layers):
            q, k, v = layer.project_qkv(rms_norm(x, layer.attn_norm, eps), config)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            cache.write(index, slots, k, v)
            mixed = np.empty_like(q)
            for row in rows:
                keys, values = cache.read(index, row.block_ids, int(row.positions[-1]) + 1)
                mixed[row.tokens] = attend(
                    q[row.tokens], keys, values, row.positions, config.sliding_window
                )
            x = x + layer.o.product(mixed.reshape(len(x), -1))
            gate_up = layer.gate_up.product(rms_norm(x, layer.ffn_norm, eps))
            x = x + layer.down.product(swiglu(gate_up))
        return x

    def _open(self) -> tuple[_Weights, _KVCache]:
        if self._weights is None or self._cache is None:
            raise EngineShutDownError("the executor is closed")
        return self._weights, self._cache


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: Float32
    qkv: Matrix
    qkv_bias: Float32 | None
    q_norm: Float32 | None
    k_norm: Float32 | None
    o: Matrix
    ffn_norm: Float32
    gate_up: Matrix
    down: Matrix

    def project_qkv(self, x: Float32, config: ModelConfig) -> tuple[Float32, Float32, Float32]:
        """Each (tokens, its heads, head_dim), before the rotation."""
        qkv = self.qkv.product(x)
        if self.qkv_bias is not None:
            qkv += self.qkv_bias
        heads = qkv.reshape(len(x), -1, config.head_dim)
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, config.rms_norm_eps)
            k = rms_norm(k, self.k_norm, config.rms_norm_eps)
        return q, k, v


@dataclass(frozen=True, slots=True)
class _Weights:
    embed: Matrix
    layers: tuple[_Layer, ...]
    final_norm: Float32
    lm_head: Matrix
    inv_freq: Float32

    @classmethod
    def of(cls, artifact: Artifact, limits_pairs: bool) -> _Weights:
        names = frozenset(artifact.names)

        def matrix(name: str) -> Matrix:
            return load_matrix(artifact.tensor(name), limits_pairs=limits_pairs)

        def vector(name: str) -> Float32 | None:
            return artifact.vector(name) if name in names else None

        layers = tuple(
            _Layer(
                attn_norm=artifact.vector(f"layers.{i}.attn_norm"),
                qkv=matrix(f"layers.{i}.qkv"),
                qkv_bias=vector(f"layers.{i}.qkv_bias"),
                q_norm=vector(f"layers.{i}.q_norm"),
                k_norm=vector(f"layers.{i}.k_norm"),
                o=matrix(f"layers.{i}.o"),
                ffn_norm=artifact.vector(f"layers.{i}.ffn_norm"),
                gate_up=matrix(f"layers.{i}.gate_up"),
                down=matrix(f"layers.{i}.down"),
            )
            for i in range(artifact.config.num_layers)
        )
        embed = matrix("embed")
        return cls(
            embed=embed,
            layers=layers,
            final_norm=artifact.vector("final_norm"),
            lm_head=embed if artifact.config.tied_embeddings else matrix("lm_head"),
            inv_freq=artifact.vector("rope_inv_freq"),
        )


class _KVCache:
    """Keys and values in blocks: (layers, 2, blocks, kv_heads, block_size, head_dim).

    int8 has a float32 scale for each head of a token: max|x| / 127, x / scale rounded half to even.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: str) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        stored = {"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}[dtype]
        self._blocks: NDArray[Any] = np.zeros(shape, stored)
        self._scales = np.zeros((*shape[:-1], 1) if dtype == "int8" else (0,), np.float32)

    def slots(self, block_ids: Int32, positions: Int32) -> NDArray[np.integer]:
        """Where the tokens at these positions of a sequence are kept."""
        block_of_token = block_ids[positions // self._block_size]
        assert (block_of_token >= 0).all(), "a block id is negative"
        assert (block_of_token < self._num_blocks).all(), "a block id is out of range"
        slots: NDArray[np.integer] = (
            block_of_token.astype(np.int64) * self._block_size + positions % self._block_size
        )
        return slots

    def write(self, layer: int, slots: NDArray[np.integer], k: Float32, v: Float32) -> None:
        """Store (tokens, kv_heads, head_dim) keys and values, rounded to the cache's type."""
        block_of_token, offsets = np.divmod(slots, self._block_size)
        for part, values in enumerate((k, v)):
            place = (layer, part, block_of_token, slice(None), offsets)
            if self._blocks.dtype == np.int8:
                self._blocks[place], self._scales[place] = quantize_heads(values)
            elif self._blocks.dtype == np.uint16:
                self._blocks[place] = to_bf16(values)
            else:
                self._blocks[place] = values

    def read(self, layer: int, block_ids: Int32, context: int) -> tuple[Float32, Float32]:
        """A sequence's keys and values, (kv_heads, context rounded up to pieces, head_dim) each.

        What is beyond `context` is zeros.
        """
        block_ids = block_ids[: -(-context // self._block_size)]
        padded_len = -(-context // PIECE_LEN) * PIECE_LEN
        found = []
        for part in range(2):
            stored = self._blocks[
                layer, part, block_ids
            ]  # (blocks, kv_heads, block_size, head_dim)
            blocks = from_bf16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)
            if stored.dtype == np.int8:
                blocks *= self._scales[layer, part, block_ids]
            tokens = blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1, blocks.shape[-1])
            padded = np.zeros((len(tokens), padded_len, blocks.shape[-1]), np.float32)
            padded[:, :context] = tokens[:, :context]
            found.append(padded)
        return found[0], found[1]


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: slice  # its part of the step's tokens
    positions: Int32
    block_ids: Int32


def _rows_of(batch: StepBatch) -> list[_Row]:
    rows = []
    for row in range(len(batch.context_lens)):
        start, end = int(batch.row_offsets[row]), int(batch.row_offsets[row + 1])
        context_len = int(batch.context_lens[row])
        rows.append(
            _Row(
                tokens=slice(start, end),
                positions=np.arange(context_len, context_len + end - start, dtype=np.int32),
                block_ids=batch.block_ids[batch.block_offsets[row] : batch.block_offsets[row + 1]],
            )
        )
    return rows
