"""The daemon: options become a service with its ways in, which live until a signal ends them.

    SIGTERM, SIGINT   drain: requests in flight go on, new ones get 503; a second one cuts them
    SIGHUP            reload: API keys, certificates, and the workers one after the other
    control socket    the same by command, for the command line (control.py)

Exit codes, also those of `furiosa-serve serve`:

    0  asked to stop, and every request had ended
    1  it failed: the engine did not start, or died
    2  an option, the model or the machine's state forbids it: the message says what to change
    3  a daemon of this name is running already
    4  asked to stop, and requests were cut: the drain's time was over, or a second signal came
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from furiosa_llm.args import EngineArgs
from furiosa_llm.checks import check_number
from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.errors import EngineShutDownError, FuriosaLLMError, InvalidRequestError
from furiosa_llm.run_dir import Address, RunDir
from furiosa_llm.server.app import make_app
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.control import ControlServer
from furiosa_llm.server.curve import ServerCurve
from furiosa_llm.server.engine_watch import engine_end, health_checks
from furiosa_llm.server.front_end import Setup
from furiosa_llm.server.front_ends import FrontEnds
from furiosa_llm.server.http_server import HttpServer
from furiosa_llm.server.options import MAX_DRAIN_S, DaemonConfig, ServeOptions
from furiosa_llm.server.sd_notify import ServiceManager
from furiosa_llm.server.service import Report, Service, ServiceState, build_engine
from furiosa_llm.server.socket_server import SocketServer
from furiosa_llm.server.start_report import StartReport
from furiosa_llm.server.status import status_of

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_RUNNING, EXIT_CUT = range(5)

START_POLL_S = 0.1
START_EXTENSION_S = 60.0
"""While it makes progress, the service manager is asked for so much more time."""

ABANDON_START_S = 5.0
"""How long a stop waits for a start that is under way; after that the process just leaves, and
its workers, which are tied to it, with it."""

_log = logging.getLogger(__name__)


class Daemon:
    """One daemon in one process; `run` is its life.

    Args:
        run_dir: whose lock this process holds.
        report: where its start is told to whoever started it.
        is_background: whether that was `furiosa-serve start`.
    """

    def __init__(
        self,
        options: ServeOptions,
        run_dir: RunDir,
        *,
        report: StartReport | None = None,
        is_background: bool = False,
        manager: ServiceManager | None = None,
    ) -> None:
        self._options = options
        self._run_dir = run_dir
        self._report = StartReport(None) if report is None else report
        self._is_background = is_background
        self._manager = ServiceManager() if manager is None else manager
        self._started_s = time.time()
        self._stop = asyncio.Event()  # it is to end
        self._is_asked_to_stop = False  # ... because somebody wants it to
        self._cut = asyncio.Event()  # ... without waiting for requests
        self._ended = asyncio.Event()  # nothing is in flight any more
        self._num_cut = 0
        self._drain_timeout_s = options.daemon.drain_timeout_s
        self._reloading = asyncio.Lock()
        self._front_ends = FrontEnds()  # the others than this process
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Task[None] | None = None

        self._keys = ApiKeys(options.daemon.api_key_file)
        self._service = Service(
            options.engine,
            served_model_names=options.daemon.served_model_name,
            limits=options.limits,
            chat_template=_read_template(options.daemon.chat_template),
            build=self._build_engine,
        )
        self._http = HttpServer(make_app(self._service, self._keys, options.http), options.http)
        self._socket = _socket_server(self._service, options.daemon, run_dir)
        self._control = ControlServer(
            run_dir.control,
            {
                "status": self._status_command,
                "drain": self._drain_command,
                "stop": self._stop_command,
                "reload": self._reload_command,
            },
        )

    async def run(self) -> int:
        """Serve until asked to stop. Returns: the exit code.

        Raises: FuriosaLLMError where it cannot start at all.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._spawn_reload)
        try:
            await self._http.start()
            if self._socket is not None:
                await self._socket.start()
            await self._control.start()
            self._say_address()
            self._starting = asyncio.create_task(self._start())
            self._tasks.append(asyncio.create_task(self._watch_start()))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait((self._starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if self._starting.done():
                self._starting.result()  # raises what kept it from starting
                await self._became_ready()
            await stopping
            return await self._wind_down()
        except FuriosaLLMError as error:
            self._manager.failed(EXIT_FAILED, str(error))
            raise
        finally:
            await self._close()

    # --- start ------------------------------------------------------------------------------------

    def _say_address(self) -> None:
        self._address = Address(
            pid=os.getpid(),
            model=self._service.model_name,
            http=self._http.address,
            socket="" if self._socket is None else self._socket.endpoint,
            started_s=self._started_s,
            is_background=self._is_background,
        )
        self._run_dir.write_address(self._address)
        self._report.phase(f"listening on {self._address.http}")
        _log.info("listening on %s; loading %s", self._address.http, self._options.engine.model)

    async def _start(self) -> None:
        """Raises: FuriosaLLMError with what kept it from starting."""
        await self._service.start()
        engine, num_others = self._service.engine_or_none, self._options.daemon.api_servers - 1
        if engine is None or num_others == 0 or self._stop.is_set():
            return
        self._report.phase(f"starting {num_others} more front-ends")
        port = int(self._http.address.rpartition(":")[2])  # --port 0 was any free one
        bound = dataclasses.replace(self._options.http, port=port)
        options = dataclasses.replace(self._options, http=bound)
        self._front_ends = FrontEnds(
            [
                Setup(
                    options=options,
                    chat_template=self._service.chat_template,
                    ticket=ticket,
                    log_file=self._run_dir.log if self._is_background else None,
                )
                for ticket in engine.share(num_others)
            ]
        )
        await self._front_ends.start()

    def _build_engine(self, args: EngineArgs, report: Report) -> AsyncLLMEngine:
        """On a thread. A stop meanwhile ends it at its next word of progress."""

        def tell(phase: str, done: int, total: int) -> None:
            if self._stop.is_set():
                raise EngineShutDownError("asked to stop while starting")
            report(phase, done, total)

        return build_engine(args, tell, startup=self._service.startup)

    async def _watch_start(self) -> None:
        """Tell whoever waits how the start goes on, whenever it does."""
        last: object = None
        while self._service.state is ServiceState.STARTING:
            now = (self._service.phase, *self._service.progress, self._service.startup.status)
            if now != last:
                last = now
                line = self._start_line()
                self._report.phase(line)
                self._manager.status(line, extend_s=START_EXTENSION_S)
            await asyncio.sleep(START_POLL_S)

    def _start_line(self) -> str:
        phase, (done, total) = self._service.phase, self._service.progress
        workers = self._service.startup.status.workers
        if workers:
            num_ready = sum(worker.phase == "ready" for worker in workers)
            return f"starting the workers: {num_ready} of {len(workers)} ready"
        return f"{phase}: {100 * done // total} %" if total else phase

    async def _became_ready(self) -> None:
        seconds = time.time() - self._started_s
        _log.info(
            "ready after %.2f s: %s at %s", seconds, self._service.model_name, self._address.http
        )
        self._manager.ready(f"serving {self._service.model_name}")
        self._report.ready(dataclasses.asdict(self._address))
        self._tasks.append(asyncio.create_task(self._watch_engine()))
        if self._manager.watchdog_s is not None:
            self._tasks.append(asyncio.create_task(self._feed_watchdog(self._manager.watchdog_s)))

    # --- life -------------------------------------------------------------------------------------

    async def _watch_engine(self) -> None:
        """End the daemon when its engine has ended: a service that cannot serve is restarted by
        whoever runs it, and lies to its clients until then.
        """
        engine = self._service.engine_or_none
        assert engine is not None
        ended_by = await engine_end(engine)
        if not self._stop.is_set():
            self._service.fail(FuriosaLLMError(f"the engine has ended: {ended_by}"))
            self._stop.set()

    async def _feed_watchdog(self, watchdog_s: float) -> None:
        """Say that we are alive while the loop turns and the workers' step loops answer."""
        engine = self._service.engine_or_none
        assert engine is not None
        async for _ in health_checks(engine, watchdog_s / 3):
            self._manager.alive()

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():
            _log.warning("asked to stop a second time: cutting what still runs")
            self._cut.set()
        self._is_asked_to_stop = True
        self._stop.set()

    def _spawn_reload(self) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._reload_and_log()))

    async def _reload_and_log(self) -> None:
        try:
            async for _ in self._reload():
                pass
        except FuriosaLLMError as error:
            _log.error("reload: %s", error)

    async def _reload(self) -> AsyncIterator[str]:
        """Read keys and certificates again and replace the workers; what fails leaves the old.

        Raises: FuriosaLLMError naming what failed.
        """
        async with self._reloading:
            # To the service manager a daemon that starts or stops is not one that reloads.
            is_ready = self._service.state is ServiceState.READY
            if is_ready:
                self._manager.reloading()
            try:
                yield "reading API keys and certificates"
                self._keys.reload()
                self._http.reload_certificates()
                await self._front_ends.reload()
                engine = self._service.engine_or_none
                if engine is not None and is_ready:
                    yield "replacing the workers"
                    await engine.restart_workers()
                _log.info("reloaded")
            finally:
                if is_ready:
                    self._manager.ready(f"serving {self._service.model_name}")

    # --- end --------------------------------------------------------------------------------------

    async def _wind_down(self) -> int:
        """Let requests end, or cut them; then end the engine. Returns: the exit code."""
        service = self._service
        if service.failure is not None and not self._is_asked_to_stop:
            self._manager.failed(EXIT_FAILED, str(service.failure))
            await service.stop()
            return EXIT_FAILED
        service.begin_drain()
        num = await self._num_in_flight()
        line = f"draining {num} request{'' if num == 1 else 's'}"
        _log.info("stopping: %s, for at most %g s", line, self._drain_timeout_s)
        self._manager.stopping(line)
        self._manager.status(line, extend_s=self._drain_timeout_s + START_EXTENSION_S)
        if self._starting is not None and not self._starting.done():
            await asyncio.wait((self._starting,), timeout=ABANDON_START_S)
        if self._starting is not None and self._starting.done():
            self._starting.exception()  # of the start that was ended: no news
        self._num_cut = await self._drain(self._drain_timeout_s)
        self._ended.set()
        if self._num_cut:
            _log.warning("cutting %d requests", self._num_cut)
        if self._socket is not None:  # first: its clients then know that they can come back
            await self._socket.stop()
        await self._front_ends.stop()
        await service.stop()  # requests that still run are told so while there are connections
        await self._http.stop(timeout_s=1.0)
        _log.info("stopped")
        return EXIT_CUT if self._num_cut else EXIT_DONE

    async def _drain(self, timeout_s: float) -> int:
        """Until nothing is in flight, the time is over, or a second signal comes.

        Returns: how many requests are still in flight.
        """
        own = asyncio.create_task(self._service.drained(timeout_s))
        others = asyncio.create_task(self._front_ends.drain(timeout_s))
        cut = asyncio.create_task(self._cut.wait())
        both = asyncio.gather(own, others)
        await asyncio.wait((both, cut), return_when=asyncio.FIRST_COMPLETED)
        if not both.done():
            await self._front_ends.cut()
            own.cancel()
        cut.cancel()
        left_elsewhere = await others
        await asyncio.gather(own, both, return_exceptions=True)
        return self._service.num_in_flight + left_elsewhere

    async def _num_in_flight(self) -> int:
        """Requests of all front-ends."""
        num: int = self._service.num_in_flight
        for front_end in await self._front_ends.status():
            num += front_end["num_in_flight"]
        return num

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._front_ends.stop()
        if self._socket is not None:
            await self._socket.stop()
        await self._service.stop()
        await self._http.stop(timeout_s=0.0)
        await self._control.stop()

    @property
    def has_abandoned_start(self) -> bool:
        """Whether a thread still starts the engine that nobody wants any more: only the end of the
        process ends it.
        """
        return self._starting is not None and not self._starting.done()

    # --- commands ---------------------------------------------------------------------------------

    async def _status_command(self, arguments: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        front_ends = await self._front_ends.status()
        status = self.status()
        for each in front_ends:
            status["num_in_flight"] += each["num_in_flight"]
            status["num_connections"] += each["num_connections"]
        yield {"ok": True, **status, "front_ends": front_ends}

    async def _drain_command(self, arguments: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Take no more requests, and say when none is left; the daemon stays."""
        timeout_s = self._timeout_of(arguments)
        self._service.begin_drain()
        self._manager.status("draining")
        yield {"num_in_flight": await self._num_in_flight(), "drain_timeout_s": timeout_s}
        yield {"ok": True, "num_in_flight": await self._drain(timeout_s)}

    async def _stop_command(self, arguments: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self._drain_timeout_s = self._timeout_of(arguments)
        self._asked_to_stop()
        yield {
            "num_in_flight": await self._num_in_flight(),
            "drain_timeout_s": self._drain_timeout_s,
        }
        await self._ended.wait()
        yield {"ok": True, "num_cut": self._num_cut}

    async def _reload_command(self, arguments: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for step in self._reload():
            yield {"step": step}
        yield {"ok": True}

    def _timeout_of(self, arguments: Mapping[str, Any]) -> float:
        given = arguments.get("timeout_s")
        if given is None:
            return self._options.daemon.drain_timeout_s
        return check_number("timeout_s", given, low=0, high=MAX_DRAIN_S)

    def status(self) -> dict[str, Any]:
        """What this process and its workers are doing, as JSON values."""
        engine = self._service.engine_or_none
        status: dict[str, Any] = msgspec.to_builtins(status_of(self._service))
        status["phase"] = self._start_line() if engine is None else self._service.phase
        if engine is None:
            status["workers"] = msgspec.to_builtins(self._service.startup.status.workers)
        else:
            status["workers"] = status["engine"].pop("workers")
        return {
            "name": self._run_dir.name,
            "pid": self._address.pid,
            "http": self._address.http,
            "socket": self._address.socket,
            "num_connections": self._http.num_connections,
            "num_clients": 0 if self._socket is None else self._socket.num_clients,
            **status,
        }


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"--chat-template: {path!r} cannot be read: {error}", param="chat_template"
        ) from None


def _socket_server(service: Service, config: DaemonConfig, run_dir: RunDir) -> SocketServer | None:
    if config.socket == "none":
        return None
    curve = None
    if config.curve_key_file is not None and config.curve_clients_dir is not None:
        curve = ServerCurve.load(config.curve_key_file, config.curve_clients_dir)
    endpoint = f"ipc://{run_dir.socket}" if config.socket == "auto" else config.socket
    return SocketServer(service, endpoint, curve)
