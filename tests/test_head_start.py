"""Workers that are started before it is known what they are to do."""

import os
from pathlib import Path

import pytest
from worker_process import make_configure

from furiosa_llm import AsyncLLMEngine, EngineArgs
from furiosa_llm.engine.head_start import FreshWorker, HeadStart
from furiosa_llm.engine.pool import WorkerUp
from furiosa_llm.engine.worker_pool import WorkerPool
from furiosa_llm.errors import ArtifactError

CONFIGURE = make_configure("ipc://later", worker_id=0, epoch=1)


def is_running(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def children() -> set[str]:
    """The ids of this process's child processes, whichever thread has started them."""
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def test_the_engine_gets_the_process_that_was_started_for_it():
    fresh = FreshWorker(0, 1, "mock")
    wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK)
    with HeadStart([fresh]) as head_start:
        pool = WorkerPool((CONFIGURE,), wakeup_fd, head_start)
        try:
            pool.start()
            assert pool.pids == [fresh.process.pid]
            events = []
            while not events:
                events += pool.wait()
            assert events == [WorkerUp(0, "mock", 64)]
            head_start.close()  # it is the pool's now
            assert is_running(fresh.process.pid)
        finally:
            pool.close()
            os.close(wakeup_fd)
    assert not is_running(fresh.process.pid)
    assert fresh.log.closed


def test_those_that_nobody_has_taken_end():
    with HeadStart([FreshWorker(0, 1, "mock"), FreshWorker(1, 1, "mock")]) as head_start:
        taken = head_start.take(CONFIGURE)
        left = head_start.take(make_configure("ipc://later", worker_id=1, epoch=1))
        assert taken is not None
        assert left is not None
        assert head_start.take(CONFIGURE) is None
        left.discard()
    assert is_running(taken.process.pid)
    assert not is_running(left.process.pid)
    taken.discard()


@pytest.mark.parametrize("changed", [{"backend": "numpy"}, {"epoch": 2}, {"worker_id": 1}])
def test_a_process_is_taken_only_for_what_it_was_started_as(changed):
    with HeadStart([FreshWorker(0, 1, "mock")]) as head_start:
        configure = make_configure("ipc://later", **{"worker_id": 0, "epoch": 1} | changed)
        assert head_start.take(configure) is None


def test_what_is_wrong_with_the_devices_is_left_to_the_engine_to_say(
    monkeypatch: pytest.MonkeyPatch,
):
    before = children()
    with HeadStart.of(EngineArgs(model="any", devices="npu:99:0", backend="mock")):
        assert children() == before
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with HeadStart.of(EngineArgs(model="any", backend="mock")):
        assert children() == before


def test_an_engine_that_does_not_come_about_leaves_no_process():
    before = children()
    with pytest.raises(ArtifactError, match="no such file"):
        AsyncLLMEngine.from_engine_args(EngineArgs(model="/no/such/model", backend="mock"))
    assert children() == before
