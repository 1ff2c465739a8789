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
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from furiosa_llm.args import EngineArgs
from furiosa_llm.collector import settle
from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.head_start import HeadStart
from furiosa_llm.errors import EngineShutDownError, FuriosaLLMError, InvalidRequestError
from furiosa_llm.run_dir import Address, RunDir
from furiosa_llm.server.app import make_app
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.control import ControlServer
from furiosa_llm.server.curve import ServerCurve
from furiosa_llm.server.daemon_commands import commands_of
from furiosa_llm.server.engine_watch import health_checks
from furiosa_llm.server.front_end import Setup
from furiosa_llm.server.front_ends import FrontEnds
from furiosa_llm.server.http_server import HttpServer
from furiosa_llm.server.options import DaemonConfig, ServeOptions
from furiosa_llm.server.overview import Overview, OwnersOverview
from furiosa_llm.server.sd_notify import ServiceManager
from furiosa_llm.server.service import Report, Service, ServiceState, build_engine
from furiosa_llm.server.socket_server import SocketServer
from furiosa_llm.server.start_report import StartReport
from furiosa_llm.server.start_watch import START_EXTENSION_S, StartWatch

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_RUNNING, EXIT_CUT = range(5)

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
        head_start: of the workers; None: they are started when the engine is.
    """

    def __init__(
        self,
        options: ServeOptions,
        run_dir: RunDir,
        *,
        report: StartReport | None = None,
        is_background: bool = False,
        manager: ServiceManager | None = None,
        head_start: HeadStart | None = None,
    ) -> None:
        self._options = options
        self._run_dir = run_dir
        self._report = StartReport(None) if report is None else report
        self._is_background = is_background
        self._manager = ServiceManager() if manager is None else manager
        self._head_start = head_start
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
        self.overview = OwnersOverview(self._service, lambda: self._front_ends.reports())
        app = make_app(self._service, self._keys, options.http, self.overview)
        self._http = HttpServer(app, options.http)
        self._start_watch = StartWatch(self._service, self._report, self._manager)
        self._socket = _socket_server(self._service, options.daemon, run_dir, self.overview)
        self._control = ControlServer(run_dir.control, commands_of(self))

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
            self._tasks.append(asyncio.create_task(self._start_watch.run()))
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
                    control=self._run_dir.control,
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

        return build_engine(args, tell, startup=self._service.startup, head_start=self._head_start)

    async def _became_ready(self) -> None:
        settle()
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
        ended_by = await engine.ended()
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
            async for _ in self.reload():
                pass
        except FuriosaLLMError as error:
            _log.error("reload: %s", error)

    async def reload(self) -> AsyncIterator[str]:
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
                curve = _curve_of(self._options.daemon)
                if self._socket is not None and curve is not None:
                    self._socket.allow(curve)
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
        num = await self.num_in_flight()
        line = f"draining {num} request{'' if num == 1 else 's'}"
        _log.info("stopping: %s, for at most %g s", line, self._drain_timeout_s)
        self._manager.stopping(line)
        self._manager.status(line, extend_s=self._drain_timeout_s + START_EXTENSION_S)
        if self._starting is not None and not self._starting.done():
            await asyncio.wait((self._starting,), timeout=ABANDON_START_S)
        if self._starting is not None and self._starting.done():
            self._starting.exception()  # of the start that was ended: no news
        self._num_cut = await self.drained(self._drain_timeout_s)
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

    async def drained(self, timeout_s: float) -> int:
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

    def begin_drain(self) -> None:
        """Take no more requests."""
        self._service.begin_drain()
        self._manager.status("draining")

    def ask_to_stop(self, drain_timeout_s: float) -> None:
        """As a signal does, with this time for requests in flight."""
        self._drain_timeout_s = drain_timeout_s
        self._asked_to_stop()

    async def ended(self) -> int:
        """Wait until nothing is in flight any more. Returns: how many requests were cut."""
        await self._ended.wait()
        return self._num_cut

    @property
    def drain_timeout_s(self) -> float:
        """How long requests may go on, where nobody says otherwise."""
        return self._options.daemon.drain_timeout_s

    async def num_in_flight(self) -> int:
        """Requests of all front-ends."""
        return (await self.overview.status()).num_in_flight

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

    async def status(self) -> dict[str, Any]:
        """What the daemon and its workers are doing, as JSON values."""
        overview = await self.overview.status()
        engine = self._service.engine_or_none
        status: dict[str, Any] = msgspec.to_builtins(overview)
        status["phase"] = self._start_watch.line() if engine is None else self._service.phase
        if engine is None:
            status["workers"] = msgspec.to_builtins(self._service.startup.status.workers)
        else:
            status["workers"] = status["engine"].pop("workers")
        return {
            "name": self._run_dir.name,
            "pid": self._address.pid,
            "http": self._address.http,
            "socket": self._address.socket,
            "num_connections": self._http.num_connections
            + sum(each.num_connections for each in overview.front_ends),
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


def _socket_server(
    service: Service, config: DaemonConfig, run_dir: RunDir, overview: Overview
) -> SocketServer | None:
    if config.socket == "none":
        return None
    endpoint = f"ipc://{run_dir.socket}" if config.socket == "auto" else config.socket
    return SocketServer(service, endpoint, _curve_of(config), overview=overview)


def _curve_of(config: DaemonConfig) -> ServerCurve | None:
    """The keys as they are now. Raises: InvalidRequestError."""
    if config.curve_key_file is None or config.curve_clients_dir is None:
        return None
    return ServerCurve.load(config.curve_key_file, config.curve_clients_dir)
