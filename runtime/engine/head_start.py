"""Worker processes that are started before it is known what they are to do.

An interpreter with numpy takes longer to come up than a model takes to be mapped. The workers do
that beside the front-end's own start (its imports, the tokenizer), and get their configuration when
there is one. Ending without one is what a worker whose standard input closes does anyway.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from furiosa_llm.engine.placement import worker_backend, worker_groups
from furiosa_llm.errors import FuriosaLLMError

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs
    from furiosa_llm.wire.messages import Configure


class FreshWorker:
    """A `python -m furiosa_llm.workers` that waits for its configuration. Raises: OSError.

    Attributes:
        process: its standard input is a pipe that only we hold.
        log: what it writes; the file has no name.
    """

    def __init__(self, worker_id: int, epoch: int, backend: str) -> None:
        self.worker_id, self.epoch, self.backend = worker_id, epoch, backend
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - its owner closes it
        command = [sys.executable, "-m", "furiosa_llm.workers"]
        # For a reader of `ps`, but for the backend: with that it knows what to import meanwhile.
        command += [f"--worker={worker_id}", f"--epoch={epoch}", f"--backend={backend}"]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log
            )
        except OSError:
            self.log.close()
            raise

    def discard(self) -> None:
        """End it and free what it holds."""
        self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


class HeadStart:
    """The fresh workers of one engine. Used with `with`, whose end ends those nobody has taken."""

    def __init__(self, workers: list[FreshWorker]) -> None:
        self._workers = {worker.worker_id: worker for worker in workers}

    @classmethod
    def of(cls, args: EngineArgs) -> Self:
        """Start the processes that an engine with these arguments will want.

        What keeps them from being started is not raised: the engine's own start meets it again, and
        is where it is reported.
        """
        workers: list[FreshWorker] = []
        try:
            backend = worker_backend(args)
            for group in worker_groups(args):
                workers.append(FreshWorker(group.index, 1, backend))
        except (FuriosaLLMError, OSError):
            for worker in workers:
                worker.discard()
            workers = []
        return cls(workers)

    def take(self, configure: Configure) -> FreshWorker | None:
        """The process that this configuration is for, if there is one; it is the caller's now."""
        worker = self._workers.get(configure.worker_id)
        wanted = (configure.epoch, configure.backend)
        if worker is None or (worker.epoch, worker.backend) != wanted:
            return None
        return self._workers.pop(configure.worker_id)

    def close(self) -> None:
        """End the processes that were not taken; idempotent."""
        while self._workers:
            self._workers.popitem()[1].discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
