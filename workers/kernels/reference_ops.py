"""The arithmetic of a decoder layer outside its matrices, in numpy: the oracle of the kernels.

Every operation works on each token by itself, in an order of sums that the token's own position
fixes: how tokens are cut into rows and steps cannot change a bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.workers.executor import Float32, Int32

# Attention runs over the context in pieces of this many keys, each one BLAS call of fixed shape.
PIECE_LEN = 64
# Queries at a time; it only bounds the memory that the scores take.
MAX_QUERIES = 64


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x * weight / sqrt(mean of x^2 over the last axis + eps), as a new array.

    Args:
        x: (..., size) float32.
        weight: (size,).
    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
    """
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    scaled: Float32 = x * (1 / np.sqrt(mean + eps)).astype(np.float32)
    return scaled * weight


def rotation(positions: Int32, inv_freq: Float32) -> tuple[Float32, Float32]:
    """Cosines and sines of the rotary embedding: two arrays (tokens, 1, head_dim / 2) float32.

    The angle is a float32 product, as transformers has it; at large positions its rounding shows.
    """
    angles = positions.astype(np.float32)[:, None, None] * inv_freq
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def rotate(x: Float32, cos: Float32, sin: Float32) -> Float32:
    """Rotate each head's pairs (i, i + head_dim / 2) by its token's angles, as a new array.

    Args:
        x: (tokens, heads, head_dim) float32.
        cos, sin: from `rotation`.
    Source: Su et al. 2021, "RoFormer", with the pairs as in transformers' `rotate_half`.
    """
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def swiglu(gate_up: Float32) -> Float32:
    """silu(gate) * up of (tokens, 2 * size), gate first: (tokens, size) float32, a new array.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """
    gate, up = np.split(gate_up, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) = inf is right: silu is then -0
        result: Float32 = gate / (1 + np.exp(-gate)) * up
    return result


def quantize_heads(x: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Round each head of each token to int8: x / scale, half to even, with scale max|x| / 127.

    Args:
        x: (tokens, heads, head_dim) float32.
    Returns: (tokens, heads, head_dim) int8; scales (tokens, heads, 1) float32, 0 for zeros.
    """
    scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(x, scales, out=np.zeros_like(x), where=scales > 0))
    return np.clip(q, -127, 127).astype(np.int8), scales


def attend(
    q: Float32, keys: Float32, values: Float32, positions: Int32, sliding_window: int
) -> Float32:
    """Causal attention of one sequence's tokens to its context.

    Args:
        q: (tokens, num_heads, head_dim) float32.
        keys, values: (num_kv_heads, context, head_dim) float32, finite; the context holds at least
            the positions 0 .. max(positions) and is a multiple of PIECE_LEN.
        positions: (tokens,) of the queries.
        sliding_window: how many of the latest positions, its own included, a token sees; 0: all.
    Returns: (tokens, num_heads, head_dim) float32, a new array.
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """
    slices = [slice(i, i + MAX_QUERIES) for i in range(0, len(q), MAX_QUERIES)]
    return np.concatenate(
        [_attend(q[part], keys, values, positions[part], sliding_window) for part in slices]
    )


def _attend(
    q: Float32, keys: Float32, values: Float32, positions: Int32, sliding_window: int
) -> Float32:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, context, _ = keys.shape
    grouped = q.reshape(num_tokens, num_kv_heads, 1, num_heads // num_kv_heads, head_dim)
    pieces = (num_kv_heads, context // PIECE_LEN, PIECE_LEN, head_dim)

    scores = np.matmul(grouped, keys.reshape(pieces).swapaxes(-1, -2)) * np.float32(head_dim**-0.5)
    scores = np.where(_visible(positions, context, sliding_window), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=(2, 4), keepdims=True))
    sums = _sum_pieces(weights.sum(axis=-1, keepdims=True))
    mixed = _sum_pieces(np.matmul(weights, values.reshape(pieces)))
    return (mixed / sums).reshape(num_tokens, num_heads, head_dim)


def _visible(positions: Int32, context: int, sliding_window: int) -> NDArray[np.bool_]:
    """Which keys each token sees, shaped as the scores: (tokens, 1, pieces, 1, PIECE_LEN)."""
    keys = np.arange(context)
    queries = positions[:, None]
    visible = keys <= queries
    if sliding_window:
        visible &= keys > queries - sliding_window
    return visible.reshape(len(positions), 1, -1, 1, PIECE_LEN)


def _sum_pieces(parts: Float32) -> Float32:
    """Sum over axis 2 from left to right; pieces that a token does not see add zeros."""
    total = parts[:, :, 0].copy()
    for piece in range(1, parts.shape[2]):
        total += parts[:, :, piece]
    return total
