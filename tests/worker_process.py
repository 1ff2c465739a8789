"""A real worker process and the front-end's end of its socket, for tests."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

import zmq

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.wire.codec import decode_from_worker, encode
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    Add,
    Configure,
    FromWorker,
    Message,
    Ready,
    Tokens,
)
from furiosa_llm.wire.pipe import pack_configure
from furiosa_llm.wire.sockets import bind_router, parse_worker_identity, worker_identity

PATIENCE_MS = 30_000  # a bound on waiting for what must come; nothing is expected to take so long

M = TypeVar("M")


def make_configure(endpoint: str, **changes: Any) -> Configure:
    """A small mock worker, as fast as it can be."""
    configure = Configure(
        worker_id=3, epoch=7, endpoint=endpoint, artifact_path="", backend="mock", cpus=(),
        kv_cache_dtype="fp32", num_blocks=64, block_size=4, max_model_len=256, max_num_seqs=16,
        max_num_batched_tokens=64, max_processing_samples=64, npu_queue_limit=1,
        spare_blocks_ratio=0.0, is_offline=False, packing_type="IDENTITY", vocab_size=1000,
        mock_tokens_per_s=0.0,
    )  # fmt: skip
    return dataclasses.replace(configure, **changes)


class FrontEnd:
    """One worker's front-end: a socket for it to connect to. Used with `with`."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.configure = make_configure(f"ipc://{directory}/w.sock", **changes)
        self.identity = worker_identity(self.configure.worker_id, self.configure.epoch)
        self.messages: list[FromWorker] = []  # all received so far
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = bind_router(self._context, self.configure.endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.router.close()
        self._context.term()

    def ready(self) -> Ready:
        """Wait until it is."""
        return self.receive(Ready)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.send_bytes(encode(message))

    def send_bytes(self, *frames: bytes) -> None:
        self.router.send_multipart([self.identity, *frames])

    def has_message(self) -> bool:
        """Wait for one."""
        return bool(self.router.poll(PATIENCE_MS))

    def receive(self, kind: type[M]) -> M:
        """The next message, which must be of this kind and in order."""
        assert self.has_message(), f"no {kind.__name__} came"
        identity, data = self.router.recv_multipart()
        message = decode_from_worker(data)
        assert isinstance(message, kind), message
        sender = (message.worker_id, message.epoch)
        assert parse_worker_identity(identity) == sender == (3, 7)
        assert message.seq == len(self.messages)
        self.messages.append(message)
        return message

    def run(self, *adds: Add) -> dict[int, list[int]]:
        """Add them all and wait for their ends; the tokens of each."""
        self.send(*adds)
        tokens: dict[int, list[int]] = {add.sequence_id: [] for add in adds}
        unfinished = set(tokens)
        while unfinished:
            message = self.receive(object)
            if isinstance(message, Tokens):
                for sequence_id, token_id, code in zip(
                    message.sequence_ids, message.token_ids, message.finish_codes, strict=True
                ):
                    assert sequence_id in unfinished, "a token behind the last one"
                    tokens[sequence_id].append(token_id)
                    if FINISH_REASONS[code]:
                        unfinished.remove(sequence_id)
        return tokens


class WorkerProcess(FrontEnd):
    """A front-end and the worker process it has started; both are gone after `with`."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        super().__init__(directory, **changes)
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "furiosa_llm.workers", "--worker", "3", "--epoch", "7"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(pack_configure(self.configure))
        self.process.stdin.flush()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stderr):
            assert pipe is not None
            pipe.close()
        super().__exit__()

    def has_message(self) -> bool:
        """Wait for one, but not for a worker that has died."""
        poller = zmq.Poller()
        poller.register(self.router, zmq.POLLIN)
        pidfd = os.pidfd_open(self.process.pid)
        poller.register(pidfd, zmq.POLLIN)
        events = dict(poller.poll(PATIENCE_MS))
        os.close(pidfd)
        if self.router in events or self.router.poll(1000):  # what it sent last may be on its way
            return True
        if pidfd in events:
            raise AssertionError(f"it ended with {self.exit_code()}: {self.stderr()}")
        return False

    def exit_code(self) -> int:
        """Wait for its end."""
        return self.process.wait(PATIENCE_MS / 1000)

    def stderr(self) -> str:
        """All it wrote, after its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def cpu_ticks(self) -> int:
        """CPU time used so far, user and system, in clock ticks."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rsplit(")", 1)[1].split()[11:13]
        return int(user) + int(system)


def make_add(
    sequence_id: int, num_prompt: int = 10, *, so_far: list[int] | None = None, **params: Any
) -> Add:
    """A request whose prompt follows from its id."""
    prompt = [(sequence_id * 31 + index * 7) % 1000 for index in range(num_prompt)]
    params.setdefault("max_tokens", 20)
    params.setdefault("seed", sequence_id)
    return Add(sequence_id, tuple(prompt + (so_far or [])), num_prompt, SequenceParams(**params))


def is_running(pidfd: int) -> bool:
    """Whether the process behind a pidfd has not ended yet."""
    poller = zmq.Poller()
    poller.register(pidfd, zmq.POLLIN)
    return not poller.poll(0)


def wait_for_end(pidfd: int) -> bool:
    """Whether the process behind a pidfd ends in time."""
    poller = zmq.Poller()
    poller.register(pidfd, zmq.POLLIN)
    ended = bool(poller.poll(PATIENCE_MS))
    os.close(pidfd)
    return ended
