"""A sequence's first step is told to its front-end once, as an age."""

from furiosa_llm.scheduler.step_plan import StepRow
from furiosa_llm.wire.codec import MAX_ROWS
from furiosa_llm.wire.messages import first_sequence_id
from furiosa_llm.workers.first_steps import FirstSteps


def rows(*sequence_ids):
    return [StepRow(sequence_id, 0, (5,), (0,), None) for sequence_id in sequence_ids]


def test_each_is_told_once_with_the_age_of_its_first_step():
    steps = FirstSteps()
    for sequence_id in (1, 2):
        steps.added(sequence_id)
    steps.ran(rows(1), 10.0)
    steps.ran(rows(1, 2), 11.0)
    assert dict(steps.take(0, 12.0)) == {1: 2.0, 2: 1.0}
    steps.ran(rows(1, 2), 13.0)
    assert steps.take(0, 14.0) == ()


def test_every_front_end_hears_of_its_own():
    other = first_sequence_id(3) + 1
    steps = FirstSteps()
    steps.added(1)
    steps.added(other)
    steps.ran(rows(1, other), 10.0)
    assert steps.take(0, 10.5) == ((1, 0.5),)
    assert steps.take(3, 11.0) == ((other, 1.0),)


def test_what_was_dropped_is_not_told():
    steps = FirstSteps()
    for sequence_id in (1, 2):
        steps.added(sequence_id)
    steps.dropped(1)
    steps.ran(rows(1, 2), 10.0)
    steps.dropped(2)
    steps.dropped(7)
    assert steps.take(0, 11.0) == ()


def test_more_than_a_message_holds_are_not_told():
    steps = FirstSteps()
    for sequence_id in range(MAX_ROWS + 5):
        steps.added(sequence_id)
        steps.ran(rows(sequence_id), 1.0)
    assert len(steps.take(0, 2.0)) == MAX_ROWS
