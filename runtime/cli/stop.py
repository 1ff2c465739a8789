"""furiosa-serve stop."""

from __future__ import annotations

import sys

import click

from furiosa_llm.cli.name_option import name_option


@click.command()
@name_option
@click.option("--all", "is_for_all", is_flag=True, help="Every daemon of this user.")
@click.option(
    "--timeout",
    metavar="TIME",
    help="For requests in flight to end, such as 30s; 0 cuts them. "
    "[default: the daemon's own --drain-timeout]",
)
def stop(name: str, is_for_all: bool, timeout: str | None) -> None:
    """Have a daemon take no more requests, let those in flight end, and end it.

    Exit codes: 0 it ended, or was not running; 4 requests were cut. One that does not react is
    killed.
    """
    from furiosa_llm.cli.background import stop_daemon
    from furiosa_llm.run_dir import RunDir, all_running
    from furiosa_llm.server.option_readers import read_seconds

    timeout_s = None if timeout is None else read_seconds("--timeout", timeout)
    run_dirs = all_running() if is_for_all else [RunDir(name)]
    codes = [stop_daemon(each, timeout_s, _say) for each in run_dirs]
    sys.exit(max(codes, default=0))


def _say(text: str) -> None:
    click.echo(text, err=True)
