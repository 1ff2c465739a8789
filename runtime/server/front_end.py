"""python -m furiosa_llm.server.front_end: one more HTTP front-end over a daemon's workers.

The daemon starts it (front_ends.py) and tells it what to do through standard input, in lines of
JSON: first a `Setup`, then commands. Standard output carries the answers. Tokens do not pass
through the daemon: workers speak with each front-end themselves. When its input ends, the daemon
has ended, and it leaves at once; signals that are meant for the daemon do not concern it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from furiosa_llm.args import EngineArgs
from furiosa_llm.collector import settle
from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.server.app import make_app
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.front_end_counts import counts_of
from furiosa_llm.server.front_end_report import FrontEndReport
from furiosa_llm.server.http_server import HttpServer
from furiosa_llm.server.logs import set_up_logging
from furiosa_llm.server.option_values import options_of_json, options_to_json
from furiosa_llm.server.options import ServeOptions
from furiosa_llm.server.overview import RemoteOverview
from furiosa_llm.server.service import Report, Service

MAX_LINE_BYTES = 1 << 24
"""A ticket has a part for each worker."""

READY_ID = 0
"""Of the answer to the setup; commands count from 1."""


@dataclass(frozen=True, slots=True)
class Setup:
    """daemon -> front-end: the first line."""

    options: ServeOptions  # `http.port` is the one that the daemon has bound
    chat_template: (
        str | None
    )  # its text: all front-ends have the same, whatever becomes of the file
    ticket: AttachTicket
    log_file: Path | None
    control: Path  # the daemon's control socket

    def to_json(self) -> str:
        return json.dumps(
            {
                "options": options_to_json(self.options),
                "chat_template": self.chat_template,
                "ticket": self.ticket.to_json(),
                "log_file": None if self.log_file is None else str(self.log_file),
                "control": str(self.control),
            }
        )

    @classmethod
    def from_json(cls, line: bytes) -> Setup:
        content = json.loads(line)
        return cls(
            options=options_of_json(content["options"]),
            chat_template=content["chat_template"],
            ticket=AttachTicket.from_json(content["ticket"]),
            log_file=None if content["log_file"] is None else Path(content["log_file"]),
            control=Path(content["control"]),
        )


class FrontEnd:
    """The process's life; `run` is all of it."""

    def __init__(self, setup: Setup, commands: asyncio.StreamReader, answers: int) -> None:
        options = setup.options
        self._ticket = setup.ticket
        self._commands = commands
        self._answers = answers
        self._cut = asyncio.Event()
        self._keys = ApiKeys(options.daemon.api_key_file)
        self._service = Service(
            options.engine,
            served_model_names=options.daemon.served_model_name,
            limits=options.limits,
            chat_template=setup.chat_template,
            build=self._attach,
        )
        overview = RemoteOverview(setup.control)
        app = make_app(self._service, self._keys, options.http, overview)
        self._http = HttpServer(app, options.http)

    async def run(self) -> int:
        """Serve until told to stop or left alone. Returns: the exit code."""
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await self._service.start()
            await self._http.start()
            settle()
            self._say({"id": READY_ID, "ready": os.getpid()})
            engine = self._service.engine
            ended = asyncio.create_task(engine.ended())
            obeying = asyncio.create_task(self._obey(tasks))
            tasks |= {ended, obeying}
            await asyncio.wait((ended, obeying), return_when=asyncio.FIRST_COMPLETED)
            return 0 if obeying.done() else 1
        except FuriosaLLMError as error:
            self._say({"id": READY_ID, "error": str(error)})
            return 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._service.stop()  # what still runs is told so while there are connections
            await self._http.stop(timeout_s=1.0)

    def _attach(self, args: EngineArgs, report: Report) -> AsyncLLMEngine:
        report("attaching to the workers", 0, 0)
        return AsyncLLMEngine.attach(self._ticket)

    async def _obey(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Until a stop has been answered, or nobody commands any more."""
        while line := await self._commands.readline():
            message = json.loads(line)
            if message["command"] == "stop":
                await self._answer(message)
                return
            task = asyncio.create_task(self._answer(message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _answer(self, message: Mapping[str, Any]) -> None:
        name = message["command"]
        answer: dict[str, Any] = {"id": message["id"]}
        try:
            match name:
                case "drain" | "stop":
                    answer["num_in_flight"] = await self._drain(message["timeout_s"])
                case "cut":
                    self._cut.set()
                case "reload":
                    self._keys.reload()
                    self._http.reload_certificates()
                case "report":
                    answer["report"] = msgspec.to_builtins(self._report())
                case _:
                    raise AssertionError(f"the daemon does not say {name}")
        except FuriosaLLMError as error:
            answer["error"] = str(error)
        self._say(answer)

    def _report(self) -> FrontEndReport:
        engine = self._service.engine_or_none
        return FrontEndReport(
            pid=os.getpid(),
            num_connections=self._http.num_connections,
            counts=counts_of(self._service),
            engine=None if engine is None else engine.status(),
        )

    async def _drain(self, timeout_s: float) -> int:
        self._service.begin_drain()
        drained = asyncio.create_task(self._service.drained(timeout_s))
        cut = asyncio.create_task(self._cut.wait())
        await asyncio.wait((drained, cut), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, cut):
            task.cancel()
        return self._service.num_in_flight

    def _say(self, message: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(message).encode() + b"\n")


async def _main(answers: int) -> int:
    commands = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    line = await commands.readline()
    if not line:
        return 0  # the daemon has ended before it had anything to say
    setup = Setup.from_json(line)
    config = setup.options.daemon
    set_up_logging(config.log_level, config.log_format, setup.log_file, is_owner=False)
    return await FrontEnd(setup, commands, answers).run()


def main() -> int:
    """The process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing that prints can get among the answers
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(answers))


if __name__ == "__main__":
    sys.exit(main())
