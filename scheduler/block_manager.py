"""Who holds which block of the KV pool.

A block is free, or listed in the tables of `ref_count` sequences. Only indices move here; the KV
itself belongs to the executor.

Invariants: the free blocks and the blocks with a positive ref-count partition the pool, and a
block's ref-count is the number of tables that list it.
"""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.scheduler.block_hash import ROOT_HASH, block_hash
from furiosa_llm.scheduler.free_blocks import FreeBlocks


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockManager:
    """Block tables and ref-counts. Growing a table costs O(1) per token, amortised."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = FreeBlocks(num_blocks)
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._tables: dict[int, list[int]] = {}
        self._frozen_tables: dict[int, tuple[int, ...]] = {}  # missing where the table changed

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, sequence_id: int, num_tokens: int) -> bool:
        """Give a new sequence a table that covers `num_tokens`; False, and nothing, if short."""
        assert sequence_id not in self._tables, f"sequence {sequence_id} has a table"
        num_needed = num_blocks_for(num_tokens, self.block_size)
        if num_needed > len(self._free):
            return False
        self._tables[sequence_id] = []
        self._extend(self._tables[sequence_id], num_needed)
        return True

    def append(self, sequence_id: int, num_tokens: int) -> bool:
        """Grow the sequence's table until it covers `num_tokens`; False, and nothing, if short."""
        table = self._tables[sequence_id]
        if num_tokens <= len(table) * self.block_size:
            return True
        num_missing = num_blocks_for(num_tokens, self.block_size) - len(table)
        if num_missing > len(self._free):
            return False
        self._extend(table, num_missing)
        self._frozen_tables.pop(sequence_id, None)
        return True

    def free(self, sequence_id: int) -> None:
        """Drop the sequence's table; blocks that no other table lists are free at once."""
        self._frozen_tables.pop(sequence_id, None)
        for block_id in reversed(self._tables.pop(sequence_id)):
            self._release(block_id)

    def fork(self, parent_id: int, child_id: int) -> None:
        """Give `child_id` the parent's blocks, shared. Before either writes into one: `unshare`."""
        assert child_id not in self._tables, f"sequence {child_id} has a table"
        table = self._tables[parent_id]
        for block_id in table:
            self._ref_counts[block_id] += 1
        self._tables[child_id] = list(table)

    def unshare(self, sequence_id: int, block_index: int) -> tuple[int, int] | None:
        """Make one block of a table the sequence's own, so that it may be written.

        Returns the (source, destination) block ids of the copy the executor then owes, or None
        where the block was not shared. The caller has made sure that a block is free.
        """
        table = self._tables[sequence_id]
        source = table[block_index]
        if self._ref_counts[source] == 1:
            return None
        destination = self._take(table[block_index - 1] if block_index > 0 else None)
        table[block_index] = destination
        self._frozen_tables.pop(sequence_id, None)
        self._release(source)
        return source, destination

    def table(self, sequence_id: int) -> tuple[int, ...]:
        """The sequence's block ids in order; the same tuple until the table changes."""
        frozen = self._frozen_tables.get(sequence_id)
        if frozen is None:
            frozen = self._frozen_tables[sequence_id] = tuple(self._tables[sequence_id])
        return frozen

    def ref_count(self, block_id: int) -> int:
        """How many tables list the block; 0 for a free one."""
        return self._ref_counts[block_id]

    def hashes(self, sequence_id: int, token_ids: Sequence[int]) -> list[bytes]:
        """The hashes of the full blocks of a sequence whose tokens in the KV are `token_ids`.

        Each block's hash is recorded with the block, so a block is hashed once however often and
        by however many of its sequences this is asked; a block that nobody asks about never is.
        """
        table, size = self._tables[sequence_id], self.block_size
        hashes: list[bytes] = []
        parent = ROOT_HASH
        for index in range(min(len(token_ids) // size, len(table))):
            known = self._hashes[table[index]]
            if known is None:
                known = block_hash(parent, token_ids[index * size : (index + 1) * size])
                self._hashes[table[index]] = known
            hashes.append(known)
            parent = known
        return hashes

    def _extend(self, table: list[int], num_blocks: int) -> None:
        for _ in range(num_blocks):
            table.append(self._take(table[-1] if table else None))

    def _take(self, previous: int | None) -> int:
        block_id = self._free.take(previous)
        self._ref_counts[block_id] = 1
        return block_id

    def _release(self, block_id: int) -> None:
        assert self._ref_counts[block_id] > 0, f"block {block_id} is freed twice"
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] == 0:
            self._hashes[block_id] = None
            self._free.add(block_id)
