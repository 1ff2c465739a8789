"""Free blocks: a sequence's ids are neighbours as long as a cluster is unused; none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.scheduler.block_manager import BlockManager
from furiosa_llm.scheduler.free_blocks import CLUSTER_BLOCKS, FreeBlocks


def test_sequences_that_grow_in_turn_have_neighbouring_ids_each():
    blocks = BlockManager(num_blocks=4 * CLUSTER_BLOCKS, block_size=1)
    for sequence_id in range(4):
        assert blocks.allocate(sequence_id, 5)
    for num_tokens in range(6, CLUSTER_BLOCKS + 1):
        for sequence_id in range(4):
            assert blocks.append(sequence_id, num_tokens)
    for sequence_id in range(4):
        first = blocks.table(sequence_id)[0]
        assert first % CLUSTER_BLOCKS == 0
        assert blocks.table(sequence_id) == tuple(range(first, first + CLUSTER_BLOCKS))


def test_an_unused_cluster_comes_before_what_was_freed_last():
    free = FreeBlocks(2 * CLUSTER_BLOCKS)
    assert {free.take(), free.take()} == {0, CLUSTER_BLOCKS}
    assert free.take(0) == 1
    free.add(CLUSTER_BLOCKS)
    free.add(1)
    assert free.take() == CLUSTER_BLOCKS
    assert free.take() == 1, "no cluster is unused any more"


def test_the_next_id_of_a_full_cluster_is_not_preferred():
    """It begins another cluster, whose memory is elsewhere, and which some sequence may be in."""
    free = FreeBlocks(3 * CLUSTER_BLOCKS)
    table = [free.take()]
    other = free.take()
    free.take(other)
    free.add(other)
    while len(table) < CLUSTER_BLOCKS:
        table.append(free.take(table[-1]))
    assert other == table[-1] + 1
    assert free.take(table[-1]) == 2 * CLUSTER_BLOCKS


@given(st.integers(1, 3 * CLUSTER_BLOCKS), st.data())
def test_every_block_is_taken_once_and_can_be_freed(num_blocks, data):
    free = FreeBlocks(num_blocks)
    taken: list[int] = []
    for _ in range(num_blocks):
        previous = data.draw(st.none() | st.integers(0, num_blocks - 1), label="previous")
        is_unused = [
            not any(block_id // CLUSTER_BLOCKS == cluster for block_id in taken)
            for cluster in range(-(-num_blocks // CLUSTER_BLOCKS))
        ]
        block_id = free.take(previous)
        assert 0 <= block_id < num_blocks
        assert block_id not in taken
        follows = previous is not None and block_id == previous + 1
        begins = block_id % CLUSTER_BLOCKS == 0 and is_unused[block_id // CLUSTER_BLOCKS]
        assert follows or begins or not any(is_unused)
        taken.append(block_id)
    assert len(free) == 0
    with pytest.raises(AssertionError, match="no block is free"):
        free.take()
    for block_id in taken:
        free.add(block_id)
        with pytest.raises(AssertionError, match="freed twice"):
            free.add(block_id)
    assert len(free) == num_blocks
    assert free.take() % CLUSTER_BLOCKS == 0
