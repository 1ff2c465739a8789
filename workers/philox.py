"""Random numbers without a stream: Philox4x32-10, a function of a counter and a key.

A number depends on (seed, choice, position) and on nothing drawn before it, so a sequence that is
resumed, moved or recomputed samples the same tokens again.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the constants and the
known answers in the tests are those of its Random123 library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]

NUM_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox4x32(counter: UInt32, key: UInt32) -> UInt32:
    """Encrypt each counter with its key.

    Args:
        counter: (rows, 4) uint32.
        key: (rows, 2) uint32.
    Returns: (rows, 4) uint32, a new array.
    """
    # Words are held in 64 bits, so that a 32 x 32 product needs no splitting.
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64).T
    for _ in range(NUM_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _WORD_BITS) ^ c1 ^ k0,
            p1 & _LOW_WORD,
            (p0 >> _WORD_BITS) ^ c3 ^ k1,
            p0 & _LOW_WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_WORD, (k1 + _KEY_STEPS[1]) & _LOW_WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(seed: UInt64, position: NDArray[np.integer], choice: NDArray[np.integer]) -> Float64:
    """The random number of each token: in [0, 1), of 53 bits.

    Args:
        seed: (rows,) uint64; its low word is the first word of the key.
        position: (rows,) absolute position of the token that is sampled.
        choice: (rows,) index of the choice inside its request.
    Returns: (rows,) float64.
    """
    counter = np.zeros((len(seed), 4), np.uint32)
    counter[:, 0], counter[:, 1] = position, choice
    key = np.stack([seed & _LOW_WORD, seed >> _WORD_BITS], axis=-1).astype(np.uint32)
    words = philox4x32(counter, key).astype(np.uint64)
    bits = ((words[:, 0] << _WORD_BITS) | words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
