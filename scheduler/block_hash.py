"""The name of a full block's content: a hash chained over every token up to the block's end.

Two blocks with equal hashes hold equal KV, because the KV of a token depends on all tokens before
it. The hash is a function of the token ids alone, the same in every process and on every machine
(Python's own `hash` is neither), so that front-end and workers can compare prefixes by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from sys import byteorder

HASH_BYTES = 16
"""128 bits: 2**40 blocks collide with a chance of 2**-49."""

ROOT_HASH = bytes(HASH_BYTES)
"""The parent of a sequence's first block."""


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block of `token_ids` behind the block that `parent` names."""
    packed = array("i", token_ids)
    if byteorder == "big":
        packed.byteswap()
    return blake2b(packed.tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of the full blocks of `token_ids`, in order; a partial last block has none."""
    hashes: list[bytes] = []
    parent = ROOT_HASH
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        hashes.append(parent)
    return hashes
