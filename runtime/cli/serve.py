"""furiosa-serve serve."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.main import exit_code_of, print_error
from furiosa_llm.cli.serve_options import (
    EPILOG,
    GroupedCommand,
    given_flags,
    with_serve_options,
)

if TYPE_CHECKING:
    from furiosa_llm.engine.head_start import HeadStart
    from furiosa_llm.run_dir import PidLock, RunDir
    from furiosa_llm.server.options import ServeOptions
    from furiosa_llm.server.start_report import StartReport


@click.command(cls=GroupedCommand, epilog=EPILOG)
@with_serve_options
@click.option("--report-fd", type=int, hidden=True, help="Of the pipe to 'furiosa-serve start'.")
def serve(config: str | None, report_fd: int | None, **arguments: Any) -> None:
    """Serve MODEL in the foreground, until SIGTERM or Ctrl-C.

    MODEL is an artifact, a checkpoint directory, a .gguf file, or the id of a known model, such as
    SmolLM2-135M-Instruct, which is fetched.

    \b
    Signals:     SIGTERM or SIGINT drains, a second one cuts; SIGHUP reloads
    Exit codes:  0 stopped, all requests ended   1 failed   2 a wrong option or model
                 3 a daemon of this name is running         4 stopped, requests were cut
    """
    from furiosa_llm.collector import collect_rarely
    from furiosa_llm.errors import FuriosaLLMError
    from furiosa_llm.server.start_report import StartReport

    collect_rarely()
    report = StartReport(report_fd)
    try:
        code = _serve(given_flags(arguments), config, report, is_background=report_fd is not None)
    except FuriosaLLMError as error:
        code = exit_code_of(error)
        print_error(error)
        report.failed(str(error), code)
    except BaseException as error:
        report.failed(f"{type(error).__name__}: {error}", 1)
        raise
    sys.exit(code)


def _serve(
    flags: dict[str, str], config: str | None, report: StartReport, *, is_background: bool
) -> int:
    from furiosa_llm.engine.head_start import HeadStart
    from furiosa_llm.run_dir import RunDir
    from furiosa_llm.server.logs import set_up_logging
    from furiosa_llm.server.option_layers import resolve_layers

    layers = resolve_layers(flags, config=config)
    options = layers.options()
    run_dir = RunDir(options.daemon.name)
    with run_dir.lock() as lock:  # before anything heavy is loaded: a second one is refused at once
        set_up_logging(
            options.daemon.log_level,
            options.daemon.log_format,
            run_dir.log if is_background else None,
        )
        for warning in layers.warnings:
            logging.getLogger(__name__).warning("%s", warning)
        # Before the HTTP server, the engine and all they need are imported, not after.
        with HeadStart.of(options.engine) as head_start:
            return _run(options, run_dir, lock, report, head_start, is_background=is_background)


def _run(
    options: ServeOptions,
    run_dir: RunDir,
    lock: PidLock,
    report: StartReport,
    head_start: HeadStart,
    *,
    is_background: bool,
) -> int:
    import asyncio

    import uvloop

    from furiosa_llm.server.daemon import Daemon

    async def main() -> int:
        daemon = Daemon(
            options,
            run_dir,
            report=report,
            is_background=is_background,
            head_start=head_start,
        )
        code = await daemon.run()
        if daemon.has_abandoned_start:
            lock.release()
            logging.shutdown()
            os._exit(code)  # closing the loop would wait for the thread that starts the engine
        return code

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
