"""Outputs on their way to a reader: merged when it is behind, in order, and never lost."""

import asyncio
import threading

import pytest

from furiosa_llm.errors import WorkerDiedError
from furiosa_llm.outputs import CompletionOutput, Logprob, RequestOutput
from furiosa_llm.server.mailbox import MAX_PIECES, ClientLeftError, Delivery, Mailbox


def output(*choices, cached=0):
    """Each choice: (index, text, token ids, finish reason)."""
    made = [CompletionOutput(*choice) for choice in choices]
    return RequestOutput("r", None, [1, 2], made, False, num_cached_tokens=cached)


def shown(deltas):
    return [(d.choice, d.text, d.token_ids, d.finish_reason) for d in deltas]


@pytest.fixture
async def mailbox():
    return Mailbox(Delivery(asyncio.get_running_loop()))


async def test_a_reader_that_keeps_up_gets_each_output(mailbox):
    sink = mailbox.sink(0)
    for i in range(3):
        sink.put(output((0, f"{i}", [i], None)))
        assert shown(await mailbox.take()) == [(0, f"{i}", [i], None)]
    assert mailbox.poll() == []


async def test_a_reader_that_is_behind_gets_one_piece_per_choice(mailbox):
    first, second = mailbox.sink(0), mailbox.sink(2)
    second.put(output((1, "c", [7], None)))
    for i in range(3 * MAX_PIECES):
        first.put(output((0, "a", [i], None), (1, "b", [i], None)))
    first.put(output((1, "!", [9], "stop")))
    deltas = await mailbox.take()
    await asyncio.sleep(0)
    count = 3 * MAX_PIECES
    assert shown(deltas) == [
        (0, "a" * count, list(range(count)), None),
        (1, "b" * count + "!", [*range(count), 9], "stop"),
        (3, "c", [7], None),
    ]


async def test_logprobs_are_merged_in_step_with_the_tokens(mailbox):
    sink = mailbox.sink(0)
    for i in range(3):
        entry = {i: Logprob(-1.0 * i)}
        choice = CompletionOutput(0, "x", [i], logprobs=[entry])
        sink.put(RequestOutput("r", None, [1], [choice], False))
    (delta,) = await mailbox.take()
    assert (
        [list(entry) for entry in delta.logprobs]
        == [[0], [1], [2]]
        == [[t] for t in delta.token_ids]
    )


async def test_an_error_comes_after_what_came_before_it(mailbox):
    sink = mailbox.sink(0)
    sink.put(output((0, "a", [1], None)))
    sink.put(WorkerDiedError("gone"))
    sink.put(WorkerDiedError("again"))
    assert shown(await mailbox.take()) == [(0, "a", [1], None)]
    for _ in range(2):
        with pytest.raises(WorkerDiedError, match="gone"):
            await mailbox.take()


async def test_a_client_that_left_ends_the_wait_and_drops_what_waits(mailbox):
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.leave()
    with pytest.raises(ClientLeftError):
        await waiting
    mailbox.sink(0).put(WorkerDiedError("gone"))
    await asyncio.sleep(0)
    with pytest.raises(ClientLeftError):
        mailbox.poll()


async def test_a_listener_is_told_once_for_many_outputs(mailbox):
    told = []
    mailbox.listener = lambda: told.append(shown(mailbox.poll()))
    for i in range(3):
        mailbox.sink(0).put(output((0, f"{i}", [i], None)))
    await asyncio.sleep(0)
    assert told == [[(0, "012", [0, 1, 2], None)]]


async def test_cached_tokens_are_counted_once_a_prompt(mailbox):
    for first in (0, 4):
        for _ in range(2):
            mailbox.put(first, output((0, "", [1], None), cached=3))
    assert mailbox.num_cached_tokens == 6


async def test_nothing_is_lost_between_threads(mailbox):
    count = 5000
    sink = mailbox.sink(0)

    def work():
        for i in range(count):
            sink.put(output((0, "x", [i], "stop" if i == count - 1 else None)))

    thread = threading.Thread(target=work)
    thread.start()
    token_ids = []
    while len(token_ids) < count:
        for delta in await mailbox.take():
            token_ids += delta.token_ids
    thread.join()
    assert token_ids == list(range(count))


def test_a_closed_loop_is_no_error_for_the_engine():
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(Delivery(loop))
    loop.close()
    mailbox.sink(0).put(output((0, "x", [1], None)))
    mailbox.sink(0).put(output((0, "x", [1], None)))
