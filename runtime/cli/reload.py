"""furiosa-serve reload."""

from __future__ import annotations

import click

from furiosa_llm.cli.name_option import name_option


@click.command()
@name_option
def reload(name: str) -> None:
    """Have a daemon read its API keys and certificates again and replace its workers one after the
    other. No request fails by it. What cannot be read is said, and what was there stays in force.
    """
    from furiosa_llm.run_dir import RunDir
    from furiosa_llm.server.control_client import ControlClient

    with ControlClient(RunDir.find(name).control, "reload") as control:
        answer = control.receive()
        while "ok" not in answer:
            click.echo(answer["step"], err=True)
            answer = control.receive(None)
    click.echo(f"{name} is reloaded", err=True)
