"""The scheduler's rules one by one, on small exact cases; test_scheduler_machine.py mixes them."""

from dataclasses import asdict

import pytest

from furiosa_llm import errors
from furiosa_llm.scheduler import scheduler as scheduler_module
from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.scheduler import DECODE_INTERVAL, Scheduler, SequenceUpdate
from furiosa_llm.scheduler.scheduler import INTERACTIVE_PREFILL_DIVISOR as PREFILL_DIVISOR
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN

STOP = 2
TOKEN = 7  # what every sampling row yields here unless a test says otherwise


@pytest.fixture(autouse=True)
def plain_steps(monkeypatch):
    """One rule at a time: prefill may fill a step, and every step decodes."""
    monkeypatch.setattr(scheduler_module, "INTERACTIVE_PREFILL_DIVISOR", 1)
    monkeypatch.setattr(scheduler_module, "DECODE_INTERVAL", 1)


@pytest.fixture
def interactive(monkeypatch, plain_steps):
    """The rules as they are."""
    monkeypatch.setattr(scheduler_module, "INTERACTIVE_PREFILL_DIVISOR", PREFILL_DIVISOR)
    monkeypatch.setattr(scheduler_module, "DECODE_INTERVAL", DECODE_INTERVAL)


def config_of(**changes):
    """A roomy scheduler with blocks of 4 tokens; each test narrows what it is about."""
    defaults = {
        "num_blocks": 64, "block_size": 4, "max_model_len": 64, "max_num_seqs": 8,
        "max_num_batched_tokens": 32, "max_processing_samples": 16, "queue_limit": 1,
    }  # fmt: skip
    return SchedulerConfig(**(defaults | changes))


def add(scheduler, sequence_id, num_tokens, *, max_tokens=8, num_prompt_tokens=None, **changes):
    params = SequenceParams(max_tokens=max_tokens, stop_token_ids=(STOP,), **changes)
    token_ids = range(100, 100 + num_tokens)
    return scheduler.add(sequence_id, token_ids, num_prompt_tokens or num_tokens, params)


def commit(scheduler, plan, token_id=TOKEN):
    return scheduler.commit(plan.step_id, [token_id] * len(plan.sampling_rows))


def step(scheduler):
    """Plan and commit one step; the rows as (sequence_id, start, number of tokens)."""
    plan = scheduler.plan()
    commit(scheduler, plan)
    return shape(plan)


def shape(plan):
    return [(row.sequence_id, row.start, len(row.token_ids)) for row in plan.rows]


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"num_blocks": 0}, {"block_size": 0}, {"max_model_len": 1}, {"max_num_seqs": 0},
    {"max_num_batched_tokens": 0}, {"max_processing_samples": 0}, {"queue_limit": 0},
    {"spare_blocks_ratio": 1.0}, {"spare_blocks_ratio": -0.1}, {"packing_type": "identity"},
])  # fmt: skip
def test_a_config_out_of_range_is_our_own_fault(changes):
    with pytest.raises(AssertionError):
        config_of(**changes)


# --- add ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_prompt", "max_tokens", "code", "counts"), [
    pytest.param(20, 20, 1, "context_length_exceeded", ["20", "by 1 "], id="prompt fills context"),
    pytest.param(25, 25, 1, "context_length_exceeded", ["25", "20", "by 6 "], id="prompt over it"),
    pytest.param(9, 9, 5, "context_length_exceeded",
                 ["9 tokens", "may have 5", "14", "4 blocks", "has 3", "13", "by 1,"],
                 id="one block over the pool"),
    pytest.param(9, 9, 99, "context_length_exceeded", ["may have 11", "by 7,"],
                 id="over the pool as far as the context goes"),
    pytest.param(9, 5, 4, "invalid_request", ["5 prompt", "4 output"], id="complete already"),
    pytest.param(20, 5, 99, "invalid_request", ["15 output", "20"], id="context full already"),
    pytest.param(0, 0, 4, "invalid_request", ["0 tokens"], id="no tokens"),
    pytest.param(4, 5, 4, "invalid_request", ["4 tokens", "5"], id="prompt beyond the tokens"),
    pytest.param(4, 4, 0, "invalid_request", ["max_tokens is 0"], id="asks for nothing"),
])  # fmt: skip
def test_what_can_never_run_is_refused_at_once(num_tokens, num_prompt, max_tokens, code, counts):
    scheduler = Scheduler(config_of(num_blocks=3, max_model_len=20))
    params = SequenceParams(max_tokens=max_tokens)
    refusal = scheduler.add(1, [5] * num_tokens, num_prompt, params)
    assert refusal.code == code
    for count in counts:
        assert count in refusal.message
    assert not scheduler.has_unfinished
    assert scheduler.plan() is None
    assert type(errors.from_wire(refusal.code, refusal.message)) is not errors.FuriosaLLMError


def test_what_just_fits_the_pool_runs_to_its_end():
    scheduler = Scheduler(config_of(num_blocks=3, max_model_len=20))
    assert add(scheduler, 1, 9, max_tokens=4) is None
    for _ in range(4):
        step(scheduler)
    assert not scheduler.has_unfinished


def test_a_held_id_is_refused_and_the_held_sequence_goes_on():
    scheduler = Scheduler(config_of())
    add(scheduler, 1, 3)
    assert add(scheduler, 1, 5).code == "duplicate_request"
    assert step(scheduler) == [(1, 0, 3)]


def test_more_than_max_processing_samples_are_overload():
    scheduler = Scheduler(config_of(max_processing_samples=2))
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    refusal = add(scheduler, 3, 3)
    assert refusal.code == "overloaded"
    assert "max_processing_samples is 2" in refusal.message
    scheduler.abort(1)
    assert add(scheduler, 3, 3) is None


def test_a_sequence_that_ended_with_a_stop_token_is_not_run_again():
    scheduler = Scheduler(config_of())
    params = SequenceParams(max_tokens=8, stop_token_ids=(STOP,))
    assert scheduler.add(1, [5, 6, STOP], 2, params).code == "invalid_request"
    assert scheduler.add(1, [5, 6, STOP], 3, params) is None  # in a prompt it means nothing


def test_a_moved_sequence_counts_its_output_from_its_prompt_s_end():
    scheduler = Scheduler(config_of())
    add(scheduler, 1, 6, num_prompt_tokens=4, max_tokens=3)
    plan = scheduler.plan()
    assert shape(plan) == [(1, 0, 6)]
    assert commit(scheduler, plan) == [SequenceUpdate(1, TOKEN, "length", 0)]


# --- steps ----------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_step():
    assert Scheduler(config_of()).plan() is None


def test_long_prompts_run_in_chunks_and_only_the_last_samples():
    scheduler = Scheduler(config_of(max_num_batched_tokens=4))
    add(scheduler, 1, 10)
    rows = []
    for _ in range(4):
        plan = scheduler.plan()
        rows += plan.rows
        commit(scheduler, plan)
    assert [row.token_ids for row in rows] == [
        (100, 101, 102, 103), (104, 105, 106, 107), (108, 109), (TOKEN,),
    ]  # fmt: skip
    assert [row.params is not None for row in rows] == [False, False, True, True]
    assert [len(row.block_ids) for row in rows] == [3, 3, 3, 3]


def test_decodes_come_first_and_prefill_takes_what_they_leave():
    scheduler = Scheduler(config_of(max_num_batched_tokens=8, is_offline=True))
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    assert step(scheduler) == [(1, 0, 3), (2, 0, 3)]
    add(scheduler, 3, 9)
    assert step(scheduler) == [(1, 3, 1), (2, 3, 1), (3, 0, 6)]
    assert step(scheduler) == [(1, 4, 1), (2, 4, 1), (3, 6, 3)]


def test_offline_prefill_takes_all_that_decodes_leave():
    scheduler = Scheduler(config_of(max_num_batched_tokens=16, is_offline=True))
    add(scheduler, 1, 3)
    add(scheduler, 2, 40)
    assert step(scheduler) == [(1, 0, 3), (2, 0, 13)]
    assert step(scheduler) == [(1, 3, 1), (2, 13, 15)]


@pytest.mark.usefixtures("interactive")
def test_interactive_steps_are_short_and_every_second_one_decodes_while_prompts_wait():
    scheduler = Scheduler(config_of(max_num_batched_tokens=64))
    for sequence_id in (1, 2, 3):
        add(scheduler, sequence_id, 4)
    assert step(scheduler) == [(1, 0, 4)]
    assert step(scheduler) == [(1, 4, 1), (2, 0, 4)]
    assert step(scheduler) == [(3, 0, 4)]
    assert step(scheduler) == [(1, 5, 1), (2, 4, 1), (3, 4, 1)]
    assert step(scheduler) == [(1, 6, 1), (2, 5, 1), (3, 5, 1)]


@pytest.mark.usefixtures("interactive")
def test_a_prompt_that_is_alone_gets_the_whole_step():
    scheduler = Scheduler(config_of(max_num_batched_tokens=64, max_model_len=128))
    add(scheduler, 1, 72)
    assert step(scheduler) == [(1, 0, 64)]
    add(scheduler, 2, 5)
    assert step(scheduler) == [(1, 64, 4)]
    assert step(scheduler) == [(1, 68, 4)]
    assert step(scheduler) == [(1, 72, 1), (2, 0, 4)]
    assert step(scheduler) == [(1, 73, 1), (2, 4, 1)]  # one token is left: that is a decode


@pytest.mark.usefixtures("interactive")
def test_a_short_prompt_waits_no_longer_for_the_decodes_of_others():
    """Of prompts without end, each step serves some; the one that decodes goes on beside them."""
    scheduler = Scheduler(config_of(max_num_batched_tokens=64, num_blocks=256))
    add(scheduler, 0, 4, max_tokens=30)
    step(scheduler)
    num_decodes = 0
    for sequence_id in range(1, 41):
        add(scheduler, sequence_id, 4, max_tokens=1)
        rows = step(scheduler)
        assert (sequence_id, 0, 4) in rows
        num_decodes += rows[0][0] == 0
    assert num_decodes == 20


def test_no_more_than_max_num_seqs_run():
    scheduler = Scheduler(config_of(max_num_seqs=2))
    for sequence_id in range(3):
        add(scheduler, sequence_id, 3, max_tokens=2)
    assert step(scheduler) == [(0, 0, 3), (1, 0, 3)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert step(scheduler) == [(0, 3, 1), (1, 3, 1)]
    assert step(scheduler) == [(2, 0, 3)]


@pytest.mark.parametrize(("packing_type", "rows"), [
    ("IDENTITY", [(1, 0, 8)]),
    ("GREEDY", [(1, 0, 2), (2, 0, 6)]),
])  # fmt: skip
def test_packing_shares_the_budget(packing_type, rows):
    scheduler = Scheduler(config_of(max_num_batched_tokens=8, packing_type=packing_type))
    add(scheduler, 1, 10)
    add(scheduler, 2, 6)
    assert step(scheduler) == rows


def test_greedy_packing_serves_a_long_prompt_within_its_bound():
    scheduler = Scheduler(config_of(max_num_batched_tokens=8, packing_type="GREEDY"))
    add(scheduler, 0, 10)
    for sequence_id in range(1, 100):
        add(scheduler, sequence_id, 8, max_tokens=1)
        if step(scheduler)[0][0] == 0:
            break
    assert sequence_id == 9  # passed over eight times


def test_order_of_arrival_is_kept_whatever_was_admitted_first():
    scheduler = Scheduler(config_of(max_num_batched_tokens=8, packing_type="GREEDY"))
    add(scheduler, 1, 9)
    add(scheduler, 2, 8)
    assert step(scheduler) == [(2, 0, 8)]
    while len(rows := step(scheduler)) < 2 or rows[1][0] == 1:
        pass
    assert [sequence_id for sequence_id, _, _ in rows] == [1, 2]


# --- the end of a sequence ------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "max_tokens", "num_output"), [
    pytest.param(4, 3, 3, id="max_tokens"), pytest.param(60, 99, 4, id="the context's end"),
])  # fmt: skip
@pytest.mark.parametrize("queue_limit", [1, 2, 3])
def test_length_ends_a_sequence_and_nothing_is_planned_past_it(
    num_tokens, max_tokens, num_output, queue_limit
):
    scheduler = Scheduler(config_of(queue_limit=queue_limit, max_num_batched_tokens=64))
    add(scheduler, 1, num_tokens, max_tokens=max_tokens)
    plans, reasons = [], []
    num_planned = 0
    while scheduler.has_unfinished:
        while plan := scheduler.plan():
            plans.append(plan)
            num_planned += 1
        reasons += [update.finish_reason for update in commit(scheduler, plans.pop(0))]
    assert reasons == [""] * (num_output - 1) + ["length"]
    assert num_planned == num_output
    assert scheduler.num_in_flight == 0


def test_a_stop_token_ends_a_sequence_and_what_was_planned_behind_it_is_dropped():
    scheduler = Scheduler(config_of(queue_limit=3))
    add(scheduler, 1, 3)
    plans = [scheduler.plan() for _ in range(3)]
    assert commit(scheduler, plans[0], STOP) == [SequenceUpdate(1, STOP, "stop", 0)]
    assert scheduler.num_free_blocks == 64
    assert commit(scheduler, plans[1]) == []
    assert commit(scheduler, plans[2]) == []


def test_stop_tokens_are_suppressed_before_min_tokens():
    scheduler = Scheduler(config_of(queue_limit=3))
    add(scheduler, 1, 3, min_tokens=2)
    plans = [scheduler.plan() for _ in range(3)]
    suppressed = [plan.rows[0].suppressed_token_ids for plan in plans]
    assert suppressed == [(STOP,), (STOP,), ()]


def test_the_blocks_of_a_last_token_are_free_for_the_next_step():
    scheduler = Scheduler(config_of(num_blocks=2, queue_limit=2))
    add(scheduler, 1, 8, max_tokens=1)
    add(scheduler, 2, 8, max_tokens=1)
    first, second = scheduler.plan(), scheduler.plan()
    assert shape(first) == [(1, 0, 8)]
    assert shape(second) == [(2, 0, 8)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)


# --- steps in flight ------------------------------------------------------------------------------


def test_no_more_than_queue_limit_steps_are_in_flight():
    scheduler = Scheduler(config_of(queue_limit=2))
    add(scheduler, 1, 3)
    plans = [scheduler.plan(), scheduler.plan()]
    assert scheduler.plan() is None
    assert scheduler.num_in_flight == 2
    commit(scheduler, plans[0])
    assert scheduler.plan().step_id == 2


def test_a_token_not_yet_known_is_pending_in_the_rows_behind_it():
    scheduler = Scheduler(config_of(queue_limit=3))
    add(scheduler, 1, 2, repetition_penalty=1.5)
    plans = [scheduler.plan() for _ in range(3)]
    rows = [plan.rows[0] for plan in plans]
    assert [row.token_ids for row in rows] == [(100, 101), (PENDING_TOKEN,), (PENDING_TOKEN,)]
    assert [row.history for row in rows] == [
        (100, 101), (100, 101, PENDING_TOKEN), (100, 101, PENDING_TOKEN, PENDING_TOKEN),
    ]  # fmt: skip
    assert [row.num_pending for row in rows] == [0, 1, 2]
    commit(scheduler, plans[0])
    row = scheduler.plan().rows[0]
    assert row.history == (100, 101, TOKEN, PENDING_TOKEN, PENDING_TOKEN)


def test_history_is_not_copied_without_a_repetition_penalty():
    scheduler = Scheduler(config_of(queue_limit=2))
    add(scheduler, 1, 2)
    rows = [scheduler.plan().rows[0] for _ in range(2)]
    assert [(row.history, row.num_pending) for row in rows] == [((), 0), ((), 0)]


def test_steps_are_committed_in_order_and_whole():
    scheduler = Scheduler(config_of(queue_limit=2))
    add(scheduler, 1, 3)
    first, second = scheduler.plan(), scheduler.plan()
    with pytest.raises(AssertionError, match="committed before"):
        commit(scheduler, second)
    scheduler = Scheduler(config_of())
    add(scheduler, 1, 3)
    with pytest.raises(AssertionError, match="samples 1 tokens, not 2"):
        scheduler.commit(scheduler.plan().step_id, [TOKEN, TOKEN])
    with pytest.raises(AssertionError, match="not in flight"):
        scheduler.commit(first.step_id, [])


# --- abort ----------------------------------------------------------------------------------------


def test_abort_frees_at_once_and_drops_what_is_in_flight():
    scheduler = Scheduler(config_of(queue_limit=2))
    add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    plans = [scheduler.plan(), scheduler.plan()]
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert scheduler.num_free_blocks == 63
    assert commit(scheduler, plans[0]) == [SequenceUpdate(2, TOKEN, "", 1)]
    assert scheduler.abort(2)
    assert scheduler.num_free_blocks == 64
    assert commit(scheduler, plans[1]) == []
    assert not scheduler.has_unfinished


def test_an_aborted_id_added_anew_gets_nothing_of_what_was_in_flight():
    scheduler = Scheduler(config_of(queue_limit=2))
    add(scheduler, 1, 3)
    old = scheduler.plan()
    scheduler.abort(1)
    add(scheduler, 1, 5)
    new = scheduler.plan()
    assert shape(new) == [(1, 0, 5)]
    assert commit(scheduler, old) == []
    assert commit(scheduler, new) == [SequenceUpdate(1, TOKEN, "", 0)]


# --- blocks ---------------------------------------------------------------------------------------


def test_the_latest_arrival_is_preempted_and_computed_again_with_its_tokens():
    scheduler = Scheduler(config_of(num_blocks=4))
    add(scheduler, 1, 7)
    add(scheduler, 2, 7)
    add(scheduler, 3, 3)
    assert step(scheduler) == [(1, 0, 7), (2, 0, 7)]
    assert step(scheduler) == [(1, 7, 1), (2, 7, 1)]
    assert step(scheduler) == [(1, 8, 1)]  # it takes a block that 2 gave up
    assert scheduler.num_preemptions == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    while (rows := step(scheduler))[0][0] == 1:
        pass
    assert rows == [(2, 0, 9), (3, 0, 3)]  # 2 before 3, with the two tokens it had
    while scheduler.has_unfinished:
        step(scheduler)


def test_a_token_sampled_before_the_preemption_was_known_still_counts():
    scheduler = Scheduler(config_of(num_blocks=4, queue_limit=2))
    add(scheduler, 1, 8)
    add(scheduler, 2, 8)
    first = scheduler.plan()
    second = scheduler.plan()
    assert shape(second) == [(1, 8, 1)]
    assert scheduler.num_preemptions == 1
    updates = commit(scheduler, first)
    assert [update.sequence_id for update in updates] == [1, 2]
    commit(scheduler, second)
    scheduler.abort(1)
    plan = scheduler.plan()
    assert plan.rows[0].token_ids == (*range(100, 108), TOKEN)
    assert commit(scheduler, plan)[0].sequence_id == 2


def test_a_preempted_sequence_may_resume_on_a_token_still_in_flight():
    scheduler = Scheduler(config_of(num_blocks=4, queue_limit=3))
    add(scheduler, 1, 8, max_tokens=2)
    add(scheduler, 2, 8)
    plans = [scheduler.plan(), scheduler.plan()]
    assert shape(plans[1]) == [(1, 8, 1)]  # 2 is preempted; 1 needs no step beyond this one
    plan = scheduler.plan()
    assert plan.rows[0].token_ids == (*range(100, 108), PENDING_TOKEN)


def test_a_preempted_sequence_that_ends_by_a_token_in_flight_does_not_run_again():
    scheduler = Scheduler(config_of(num_blocks=4, queue_limit=2))
    add(scheduler, 1, 8)
    add(scheduler, 2, 8)
    first, second = scheduler.plan(), scheduler.plan()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.commit(first.step_id, [TOKEN, STOP])
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    assert commit(scheduler, second)[0].sequence_id == 1


@pytest.mark.parametrize(("ratio", "num_admitted"), [(0.0, 5), (0.2, 4), (0.5, 2), (0.99, 1)])
def test_spare_blocks_are_kept_back_at_admission_but_never_from_the_only_one(ratio, num_admitted):
    scheduler = Scheduler(config_of(num_blocks=10, spare_blocks_ratio=ratio))
    for sequence_id in range(6):
        add(scheduler, sequence_id, 5, max_tokens=3)
    assert len(step(scheduler)) == num_admitted


def test_spare_blocks_are_for_growth():
    scheduler = Scheduler(config_of(num_blocks=10, spare_blocks_ratio=0.9))
    add(scheduler, 1, 3, max_tokens=37)
    for _ in range(37):
        step(scheduler)
    assert not scheduler.has_unfinished
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("is_offline", "num_admitted"), [(False, 5), (True, 3)])
def test_offline_admission_foresees_half_of_all_growth(is_offline, num_admitted):
    """Each has 2 blocks and may grow by 2: three need 6 + 6/2 of 10, four would need 12."""
    scheduler = Scheduler(config_of(num_blocks=10, is_offline=is_offline))
    for sequence_id in range(6):
        add(scheduler, sequence_id, 5, max_tokens=10)
    assert len(step(scheduler)) == num_admitted


def test_a_short_sequence_does_not_overtake_one_that_waits_for_blocks():
    scheduler = Scheduler(config_of(num_blocks=8, packing_type="GREEDY"))
    add(scheduler, 1, 16, max_tokens=3)
    add(scheduler, 2, 20)
    add(scheduler, 3, 2)
    assert step(scheduler) == [(1, 0, 16)]
    assert step(scheduler) == [(1, 16, 1)]
    assert step(scheduler) == [(1, 17, 1)]
    assert step(scheduler) == [(2, 0, 20), (3, 0, 2)]


def test_a_plan_is_a_value():
    """What the executor still works on does not change under it."""
    scheduler = Scheduler(config_of(num_blocks=4, queue_limit=3))
    add(scheduler, 1, 7, repetition_penalty=2.0)
    add(scheduler, 2, 7)
    plan = scheduler.plan()
    before = asdict(plan)
    scheduler.plan()
    scheduler.plan()
    commit(scheduler, plan)
    scheduler.abort(2)
    assert asdict(plan) == before
