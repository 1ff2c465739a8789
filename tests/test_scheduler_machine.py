"""The scheduler under random adds, aborts, plans and commits, against sequences run alone.

The fake executor has a KV memory: a row writes into the slots of its block table, and what it
samples is a function of all it reads back through that table. So a sequence gets the tokens it
gets alone only if no slot it reads was lost, skipped, or written by another, whatever was
preempted, chunked, aborted or in flight. Rows of a step run last first: they must be independent.

Two drivers share one model of what must hold. The state machine tries odd orders of single calls
and shrinks what it finds; the storms keep a small pool crowded for long, where preemptions meet
steps in flight.
"""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from furiosa_llm.scheduler.block_manager import num_blocks_for
from furiosa_llm.scheduler.config import PACKING_TYPES, SchedulerConfig
from furiosa_llm.scheduler.packing import MAX_BYPASSES
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.scheduler import DECODE_INTERVAL, Scheduler
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN

VOCAB_SIZE = 11
PRIME = (1 << 61) - 1


def kv_chain(token_ids, previous_kv=0):
    """Each token's KV: it depends on the token and on every one before it."""
    chain = []
    for token_id in token_ids:
        previous_kv = ((previous_kv + token_id + 1) * 0x9E3779B97F4A7C15) % PRIME
        chain.append(previous_kv)
    return chain


def sampled_of(context, params, suppressed_token_ids):
    """The token after a context, given the KV of each of its tokens; all of them count."""
    attended = sum(position * kv for position, kv in enumerate(context, params.seed + 1)) % PRIME
    token_id = attended % VOCAB_SIZE
    while token_id in suppressed_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def run_alone(prompt, params, max_model_len):
    """The output and the finish reason of a sequence that nothing disturbs."""
    output = []
    while len(prompt) + len(output) < max_model_len:
        suppressed = params.stop_token_ids if len(output) < params.min_tokens else ()
        output.append(sampled_of(kv_chain(prompt + output), params, suppressed))
        if output[-1] in params.stop_token_ids:
            return output, "stop"
        if len(output) == params.max_tokens:
            break
    return output, "length"


class FakeExecutor:
    """Runs plans in order. Its memory is never cleared: only plans keep sequences apart."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.kv_of_slot = {}
        self.sampled = {}  # sequence_id -> every token sampled under this id

    def execute(self, plan):
        token_of_row = {i: self.run_row(plan.rows[i]) for i in reversed(range(len(plan.rows)))}
        for index in plan.sampling_rows:
            sequence_id = plan.rows[index].sequence_id
            self.sampled.setdefault(sequence_id, []).append(token_of_row[index])
        return [token_of_row[index] for index in plan.sampling_rows]

    def run_row(self, row):
        """The token that the row samples, or None."""
        sampled = self.sampled.get(row.sequence_id, [])
        end = row.start + len(row.token_ids)
        slots = [
            (row.block_ids[position // self.block_size], position % self.block_size)
            for position in range(end)
        ]
        assert PENDING_TOKEN not in row.token_ids[:-1]
        token_ids = [sampled[-1] if t == PENDING_TOKEN else t for t in row.token_ids]
        previous_kv = self.kv_of_slot[slots[row.start - 1]] if row.start else 0
        written = kv_chain(token_ids, previous_kv)
        self.kv_of_slot.update(zip(slots[row.start :], written, strict=True))
        if row.params is None:
            return None
        context = [self.kv_of_slot[slot] for slot in slots]
        if row.params.needs_output:
            num_known = len(row.history) - row.num_pending
            assert set(row.history[num_known:]) <= {PENDING_TOKEN}
            pending = sampled[len(sampled) - row.num_pending :]
            history = [*row.history[:num_known], *pending]
            if row.params.needs_prompt:
                assert kv_chain(history) == context
                assert 0 < row.num_history_prompt <= len(history)
            else:  # the output alone, all of it
                first = end - len(history)
                assert row.num_history_prompt == 0
                assert kv_chain(history, context[first - 1]) == context[first:]
        else:
            assert row.history == ()
        return sampled_of(context, row.params, row.suppressed_token_ids)


@dataclass
class Held:
    """What the model knows of a sequence that the scheduler holds."""

    params: SequenceParams
    num_added_tokens: int
    expected: list[int]  # the tokens still to come when it runs alone
    finish_reason: str
    num_received: int = 0
    num_sampled: int = 0  # by the rows planned so far
    num_computed: int = 0  # by the rows planned so far, since the last (re)start
    block_ids: tuple[int, ...] = ()


class Model:
    """A scheduler, its executor, and what must be true of every call's result."""

    def __init__(self, config):
        self.config = config
        self.scheduler = Scheduler(config)
        self.executor = FakeExecutor(config.block_size)
        self.held: dict[int, Held] = {}
        self.planned = []  # not executed yet
        self.executed = []  # (plan, tokens), not committed yet
        self.seen = Counter()  # what happened, to tell that it did

    def add(self, sequence_id, prompt, params, num_done):
        """A new sequence, or one that ran elsewhere for `num_done` tokens."""
        scheduler, config = self.scheduler, self.config
        output, finish_reason = run_alone(prompt, params, config.max_model_len)
        token_ids = prompt + output[:num_done]
        max_len = min(config.max_model_len, len(prompt) + params.max_tokens)
        if sequence_id in self.held:
            expected = "duplicate_request"
        elif len(prompt) >= config.max_model_len:
            expected = "context_length_exceeded"
        elif num_done >= len(output):
            expected = "invalid_request"
        elif num_blocks_for(max_len - 1, config.block_size) > config.num_blocks:
            expected = "context_length_exceeded"
        elif len(self.held) >= config.max_processing_samples:
            expected = "overloaded"
        else:
            expected = None
        before = scheduler.num_waiting, scheduler.num_free_blocks
        refusal = scheduler.add(sequence_id, token_ids, len(prompt), params)
        assert (refusal and refusal.code) == expected
        if refusal:
            assert (scheduler.num_waiting, scheduler.num_free_blocks) == before
        else:
            self.held[sequence_id] = Held(
                params, len(token_ids), output[num_done:], finish_reason
            )  # fmt: skip

    def abort(self, sequence_id):
        assert self.scheduler.abort(sequence_id) == (sequence_id in self.held)
        self.held.pop(sequence_id, None)

    def plan(self):
        """Whether a step was planned."""
        is_full = self.scheduler.num_in_flight == self.config.queue_limit
        plan = self.scheduler.plan()
        if plan is None:
            assert is_full or self.scheduler.num_in_flight or not self.held, "nothing moves on"
            return False
        assert not is_full
        self.check(plan)
        self.planned.append(plan)
        return True

    def check(self, plan):
        config = self.config
        assert 0 < plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.rows) <= config.max_num_seqs
        assert len({row.sequence_id for row in plan.rows}) == len(plan.rows)
        blocks = [block_id for row in plan.rows for block_id in row.block_ids]
        assert len(blocks) == len(set(blocks)), "a block has two owners"
        assert set(blocks) <= set(range(config.num_blocks))
        for row in plan.rows:
            held = self.held[row.sequence_id]
            if row.start == 0 and held.num_computed:
                self.seen["restart"] += 1
            else:
                assert row.start == held.num_computed, "a position is skipped or computed twice"
                assert row.block_ids[: len(held.block_ids)] == held.block_ids
            held.block_ids = row.block_ids
            held.num_computed = row.start + len(row.token_ids)
            num_tokens = held.num_added_tokens + held.num_sampled
            assert held.num_computed <= num_tokens
            assert held.num_computed <= len(row.block_ids) * config.block_size
            assert row.params is (held.params if held.num_computed == num_tokens else None)
            held.num_sampled += row.params is not None
            self.seen["prefill on a pending token"] += (
                len(row.token_ids) > 1 and row.token_ids[-1] == PENDING_TOKEN
            )
            self.seen["chunk up to a pending token"] += row.params is None and (
                held.num_computed == held.num_added_tokens + held.num_received
            )
        assert self.seen["restart"] <= self.scheduler.num_preemptions

    def execute(self):
        plan = self.planned.pop(0)
        self.executed.append((plan, self.executor.execute(plan)))

    def commit(self):
        if not self.executed:
            self.execute()
        plan, token_ids = self.executed.pop(0)
        sampling_ids = [plan.rows[index].sequence_id for index in plan.sampling_rows]
        updates = self.scheduler.commit(plan.step_id, token_ids)
        row_indices = [update.row_index for update in updates]
        assert row_indices == sorted(set(row_indices))
        self.seen["dropped"] += len(sampling_ids) - len(updates)
        for update in updates:
            assert update.sequence_id == sampling_ids[update.row_index]
            assert update.token_id == token_ids[update.row_index]
            held = self.held[update.sequence_id]
            assert update.token_id == held.expected[held.num_received], "not what it gets alone"
            held.num_received += 1
            is_last = held.num_received == len(held.expected)
            assert update.finish_reason == (held.finish_reason if is_last else "")
            if is_last:
                del self.held[update.sequence_id]

    def run(self, num_steps, depth):
        """A stretch of the worker's loop: plan ahead up to `depth` steps, commit the oldest."""
        for _ in range(num_steps):
            while len(self.planned) + len(self.executed) < depth and self.plan():
                pass
            if self.planned or self.executed:
                self.commit()
            self.check_blocks()

    def check_counts(self):
        scheduler = self.scheduler
        assert scheduler.num_running + scheduler.num_waiting == len(self.held)
        assert scheduler.has_unfinished == bool(self.held)
        assert scheduler.num_in_flight == len(self.planned) + len(self.executed)
        assert scheduler.num_in_flight <= self.config.queue_limit

    def check_blocks(self):
        """Free and owned make up the pool; only running sequences own; no sequence, no owner."""
        blocks, running = self.scheduler._blocks, self.scheduler._running
        owned = [block for s in running for block in blocks.table(s.sequence_id)]
        assert len(owned) == len(set(owned))
        assert all(blocks.ref_count(block) == 1 for block in owned)
        assert self.scheduler.num_free_blocks + len(owned) == self.config.num_blocks
        assert {s.sequence_id for s in running} <= set(self.held)
        assert len(running) <= self.config.max_num_seqs

    def drain(self):
        """Without more adds everything ends, within a bound, and every block comes back."""
        # At worst one sequence ends after the other, each end preceded by one reign of every
        # other as the oldest, and no reign is longer than its tokens' steps, each bypassed at most
        # and put off by steps that decode nothing.
        num_held = len(self.held)
        max_reign = self.config.max_model_len * (MAX_BYPASSES + 1) * DECODE_INTERVAL
        for _ in range(num_held * (num_held + 1) // 2 * max_reign):
            if not self.held:
                break
            self.run(1, self.config.queue_limit)
        assert not self.held, "a sequence is starved"
        while self.planned or self.executed:
            self.commit()
        self.check_counts()
        assert self.scheduler.num_free_blocks == self.config.num_blocks
        assert self.scheduler.plan() is None


# --- odd orders -----------------------------------------------------------------------------------


@st.composite
def configs(draw):
    """Pools that hold one sequence at its longest and little more, so that sequences contend."""
    block_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(2, 40))
    num_blocks = num_blocks_for(max_model_len - 1, block_size) + draw(st.integers(-1, 6))
    return SchedulerConfig(
        num_blocks=max(1, num_blocks),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_processing_samples=draw(st.integers(1, 10)),
        queue_limit=draw(st.integers(1, 3)),
        spare_blocks_ratio=draw(st.sampled_from([0.0, 0.2, 0.9])),
        is_offline=draw(st.booleans()),
        packing_type=draw(st.sampled_from(PACKING_TYPES)),
    )


params = st.builds(
    SequenceParams,
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (), (3,), (0, 5)]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(config=configs())
    def start(self, config):
        note(f"{config}")
        self.model = Model(config)

    @rule(
        sequence_ids=st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True),
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=14),
        params=params,
        num_done=st.integers(0, 6),
    )
    def add(self, sequence_ids, prompt, params, num_done):
        for sequence_id in sequence_ids:
            own_params = replace(params, seed=sequence_id)
            self.model.add(sequence_id, [*prompt, sequence_id], own_params, num_done)

    @rule(sequence_id=st.integers(0, 9))
    def abort(self, sequence_id):
        self.model.abort(sequence_id)

    @rule()
    def plan(self):
        self.model.plan()

    @precondition(lambda self: self.model.planned)
    @rule()
    def execute(self):
        self.model.execute()

    @precondition(lambda self: self.model.planned or self.model.executed)
    @rule()
    def commit(self):
        self.model.commit()

    @rule(num_steps=st.integers(1, 12), depth=st.integers(1, 3))
    def run(self, num_steps, depth):
        self.model.run(num_steps, depth)

    @invariant()
    def holds(self):
        self.model.check_counts()
        self.model.check_blocks()

    def teardown(self):
        if hasattr(self, "model"):
            self.model.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = pytest.mark.slow(SchedulerMachine.TestCase)


# --- crowded pools --------------------------------------------------------------------------------

NUM_STORMS = 200


def storm_step(model, random):
    """Plan ahead, commit one. An abort may make room for a victim with tokens still in flight."""
    depth = random.randint(1, model.config.queue_limit)
    while model.scheduler.num_in_flight < depth:
        num_preemptions = model.scheduler.num_preemptions
        is_planned = model.plan()
        is_crowded = model.scheduler.num_preemptions > num_preemptions
        if model.held and random.random() < (0.5 if is_crowded else 0.01):
            model.abort(random.choice(sorted(model.held)))
        if not is_planned:
            break
    if model.planned or model.executed:
        model.commit()


def storm(seed):
    """A crowded pool for some hundred steps; the model after its drain."""
    random = Random(seed)
    block_size = random.randint(1, 4)
    max_model_len = random.randint(20, 48)
    config = SchedulerConfig(
        num_blocks=num_blocks_for(max_model_len - 1, block_size) + random.randint(0, 8),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=random.randint(2, 6),
        max_num_batched_tokens=random.choice([6, 16, 40, 120]),
        max_processing_samples=12,
        queue_limit=random.randint(1, 5),
        spare_blocks_ratio=random.choice([0.0, 0.0, 0.0, 0.2]),
        is_offline=random.random() < 0.3,
        packing_type=random.choice(PACKING_TYPES),
    )
    model = Model(config)
    for sequence_id in range(40):
        prompt = random.choices(range(VOCAB_SIZE), k=random.choice([1, 3, 8, 16]))
        sequence_params = SequenceParams(
            max_tokens=random.choice([1, 10, 40]),
            min_tokens=random.choice([0, 0, 20]),
            stop_token_ids=random.choice([(), (4,)]),
            repetition_penalty=random.choice([1.0, 1.1]),
            frequency_penalty=random.choice([0.0, 0.5]),
            seed=random.getrandbits(64),
        )
        model.add(sequence_id, prompt, sequence_params, random.choice([0, 0, 5]))
        for _ in range(random.choice([0, 1, 5])):
            storm_step(model, random)
            model.check_counts()
            model.check_blocks()
    model.drain()
    return model


@pytest.mark.slow
def test_storms_change_no_token_and_starve_nobody():
    seen = Counter()
    for seed in range(NUM_STORMS):
        try:
            model = storm(seed)
        except BaseException as error:
            error.add_note(f"storm({seed})")
            raise
        seen += model.seen
        seen["preemption"] += model.scheduler.num_preemptions
    # What the storms are for did happen.
    assert seen["preemption"] >= seen["restart"] > NUM_STORMS
    assert seen["dropped"] > NUM_STORMS
    assert seen["prefill on a pending token"] > NUM_STORMS // 20
    assert seen["chunk up to a pending token"] > NUM_STORMS // 20
