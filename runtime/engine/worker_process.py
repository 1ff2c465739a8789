"""One worker process, seen from its parent: start, death, and what it wrote before it died."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

from furiosa_llm.engine.head_start import FreshWorker
from furiosa_llm.engine.worker_socket import Peer
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.wire.messages import Configure
from furiosa_llm.wire.pipe import pack_configure

_TAIL_BYTES = 2000


class WorkerProcess(Peer):
    """A running `python -m furiosa_llm.workers`.

    It lives at most as long as this process does: its standard input is a pipe that only we hold,
    and it leaves when that closes. It is a fresh interpreter, never a fork: forking a process that
    has threads and sockets copies their locks in whatever state they are.

    Args:
        fresh: its process, where that was started already; it is this object's from now on.
    """

    def __init__(
        self, configure: Configure, *, deadline_s: float, fresh: FreshWorker | None = None
    ) -> None:
        super().__init__(configure.worker_id, configure.epoch)
        self.deadline_s = deadline_s  # to be ready, or gone, by then; on the monotonic clock
        self.end_reason = ""  # why we end it, if we do: a word for `WorkerStatus.restarts`
        self.start_error: FuriosaLLMError | None = None  # what its StartFailed said
        if fresh is None:
            fresh = FreshWorker(configure.worker_id, configure.epoch, configure.backend)
        self._log, self._process = fresh.log, fresh.process
        self.pid_fd = os.pidfd_open(self._process.pid)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already: the pid_fd tells
            self._process.stdin.write(pack_configure(configure))
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_failed(self) -> bool:
        """Whether it has left by itself, with an error; not when a signal ended it."""
        return (self._process.poll() or 0) > 0

    @property
    def how_it_ended(self) -> str:
        """By itself, with an error ("crash") or without ("exit"), or by a "signal"."""
        code = self._process.poll() or 0
        return "crash" if code > 0 else "signal" if code < 0 else "exit"

    def kill(self, reason: str) -> None:
        """SIGKILL, for this reason; `pid_fd` becomes readable when it is gone."""
        self.end_reason = self.end_reason or reason
        self._process.kill()

    def reap(self, timeout_s: float | None = None) -> str:
        """Wait for the process's end, free what it holds, and say how it ended.

        Killed when it has not ended within `timeout_s`.
        """
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        os.close(self.pid_fd)
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        tail = self._log.read().decode(errors="replace").strip()
        self._log.close()
        how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"worker {self.worker_id} (pid {self.pid}) {how}" + (
            f"; its last words: {tail}" if tail else ""
        )
