"""From a plan to flat arrays, and pending tokens from what was sampled meanwhile."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.scheduler import Scheduler
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN, StepPlan, StepRow
from furiosa_llm.workers.batch import BatchBuilder, RecentSamples
from furiosa_llm.workers.executor import StepBatch

GREEDY = SequenceParams(max_tokens=9)
SAMPLED = SequenceParams(
    max_tokens=9, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5,
    presence_penalty=0.5, frequency_penalty=-0.25, bias_token_ids=(3, 8), bias_values=(1.5, -100.0),
    seed=2**64 - 1, choice_index=3, num_logprobs=2,
)  # fmt: skip


def samples(*steps: dict[int, int]) -> RecentSamples:
    recent = RecentSamples(len(steps))
    for step in steps:
        recent.remember(list(step), np.array(list(step.values()), np.int32))
    return recent


def build(*rows: StepRow, recent: RecentSamples | None = None) -> StepBatch:
    return BatchBuilder().build(StepPlan(0, rows)).resolve(recent or RecentSamples(1))


def test_rows_lie_end_to_end() -> None:
    batch = build(
        StepRow(10, start=0, token_ids=(1, 2, 3), block_ids=(5,), params=GREEDY),
        StepRow(11, start=4, token_ids=(4, 5), block_ids=(6, 7), params=None),
        StepRow(
            12, start=8, token_ids=(6,), block_ids=(8, 9, 0), params=SAMPLED,
            suppressed_token_ids=(2, 3), history=(1, 2, 6), num_history_prompt=2,
        ),
    )  # fmt: skip
    expected = {
        "token_ids": [1, 2, 3, 4, 5, 6],
        "row_offsets": [0, 3, 5, 6],
        "context_lens": [0, 4, 8],
        "block_ids": [5, 6, 7, 8, 9, 0],
        "block_offsets": [0, 1, 3, 6],
        "sample_rows": [0, 2],
        "temperature": [0, 0.5],
        "top_k": [0, 7],
        "top_p": [1, 0.25],
        "min_p": [0, 0.125],
        "repetition_penalty": [1, 1.5],
        "presence_penalty": [0, 0.5],
        "frequency_penalty": [0, -0.25],
        "seed": [0, 2**64 - 1],
        "choice_index": [0, 3],
        "num_logprobs": [-1, 2],
        "history_ids": [1, 2, 6],
        "history_offsets": [0, 0, 3],
        "history_prompt_lens": [0, 2],
        "bias_ids": [3, 8],
        "bias_values": [1.5, -100],
        "bias_offsets": [0, 0, 2],
        "suppressed_ids": [2, 3],
        "suppressed_offsets": [0, 0, 2],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert set(expected) == {field.name for field in dataclasses.fields(StepBatch)}


def test_a_step_that_samples_nothing_has_empty_columns() -> None:
    batch = build(StepRow(1, start=0, token_ids=(1,), block_ids=(0,), params=None))
    assert len(batch.sample_rows) == len(batch.temperature) == len(batch.suppressed_ids) == 0
    assert batch.history_offsets.tolist() == batch.suppressed_offsets.tolist() == [0]


def test_arrays_have_the_types_and_the_layout_that_kernels_read() -> None:
    batch = build(StepRow(1, start=0, token_ids=(1, 2), block_ids=(0, 1), params=SAMPLED))
    floats = {
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "bias_values",
    }  # fmt: skip
    for field in dataclasses.fields(StepBatch):
        array = getattr(batch, field.name)
        expected = np.float32 if field.name in floats else np.int32
        assert array.dtype == (np.uint64 if field.name == "seed" else expected), field.name
        assert array.flags.c_contiguous, field.name
        assert array.ndim == 1, field.name


def test_pending_tokens_come_from_the_steps_in_flight() -> None:
    recent = samples({1: 100, 2: 200}, {1: 101})
    batch = build(
        StepRow(
            1, start=6, token_ids=(PENDING_TOKEN,), block_ids=(0,), params=SAMPLED,
            history=(5, 6, PENDING_TOKEN, PENDING_TOKEN), num_pending=2,
        ),
        StepRow(
            2, start=3, token_ids=(7, PENDING_TOKEN), block_ids=(1,), params=SAMPLED,
            history=(8, PENDING_TOKEN), num_pending=1,
        ),
        recent=recent,
    )  # fmt: skip
    assert batch.token_ids.tolist() == [101, 7, 200]
    assert batch.history_ids.tolist() == [5, 6, 100, 101, 8, 200]


def test_recent_samples_forget_what_can_no_longer_be_pending() -> None:
    recent = samples({1: 100}, {2: 200}, {1: 101})
    assert recent.newest(1, 0) == 101
    assert recent.newest(1, 1) == 100
    recent.remember([2], np.array([201], np.int32))
    with pytest.raises(KeyError):
        recent.newest(1, 1)
    assert recent.newest(2, 1) == 200


def test_what_is_kept_between_batches_never_shows() -> None:
    """One builder over a long random run gives what a new one gives for each plan."""
    rng = random.Random(7)
    all_params = [GREEDY, SAMPLED, dataclasses.replace(GREEDY, seed=5)]
    tables = {i: (i,) for i in range(6)}
    builder = BatchBuilder()
    for step_id in range(200):
        rows = []
        for i in rng.sample(range(6), rng.randint(1, 6)):
            if rng.random() < 0.3:
                tables[i] = (*tables[i], step_id)
            rows.append(StepRow(i, step_id, (step_id,), tables[i], rng.choice(all_params)))
        plan = StepPlan(step_id, tuple(rows))
        kept, fresh = builder.build(plan), BatchBuilder().build(plan)
        for field in dataclasses.fields(StepBatch):
            name = field.name
            assert np.array_equal(getattr(kept.batch, name), getattr(fresh.batch, name)), name


@pytest.mark.parametrize("penalty", ["repetition_penalty", "frequency_penalty"])
@pytest.mark.parametrize("queue_limit", [1, 2, 4])
def test_with_steps_in_flight_every_row_sees_the_tokens_it_would_have_seen_without(
    queue_limit: int, penalty: str
) -> None:
    """A real scheduler, under memory pressure, against sequences that are only lists."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=12, block_size=2, max_model_len=20, max_num_seqs=6,
            max_num_batched_tokens=12, max_processing_samples=8, queue_limit=queue_limit,
        )
    )  # fmt: skip
    builder, recent = BatchBuilder(), RecentSamples(queue_limit)
    params = SequenceParams(max_tokens=8, **{penalty: 1.5})
    known = {i: [i * 10 + k for k in range(3 + i)] for i in range(6)}
    for i, prompt in known.items():
        assert scheduler.add(i, prompt, len(prompt), params) is None
    in_flight, num_steps, num_pending = [], 0, 0
    while scheduler.has_unfinished:
        num_steps += 1
        assert num_steps < 1000
        while (plan := scheduler.plan()) is not None:
            in_flight.append((plan, builder.build(plan)))
        plan, unresolved = in_flight.pop(0)
        num_pending += len(unresolved.token_places)
        batch = unresolved.resolve(recent)
        sampled = []
        for index, row in enumerate(plan.rows):
            tokens = batch.token_ids[batch.row_offsets[index] : batch.row_offsets[index + 1]]
            end = row.start + len(tokens)
            assert tokens.tolist() == known[row.sequence_id][row.start : end]
            if row.params is not None:
                place = len(sampled)
                history = slice(batch.history_offsets[place], batch.history_offsets[place + 1])
                num_prompt = 3 + row.sequence_id
                first = 0 if penalty == "repetition_penalty" else num_prompt
                assert batch.history_ids[history].tolist() == known[row.sequence_id][first:end]
                assert batch.history_prompt_lens[place] == num_prompt - first
                token_id = 1000 + row.sequence_id * 100 + end  # of the position, as it must be
                if len(known[row.sequence_id]) == end:
                    known[row.sequence_id].append(token_id)
                assert known[row.sequence_id][end] == token_id
                sampled.append(token_id)
        recent.remember(unresolved.sampling_ids, np.array(sampled, np.int32))
        scheduler.commit(plan.step_id, sampled)
    assert [len(tokens) for tokens in known.values()] == [3 + i + 8 for i in range(6)]
    assert scheduler.num_preemptions > 0
    assert (num_pending > 0) == (queue_limit > 1)
