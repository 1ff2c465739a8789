"""The daemon's other front-end processes: started, told what to do, started again when they die.

They share the port (SO_REUSEPORT: the kernel spreads connections) and the workers (each speaks with
them over a socket of its own), and nothing else: one that dies takes only its own connections.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from furiosa_llm.engine.supervisor import GiveUp, RestartPolicy
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.server.front_end import MAX_LINE_BYTES, READY_ID, Setup
from furiosa_llm.server.front_end_report import CountsLedger, FrontEndReport, FrontEndReports

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0
"""Beyond what a command itself takes."""

REPORT_TIMEOUT_S = 2.0
"""Whoever asks for a report waits for the slowest front-end."""

END_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class FrontEndProcess:
    """One of them, seen from the daemon; after an end it can be started again."""

    def __init__(self, index: int, setup: Setup) -> None:
        self.index = index
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}  # by id
        self._ids = itertools.count(READY_ID + 1)
        self._reading: asyncio.Task[None] | None = None
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it, and wait until it serves. Raises: FuriosaLLMError saying why it does not."""
        self.num_starts += 1
        command = [sys.executable, "-m", "furiosa_llm.server.front_end"]
        # A session of its own: the terminal's Ctrl-C is for the daemon to act on.
        self._process = process = await asyncio.create_subprocess_exec(
            *command,
            f"--front-end={self.index}",  # for a reader of `ps`
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        self._reading = asyncio.create_task(self._read(process))
        try:
            await self._answer_to(READY_ID, self._setup.to_json(), START_TIMEOUT_S)
        except FuriosaLLMError:
            self.kill()
            await self.ended()
            raise

    async def ended(self) -> None:
        """Wait until it is not running."""
        if self._reading is not None:
            await asyncio.shield(self._reading)

    async def ask(
        self, command: str, *, timeout_s: float = 0.0, patience_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        """Tell it a command and wait for its answer.

        Args:
            timeout_s: of the command itself.
            patience_s: how much later the answer may come.
        Raises: FuriosaLLMError if it says why not, does not answer in time, or ends.
        """
        answer_id = next(self._ids)
        line = json.dumps({"id": answer_id, "command": command, "timeout_s": timeout_s})
        return await self._answer_to(answer_id, line, timeout_s + patience_s)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _answer_to(self, answer_id: int, line: str, timeout_s: float) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise FuriosaLLMError(f"front-end {self.index} is not running")
        answered = asyncio.get_running_loop().create_future()
        self._answers[answer_id] = answered
        try:
            if not self._process.stdin.is_closing():  # else it has died: `_read` tells
                self._process.stdin.write(line.encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                answer: dict[str, Any] = await answered
        except TimeoutError:
            raise FuriosaLLMError(
                f"front-end {self.index} has not answered within {timeout_s:g} s"
            ) from None
        finally:
            del self._answers[answer_id]
        if "error" in answer:
            raise FuriosaLLMError(f"front-end {self.index}: {answer['error']}")
        return answer

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        while line := await process.stdout.readline():
            message = json.loads(line)
            answered = self._answers.get(message["id"])
            if answered is not None and not answered.done():
                answered.set_result(message)
        code = await process.wait()
        process.stdin.close()
        self._process = None
        how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
        for answered in self._answers.values():
            if not answered.done():
                error = FuriosaLLMError(f"front-end {self.index} (pid {process.pid}) {how}")
                answered.set_exception(error)
        if code:
            _log.warning("front-end %d (pid %d) %s", self.index, process.pid, how)


class FrontEnds:
    """All of them; none for a daemon of one process."""

    def __init__(self, setups: Sequence[Setup] = ()) -> None:
        self._processes = [FrontEndProcess(i, setup) for i, setup in enumerate(setups, start=1)]
        self._keepers: list[asyncio.Task[None]] = []
        self._ledger = CountsLedger()
        self._reporting = asyncio.Lock()  # reports come one after the other, so none is older

    async def start(self) -> None:
        """Start them and keep them. Raises: FuriosaLLMError if one does not start."""
        await asyncio.gather(*(process.start() for process in self._processes))
        self._keepers = [asyncio.create_task(_keep(process)) for process in self._processes]

    async def drain(self, timeout_s: float) -> int:
        """Have them take no more requests. Returns: how many are still in flight at the end."""
        answers = await self._ask_all("drain", timeout_s=timeout_s)
        return sum(answer.get("num_in_flight", 0) for answer in answers)

    async def cut(self) -> None:
        """Have a drain that goes on end at once."""
        await self._ask_all("cut")

    async def reload(self) -> None:
        """Have them read keys and certificates again. Raises: FuriosaLLMError if one cannot."""
        for answer in await self._ask_all("reload"):
            if isinstance(answer.get("failure"), FuriosaLLMError):
                raise answer["failure"]

    async def reports(self) -> FrontEndReports:
        """What they are doing, and have counted."""
        async with self._reporting:
            now = tuple(await asyncio.gather(*map(self._report, self._processes)))
        return FrontEndReports(now, self._ledger.total(report.counts for report in now))

    async def _report(self, process: FrontEndProcess) -> FrontEndReport:
        try:
            answer = await process.ask("report", patience_s=REPORT_TIMEOUT_S)
        except FuriosaLLMError:  # it has died, say: its counts must not fall
            report = FrontEndReport(process.pid, 0, self._ledger.last(process.index), None)
        else:
            report = msgspec.convert(answer["report"], FrontEndReport)
            assert report.pid is not None
            self._ledger.note(process.index, report.pid, report.counts)
        return replace(report, index=process.index, num_restarts=max(0, process.num_starts - 1))

    async def stop(self) -> None:
        """End them, and what still runs in them; idempotent."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._ask_all("stop")
        for process in self._processes:
            try:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await process.ended()
            except TimeoutError:
                process.kill()
                await process.ended()

    async def _ask_all(self, command: str, *, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        """The answer of each; of one that gives none, why that is, under "failure"."""
        asked = (process.ask(command, timeout_s=timeout_s) for process in self._processes)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found: list[dict[str, Any]] = []
        for answer in answers:
            if isinstance(answer, FuriosaLLMError):
                found.append({"failure": answer})
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found


async def _keep(process: FrontEndProcess) -> None:
    """Start it again whenever it ends, by the rule that workers are started again by."""
    policy = RestartPolicy()
    while True:
        await process.ended()
        effects = policy.exited(time.monotonic())
        while not effects:
            assert not math.isinf(policy.due_s)
            await asyncio.sleep(max(0.0, policy.due_s - time.monotonic()))
            effects = policy.tick(time.monotonic())
        if isinstance(effects[0], GiveUp):
            _log.error("front-end %d is given up: %s", process.index, effects[0].reason)
            return
        try:
            await process.start()
        except (FuriosaLLMError, OSError) as error:
            _log.error("front-end %d cannot be started: %s", process.index, error)
