"""furiosa-serve start."""

from __future__ import annotations

import sys
from typing import Any

import click

from furiosa_llm.cli.serve_options import EPILOG, GroupedCommand, given_flags, with_serve_options


@click.command(cls=GroupedCommand, epilog=EPILOG)
@with_serve_options
def start(config: str | None, **arguments: Any) -> None:
    """Start a daemon that serves MODEL in the background, and wait until it is ready.

    A start that fails says why, and exits with the daemon's exit code (see 'furiosa-serve serve
    --help'). Ctrl-C gives the start up.
    """
    from furiosa_llm.cli.background import Start, start_daemon
    from furiosa_llm.cli.start_lines import StartLines
    from furiosa_llm.run_dir import RunDir
    from furiosa_llm.server.option_layers import resolve_layers

    flags = given_flags(arguments)
    layers = resolve_layers(flags, config=config)
    options = layers.options()  # what is wrong with them is best said here and now
    for warning in layers.warnings:
        click.echo(f"warning: {warning}", err=True)
    run_dir = RunDir(options.daemon.name)
    run_dir.refuse_if_running()
    with StartLines(sys.stderr) as lines:
        address = start_daemon(run_dir, Start.here(flags, config), lines.say)
    click.echo(started_line(run_dir.name, address))


def started_line(name: str, address: dict[str, Any]) -> str:
    """What a start that went well says."""
    socket = f" and {address['socket']}" if address["socket"] else ""
    return f"{name} (pid {address['pid']}) serves {address['model']} at {address['http']}{socket}"
