"""The free blocks of a KV pool, and which of them a sequence gets next.

A worker's kernel keeps blocks of neighbouring ids side by side, a cluster at a time, and reads a
long stretch faster than the same bytes here and there (docs/decisions/004). So a sequence begins in
a cluster that nobody uses and goes on with the next id in it. Nothing is reserved: where no cluster
is unused, any free block does, the last freed first.
"""

from __future__ import annotations

CLUSTER_BLOCKS = 16
"""As in workers/kernels/native/kernel_table.h."""


class FreeBlocks:
    """Block ids below `num_blocks`, all free at first. Every call is O(1), amortised."""

    def __init__(self, num_blocks: int) -> None:
        # As ordered sets: the last added is taken first, and any can be taken out.
        self._free = dict.fromkeys(reversed(range(num_blocks)))
        num_clusters = -(-num_blocks // CLUSTER_BLOCKS)
        self._unused = dict.fromkeys(reversed(range(num_clusters)))
        self._num_taken = [0] * num_clusters

    def __len__(self) -> int:
        return len(self._free)

    def take(self, previous: int | None = None) -> int:
        """A free block for the place after `previous` in a table; None: for its first place."""
        assert self._free, "no block is free"
        # popitem, not del, at an end: what is deleted there would be gone through each time.
        if previous is not None and self._is_next(previous + 1):
            block_id = previous + 1
            del self._free[block_id]
        elif self._unused:
            block_id = self._unused.popitem()[0] * CLUSTER_BLOCKS
            del self._free[block_id]
        else:
            block_id = self._free.popitem()[0]
        cluster = block_id // CLUSTER_BLOCKS
        self._unused.pop(cluster, None)
        self._num_taken[cluster] += 1
        return block_id

    def add(self, block_id: int) -> None:
        """Free a block that was taken."""
        assert block_id not in self._free, f"block {block_id} is freed twice"
        self._free[block_id] = None
        cluster = block_id // CLUSTER_BLOCKS
        self._num_taken[cluster] -= 1
        if self._num_taken[cluster] == 0:
            self._unused[cluster] = None

    def _is_next(self, block_id: int) -> bool:
        return block_id in self._free and block_id % CLUSTER_BLOCKS != 0
