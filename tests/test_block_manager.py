"""Blocks: every one is free or owned as often as it is listed; hashes name a block's content."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from furiosa_llm.scheduler.block_hash import ROOT_HASH, block_hash, block_hashes
from furiosa_llm.scheduler.block_manager import BlockManager, num_blocks_for

BLOCK_SIZE = 4
NUM_BLOCKS = 10


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [
    pytest.param(0, 0, id="nothing needs nothing"),
    pytest.param(1, 1, id="the first token opens one"),
    pytest.param(16, 1, id="exactly full"),
    pytest.param(17, 2, id="one past full"),
])  # fmt: skip
def test_num_blocks_for(num_tokens, num_blocks):
    assert num_blocks_for(num_tokens, 16) == num_blocks


def test_a_table_is_one_tuple_until_it_changes():
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.allocate(7, 3)
    table = blocks.table(7)
    assert blocks.append(7, 4)
    assert blocks.table(7) is table
    assert blocks.append(7, 5)
    assert blocks.table(7)[:2] == table
    assert len(blocks.table(7)) == 3


def test_what_does_not_fit_changes_nothing():
    blocks = BlockManager(num_blocks=3, block_size=2)
    assert not blocks.allocate(1, 7)
    assert blocks.num_free == 3
    assert blocks.allocate(1, 2)
    table = blocks.table(1)
    assert not blocks.append(1, 7)
    assert blocks.num_free == 2
    assert blocks.table(1) == table


def test_a_shared_block_is_copied_before_it_is_written():
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.allocate(1, 3)
    blocks.fork(1, 2)
    source = blocks.table(1)[1]
    assert blocks.unshare(2, 1) == (source, blocks.table(2)[1])
    assert blocks.table(1)[1] == source != blocks.table(2)[1]
    assert blocks.table(1)[0] == blocks.table(2)[0]
    assert blocks.unshare(2, 1) is None
    assert blocks.unshare(1, 1) is None


class BlockMachine(RuleBasedStateMachine):
    """Random calls against a model that is only a dict of tables."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.tables: dict[int, list[int]] = {}

    def num_free(self):
        return NUM_BLOCKS - len({block for table in self.tables.values() for block in table})

    def draw_id(self, data):
        return data.draw(st.sampled_from(sorted(self.tables)), label="sequence_id")

    @rule(sequence_id=st.integers(0, 5), num_tokens=st.integers(1, 20))
    def allocate(self, sequence_id, num_tokens):
        if sequence_id in self.tables:
            with pytest.raises(AssertionError):
                self.blocks.allocate(sequence_id, num_tokens)
            return
        num_needed = num_blocks_for(num_tokens, BLOCK_SIZE)
        fits = num_needed <= self.num_free()
        assert self.blocks.allocate(sequence_id, num_tokens) == fits
        if fits:
            self.tables[sequence_id] = list(self.blocks.table(sequence_id))
            assert len(self.tables[sequence_id]) == num_needed

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_tokens=st.integers(1, 30))
    def append(self, data, num_tokens):
        sequence_id = self.draw_id(data)
        table = self.tables[sequence_id]
        num_missing = max(0, num_blocks_for(num_tokens, BLOCK_SIZE) - len(table))
        fits = num_missing <= self.num_free()
        assert self.blocks.append(sequence_id, num_tokens) == fits
        if fits:
            grown = list(self.blocks.table(sequence_id))
            assert grown[: len(table)] == table
            assert len(grown) == len(table) + num_missing
            self.tables[sequence_id] = grown

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        sequence_id = self.draw_id(data)
        self.blocks.free(sequence_id)
        del self.tables[sequence_id]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), child_id=st.integers(0, 5))
    def fork(self, data, child_id):
        parent_id = self.draw_id(data)
        if child_id not in self.tables:
            self.blocks.fork(parent_id, child_id)
            self.tables[child_id] = list(self.tables[parent_id])

    @precondition(lambda self: self.tables and self.num_free())
    @rule(data=st.data())
    def unshare(self, data):
        sequence_id = self.draw_id(data)
        table = self.tables[sequence_id]
        index = data.draw(st.integers(0, len(table) - 1), label="block_index")
        is_shared = sum(table[index] in other for other in self.tables.values()) > 1
        copy = self.blocks.unshare(sequence_id, index)
        assert (copy is not None) == is_shared
        if copy is not None:
            source, destination = copy
            assert source == table[index]
            assert all(destination not in other for other in self.tables.values())
            table[index] = destination

    @invariant()
    def every_block_is_free_or_owned_as_often_as_listed(self):
        listed = [block for table in self.tables.values() for block in table]
        for block in range(NUM_BLOCKS):
            assert self.blocks.ref_count(block) == listed.count(block)
        assert self.blocks.num_free == self.num_free()

    @invariant()
    def tables_are_the_model_s(self):
        for sequence_id, table in self.tables.items():
            assert list(self.blocks.table(sequence_id)) == table
            assert len(set(table)) == len(table)


TestBlockMachine = pytest.mark.slow(BlockMachine.TestCase)


def test_a_hash_is_a_function_of_the_ids_alone():
    """Recomputed from its definition, so that no process or machine may differ."""
    packed = struct.pack("<3i", 1, 2, 70_000)
    first = hashlib.blake2b(packed, digest_size=16, key=bytes(16)).digest()
    assert block_hash(ROOT_HASH, [1, 2, 70_000]) == first
    assert first.hex() == "23714c3faf0cbe79cff012931e3b7821"
    second = hashlib.blake2b(packed, digest_size=16, key=first).digest()
    assert block_hashes([1, 2, 70_000] * 2 + [5], 3) == [first, second]


@given(
    left=st.lists(st.integers(0, 2), max_size=12),
    right=st.lists(st.integers(0, 2), max_size=12),
    size=st.integers(1, 4),
)
def test_hashes_are_equal_exactly_where_all_tokens_before_are(left, right, size):
    hashes = list(zip(block_hashes(left, size), block_hashes(right, size), strict=False))
    for index, (one, other) in enumerate(hashes):
        end = (index + 1) * size
        assert (one == other) == (left[:end] == right[:end])
    assert len(block_hashes(left, size)) == len(left) // size


def test_a_block_keeps_its_hash_until_it_is_free():
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.allocate(1, 5)
    hashes = blocks.hashes(1, [1, 2, 3, 4, 5])
    assert hashes == block_hashes([1, 2, 3, 4, 5], 2)
    blocks.fork(1, 2)
    blocks.free(1)
    assert blocks.hashes(2, [1, 2, 3, 4, 5]) == hashes
    blocks.free(2)
    blocks.allocate(3, 5)
    assert blocks.hashes(3, [9, 9, 9, 9, 9]) == block_hashes([9] * 5, 2)


def test_a_hash_is_computed_once(monkeypatch):
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.allocate(1, 6)
    token_ids = [1, 2, 3, 4, 5, 6]
    first = blocks.hashes(1, token_ids[:4])
    hashed = []
    monkeypatch.setattr(
        "furiosa_llm.scheduler.block_manager.block_hash",
        lambda parent, ids: hashed.append(list(ids)) or block_hash(parent, ids),
    )
    assert blocks.hashes(1, token_ids)[:2] == first
    assert hashed == [[5, 6]]
