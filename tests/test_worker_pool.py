"""The worker pool on real processes: events in order, dead epochs unheard, deaths made good."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from worker_process import make_add, make_configure

from furiosa_llm.engine import worker_pool
from furiosa_llm.engine.pool import NoWorkerLeft, WorkerDown, WorkerUp
from furiosa_llm.engine.supervisor import RestartPolicy
from furiosa_llm.engine.worker_pool import WorkerPool
from furiosa_llm.wire.codec import encode
from furiosa_llm.wire.messages import Added, Ping, Pong, Ready, Tokens
from furiosa_llm.wire.sockets import connect_dealer

CONFIGURE = make_configure("ipc://later", worker_id=0, epoch=1)


@contextmanager
def started(*configures):
    """A pool whose workers have been told to start, and the descriptor that wakes it."""
    wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK)
    pool = WorkerPool(configures, wakeup_fd)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()
        os.close(wakeup_fd)


def wait_for(pool, kind):
    """All events up to the first of this kind."""
    events = []
    while not any(isinstance(event, kind) for event in events):
        events += pool.wait()
    return events


@contextmanager
def impostor(pool, worker_id, epoch):
    """A socket that speaks in the name of a worker."""
    with zmq.Context() as context:
        dealer = connect_dealer(context, pool.endpoint, worker_id, epoch)
        dealer.setsockopt(zmq.LINGER, 5000)
        yield dealer
        dealer.close()


def ready(epoch, seq):
    return encode(Ready(0, epoch, seq, pid=1, isa="mock", num_blocks=1))


def test_a_worker_comes_up_works_and_is_gone():
    with started(CONFIGURE) as pool:
        assert not pool.is_complete
        assert wait_for(pool, WorkerUp) == [WorkerUp(0, "mock", 64)]
        assert pool.is_complete
        assert pool.up == [0]
        (pid,) = pool.pids
        pool.send(0, make_add(1, max_tokens=1))
        events = wait_for(pool, Tokens)
        assert [type(event) for event in events] == [Added, Tokens]
        socket = Path(pool.endpoint.removeprefix("ipc://"))
        assert socket.exists()
    assert not socket.exists()
    assert not os.path.exists(f"/proc/{pid}")


def test_a_dead_worker_is_replaced_under_the_next_epoch():
    with started(CONFIGURE) as pool:
        wait_for(pool, WorkerUp)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        *_, down = wait_for(pool, WorkerDown)
        assert "signal 9" in down.cause
        assert down.start_error is None
        pool.send(0, Ping(1))  # to nobody; it must not reach the successor
        wait_for(pool, WorkerUp)
        assert pool.pids != [pid]
        pool.send(0, make_add(1, max_tokens=1))
        *_, tokens = wait_for(pool, Tokens)
        assert tokens.epoch == 2


def test_strangers_dead_epochs_and_garbage_are_not_heard():
    with started(CONFIGURE) as pool:
        wait_for(pool, WorkerUp)
        for worker_id, epoch, frames in [
            (0, 7, [ready(7, 0)]),  # another epoch
            (5, 1, [encode(Pong(5, 1, 0, 1))]),  # no such worker
            (6, 1, [encode(Pong(0, 1, 1, 1))]),  # in another's name
            (7, 1, [b"\xff\x00"]),
            (8, 1, [b"two", b"frames"]),
        ]:
            with impostor(pool, worker_id, epoch) as dealer:
                dealer.send_multipart(frames)
        pool.send(0, Ping(9))
        assert wait_for(pool, Pong) == [Pong(0, 1, 1, 9)]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(encode(Pong(0, 1, 5, 1)), id="a gap"),
        pytest.param(encode(Pong(0, 1, 0, 1)), id="a number again"),
        pytest.param(ready(1, 1), id="ready twice"),
    ],
)
def test_a_worker_that_breaks_the_protocol_is_replaced(message):
    with started(CONFIGURE) as pool:
        wait_for(pool, WorkerUp)
        (pid,) = pool.pids
        with impostor(pool, 0, 1) as dealer:
            dealer.send(message)
            assert [type(event) for event in wait_for(pool, WorkerDown)] == [WorkerDown]
        wait_for(pool, WorkerUp)
        assert pool.pids != [pid]


def test_a_worker_that_cannot_start_says_why_and_is_not_tried_again(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "nonsense")
    bad = make_configure("ipc://later", worker_id=0, backend="native", artifact_path="/nowhere")
    with started(bad) as pool:
        (down,) = wait_for(pool, WorkerDown)
        assert "nowhere" in str(down.start_error)
        assert "code 69" in down.cause
        assert pool.pids == [None]


def test_a_worker_that_dies_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(
        worker_pool, "RestartPolicy", lambda: RestartPolicy(first_delay_s=0.001, max_crashes=2)
    )
    with started(CONFIGURE) as pool:
        num_deaths = 0
        while True:
            wait_for(pool, WorkerUp)
            (pid,) = pool.pids
            os.kill(pid, signal.SIGKILL)
            num_deaths += 1
            events = wait_for(pool, WorkerDown)
            if isinstance(events[-1], NoWorkerLeft):
                break
        assert num_deaths == 3
        assert "3 crashes within" in events[-1].reason
        assert pool.pids == [None]


def test_a_worker_that_takes_too_long_to_start_is_killed(monkeypatch):
    monkeypatch.setattr(worker_pool, "START_TIMEOUT_S", 0.0)
    with started(CONFIGURE) as pool:
        *_, down = wait_for(pool, WorkerDown)
        assert "not ready within 0 s" in str(down.start_error)
