"""A worker as its front-end meets it: a real process, a real socket, the mock backend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worker_process import (
    PATIENCE_MS,
    FrontEnd,
    WorkerProcess,
    is_running,
    make_add,
    wait_for_end,
)

from furiosa_llm.wire.codec import encode
from furiosa_llm.wire.messages import (
    Abort,
    Add,
    Added,
    Ping,
    Pong,
    Refused,
    Shutdown,
    StartFailed,
    Tokens,
)
from furiosa_llm.wire.pipe import pack_configure

SLOWLY = {"mock_tokens_per_s": 200.0}  # so that a test's message comes in mid-stream

# --- starting and ending --------------------------------------------------------------------------


def test_it_says_when_it_is_ready_and_leaves_when_told(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path) as worker:
        ready = worker.ready()
        assert (ready.seq, ready.pid, ready.isa) == (0, worker.process.pid, "mock")
        assert ready.num_blocks == worker.configure.num_blocks
        worker.send(Shutdown())
        assert worker.exit_code() == 0
        assert worker.stderr() == ""


@pytest.mark.parametrize("queue_limit", [1, 3])
def test_it_leaves_at_once_even_in_the_middle_of_its_work(tmp_path: Path, queue_limit: int) -> None:
    with WorkerProcess(tmp_path, npu_queue_limit=queue_limit, **SLOWLY) as worker:
        worker.ready()
        worker.send(make_add(1, max_tokens=200))
        worker.receive(Added)
        worker.receive(Tokens)
        worker.send(Shutdown())
        assert worker.exit_code() == 0
        assert worker.stderr() == ""


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_an_artifact_that_is_not_there_is_reported_with_its_path(
    tmp_path: Path, backend: str
) -> None:
    path = str(tmp_path / "no-such-artifact")
    with WorkerProcess(tmp_path, backend=backend, artifact_path=path) as worker:
        failed = worker.receive(StartFailed)
        assert failed.error_code == "invalid_artifact"
        assert path in failed.message
        assert worker.exit_code() == 69
        assert worker.stderr() == "", "a foreseen error is the front-end's to show"


def test_a_defect_at_the_start_is_reported_with_its_root_cause(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, vocab_size=2) as worker:  # the mock asserts that it has more
        failed = worker.receive(StartFailed)
        assert (failed.error_code, failed.message) == ("internal_error", "AssertionError: 2")
        assert worker.exit_code() == 69
        assert "Traceback" in worker.stderr()


def test_a_step_that_fails_ends_it_loudly(tmp_path: Path) -> None:
    for queue_limit in (1, 2):
        # Token 3 is the only one that the mock makes of such a vocabulary.
        with WorkerProcess(tmp_path, vocab_size=4, npu_queue_limit=queue_limit) as worker:
            worker.ready()
            poison = make_add(1, stop_token_ids=(3,), min_tokens=1)
            worker.send(Add(1, (3,), 1, poison.params))
            worker.receive(Added)
            assert worker.exit_code() == 70
            assert "every token is suppressed" in worker.stderr()


@pytest.mark.parametrize(
    ("on_stdin", "reason"),
    [
        pytest.param(b"", "the pipe ended 4 bytes before its frame did", id="nothing"),
        pytest.param(b"\x05\0\0\0ab", "the pipe ended 3 bytes", id="cut short"),
        pytest.param(b"\x05\0\0\0abcde", "not MessagePack", id="not a message"),
        pytest.param(b"\x03\0\0\0\x92\x01\x05", "is not expected here", id="not a Configure"),
    ],
)
def test_without_a_configuration_it_says_so_and_ends(on_stdin: bytes, reason: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "furiosa_llm.workers"],
        input=on_stdin,
        capture_output=True,
        timeout=PATIENCE_MS / 1000,
    )
    assert ended.returncode == 64
    assert "no configuration on standard input" in ended.stderr.decode()
    assert reason in ended.stderr.decode()


PARENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", "furiosa_llm.workers"], stdin=subprocess.PIPE)
worker.stdin.write(bytes.fromhex(sys.argv[1]))
worker.stdin.flush()
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in a long step"])
def test_it_dies_with_its_parent_however_that_dies(tmp_path: Path, is_busy: bool) -> None:
    with (
        FrontEnd(tmp_path, mock_tokens_per_s=0.001 if is_busy else 0) as front_end,
        subprocess.Popen(
            [sys.executable, "-c", PARENT, pack_configure(front_end.configure).hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent,
    ):
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        front_end.ready()
        if is_busy:
            front_end.send(make_add(1))
            front_end.receive(Added)
        assert is_running(pidfd)
        parent.kill()
        assert wait_for_end(pidfd), "the worker outlived its parent"


def test_ctrl_c_is_left_to_the_front_end(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path) as worker:
        worker.ready()
        worker.process.send_signal(signal.SIGINT)
        worker.send(Ping(5))
        assert worker.receive(Pong).nonce == 5


def test_it_is_ended_by_sigterm(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, mock_tokens_per_s=0.001) as worker:
        worker.ready()
        worker.send(make_add(1))
        worker.receive(Added)
        worker.process.terminate()
        assert worker.exit_code() == -signal.SIGTERM


def test_it_is_bound_to_the_cpus_of_its_pes(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    with WorkerProcess(tmp_path, cpus=((cpu,), (cpu,))) as worker:
        worker.ready()
        tasks = os.listdir(f"/proc/{worker.process.pid}/task")
        assert len(tasks) > 1
        assert {frozenset(os.sched_getaffinity(int(task))) for task in tasks} == {frozenset([cpu])}


def test_cpus_that_cannot_be_had_are_a_warning(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, cpus=((100_000,),)) as worker:
        worker.ready()
        worker.send(Shutdown())
        assert worker.exit_code() == 0
        assert "cannot bind to CPUs [100000]" in worker.stderr()


# --- the same request, the same tokens ------------------------------------------------------------

REQUESTS = [
    make_add(1),
    make_add(2, num_prompt=90, max_tokens=30),
    make_add(3, num_prompt=1, max_tokens=1),
    make_add(4, num_prompt=33, max_tokens=50, repetition_penalty=1.5),
    make_add(5, temperature=1.0, seed=99),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Each request's tokens when it runs alone."""
    tokens: dict[int, list[int]] = {}
    with WorkerProcess(tmp_path_factory.mktemp("alone")) as worker:
        worker.ready()
        for add in REQUESTS:
            tokens |= worker.run(add)
    assert [len(t) for t in tokens.values()] == [add.params.max_tokens for add in REQUESTS]
    return tokens


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="together"),
        pytest.param({"npu_queue_limit": 3}, id="three steps in flight"),
        pytest.param({"npu_queue_limit": 2, "max_num_batched_tokens": 5}, id="small chunks"),
        pytest.param({"npu_queue_limit": 3, "num_blocks": 32}, id="preempted"),
        pytest.param({"packing_type": "GREEDY", "is_offline": True}, id="packed for throughput"),
    ],
)
def test_tokens_do_not_depend_on_how_a_worker_runs(
    tmp_path: Path, expected: dict[int, list[int]], changes: dict[str, Any]
) -> None:
    with WorkerProcess(tmp_path, **changes) as worker:
        worker.ready()
        # A worker may have ended one request before it reads the next; then none is preempted.
        for _ in range(100 if "num_blocks" in changes else 1):
            assert worker.run(*REQUESTS) == expected
            last = worker.messages[-1]
            assert isinstance(last, Tokens)
            assert (last.load.num_running, last.load.num_waiting) == (0, 0)
            assert last.load.num_free_blocks == worker.configure.num_blocks
            if last.load.num_preemptions:
                break
        assert (last.load.num_preemptions > 0) == ("num_blocks" in changes)


@pytest.mark.parametrize("queue_limit", [1, 3])
def test_a_sequence_that_is_added_with_its_tokens_so_far_goes_on_as_if_nothing_happened(
    tmp_path: Path, expected: dict[int, list[int]], queue_limit: int
) -> None:
    with WorkerProcess(tmp_path, npu_queue_limit=queue_limit) as worker:
        worker.ready()
        for sequence_id, add in enumerate(REQUESTS, start=100):
            all_tokens = expected[add.sequence_id]
            for num_so_far in {0, 1, len(all_tokens) // 2, len(all_tokens) - 1} - {len(all_tokens)}:
                so_far = tuple(all_tokens[:num_so_far])
                resumed = Add(
                    sequence_id * 1000 + num_so_far,
                    add.token_ids + so_far,
                    add.num_prompt_tokens,
                    add.params,
                )
                (rest,) = worker.run(resumed).values()
                assert rest == all_tokens[num_so_far:]


def test_a_stop_token_ends_a_sequence_and_is_its_last_token(
    tmp_path: Path, expected: dict[int, list[int]]
) -> None:
    stop = expected[1][7]
    with WorkerProcess(tmp_path, npu_queue_limit=3) as worker:
        worker.ready()
        # A stop token outside the vocabulary is never met, and does no harm.
        tokens = worker.run(make_add(1, stop_token_ids=(stop, 2**31 - 1)))
        assert tokens == {1: expected[1][: expected[1].index(stop) + 1]}
        last = worker.messages[-1]
        assert isinstance(last, Tokens)
        assert last.finish_codes == (1,)


def test_logprobs_come_with_the_rows_that_asked(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, vocab_size=8) as worker:
        worker.ready()
        silent, sampled, likeliest = (
            Add(i, (1,), 1, make_add(i, max_tokens=1, num_logprobs=n).params)
            for i, n in ((1, -1), (2, 0), (3, 20))
        )
        worker.run(silent, sampled, likeliest)
        rows = {}
        for message in worker.messages:
            if isinstance(message, Tokens):
                for index, logprobs in message.logprobs:
                    rows[message.sequence_ids[index]] = logprobs
        assert set(rows) == {2, 3}
        assert (rows[2].logprob, rows[2].rank, rows[2].top_token_ids) == (0.0, 1, ())
        assert len(rows[3].top_token_ids) == 1, "the mock is certain; it pads the rest"


# --- mid-stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_limit", [1, 3])
def test_an_abort_stops_the_tokens_and_frees_the_blocks(tmp_path: Path, queue_limit: int) -> None:
    with WorkerProcess(tmp_path, npu_queue_limit=queue_limit, **SLOWLY) as worker:
        worker.ready()
        worker.send(make_add(1, max_tokens=200), make_add(2, max_tokens=200))
        worker.receive(Added)
        while {1, 2} - tokens_of(worker.receive(object)):
            pass
        worker.send(Abort((1, 2)), Abort((1, 77)), Ping(9))
        while not isinstance(worker.receive(object), Pong):
            pass
        after = len(worker.messages)
        worker.run(make_add(3, max_tokens=2))
        for message in worker.messages[after:]:
            assert tokens_of(message) <= {3}, "a token of an aborted sequence"
        last = worker.messages[-1]
        assert isinstance(last, Tokens)
        assert last.load.num_free_blocks == worker.configure.num_blocks
        assert last.load.num_running == 0


def tokens_of(message: object) -> set[int]:
    return set(message.sequence_ids) if isinstance(message, Tokens) else set()


def test_a_ping_is_answered_between_two_steps(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, mock_tokens_per_s=20.0) as worker:
        worker.ready()
        worker.send(make_add(1, num_prompt=1, max_tokens=200))
        worker.receive(Added)
        worker.receive(Tokens)
        worker.send(Ping(2**40))
        while not isinstance(pong := worker.receive(object), Pong):
            assert isinstance(pong, Tokens)
            assert pong.finish_codes[-1:] != (2,), "it answered only when all was done"
        assert pong.nonce == 2**40


def test_what_can_never_run_is_refused_and_disturbs_nothing(
    tmp_path: Path, expected: dict[int, list[int]]
) -> None:
    with WorkerProcess(tmp_path) as worker:
        worker.ready()
        unknown_token = Add(11, (1, 1000), 2, make_add(1).params)
        too_long = make_add(12, num_prompt=256)
        worker.send(unknown_token, too_long)
        assert worker.run(make_add(1)) == {1: expected[1]}
        assert refusals(worker) == {11: "invalid_request", 12: "context_length_exceeded"}
        assert acknowledged(worker) == [1]


def test_what_cannot_run_now_is_refused_while_a_step_is_in_flight(tmp_path: Path) -> None:
    endless = {"npu_queue_limit": 2, "mock_tokens_per_s": 0.001}
    with WorkerProcess(tmp_path, max_processing_samples=2, **endless) as worker:
        worker.ready()
        worker.send(make_add(1), make_add(1), make_add(2), make_add(3), Abort((2,)))
        worker.send(make_add(2), Ping(0))
        while not isinstance(worker.receive(object), Pong):
            pass
        worker.send(Ping(1))  # what was acknowledged in the round of the first ping is behind it
        while not isinstance(worker.receive(object), Pong):
            pass
        assert refusals(worker) == {1: "duplicate_request", 3: "overloaded"}
        assert acknowledged(worker) == [1, 2, 2]


def refusals(worker: WorkerProcess) -> dict[int, str]:
    return {m.sequence_id: m.error_code for m in worker.messages if isinstance(m, Refused)}


def acknowledged(worker: WorkerProcess) -> list[int]:
    return [i for m in worker.messages if isinstance(m, Added) for i in m.sequence_ids]


def test_each_of_many_adds_is_acknowledged_once(tmp_path: Path) -> None:
    adds = [make_add(i, num_prompt=3, max_tokens=2) for i in range(1, 401)]
    with WorkerProcess(tmp_path, max_processing_samples=400, npu_queue_limit=2) as worker:
        worker.ready()
        tokens = worker.run(*adds)
        assert all(len(t) == 2 for t in tokens.values())
        assert sorted(acknowledged(worker)) == list(range(1, 401))


def test_garbage_on_the_socket_is_counted_logged_and_dropped(
    tmp_path: Path, expected: dict[int, list[int]]
) -> None:
    with WorkerProcess(tmp_path) as worker:
        worker.ready()
        good = encode(make_add(1))
        for garbage in (
            b"",
            b"\xc1",
            b"hello",
            bytes(1000),
            b"\x91" * 5000,
            good[:-1],
            good + b"x",
        ):
            worker.send_bytes(garbage)
        worker.send_bytes(good, good)  # two frames are no message either
        worker.send_bytes(encode(worker.messages[0]))  # nor is what a worker says
        worker.send_bytes(pack_configure(worker.configure)[4:])
        assert worker.run(make_add(1)) == {1: expected[1]}
        worker.send(Shutdown())
        assert worker.exit_code() == 0
        logged = worker.stderr().splitlines()
        numbers = [line.split("number ")[1].split(":")[0] for line in logged]
        assert numbers == ["1", "2", "4", "8"], "a flood is logged ever more rarely"


@pytest.mark.slow
@pytest.mark.parametrize("queue_limit", [1, 3])
def test_with_nothing_to_do_it_uses_no_cpu(tmp_path: Path, queue_limit: int) -> None:
    with WorkerProcess(tmp_path, npu_queue_limit=queue_limit) as worker:
        worker.ready()
        worker.run(make_add(1))
        before = worker.cpu_ticks()
        assert not worker.router.poll(2000), "it has nothing to say"
        assert worker.cpu_ticks() - before <= 1
