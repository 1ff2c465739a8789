"""furiosa-serve restart."""

from __future__ import annotations

import sys

import click

from furiosa_llm.cli.name_option import name_option


@click.command()
@name_option
@click.option(
    "--timeout",
    metavar="TIME",
    help="For requests in flight to end. [default: the daemon's own --drain-timeout]",
)
def restart(name: str, timeout: str | None) -> None:
    """Stop a daemon, and start it again with the options, directory and variables it was started
    with. One that is not running is started.

    To replace only its workers, API keys and certificates, use 'furiosa-serve reload'.
    """
    from furiosa_llm.cli.background import Start, start_daemon, stop_daemon
    from furiosa_llm.cli.start import started_line
    from furiosa_llm.cli.start_lines import StartLines
    from furiosa_llm.errors import FuriosaLLMError
    from furiosa_llm.run_dir import RunDir
    from furiosa_llm.server.option_readers import read_seconds

    timeout_s = None if timeout is None else read_seconds("--timeout", timeout)
    run_dir = RunDir(name)
    how = Start.of(run_dir)  # before it is stopped: one that could not come back is left alone
    address = run_dir.read_address()
    if run_dir.running_pid() is not None and address and not address.is_background:
        raise FuriosaLLMError(
            f"{name} (pid {address.pid}) runs in the foreground: restart it where it was started"
        )
    code = stop_daemon(run_dir, timeout_s, lambda text: click.echo(text, err=True))
    with StartLines(sys.stderr) as lines:
        started = start_daemon(run_dir, how, lines.say)
    click.echo(started_line(name, started))
    sys.exit(code)
