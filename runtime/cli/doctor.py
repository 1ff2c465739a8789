"""furiosa-serve doctor."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}


@click.command()
@click.option("--host", metavar="HOST", help="Address that will be listened on.")
@click.option("--port", metavar="PORT", help="Port that will be listened on.")
@click.option("--cache-dir", metavar="DIR", help="Where models will be kept.")
@click.option("--json", "is_json", is_flag=True, help="As JSON.")
def doctor(host: str | None, port: str | None, cache_dir: str | None, is_json: bool) -> None:
    """Check whether this machine can serve, and say how to fix what is wrong.

    Host, port and directory are taken from the environment and its file, too, as 'furiosa-serve
    serve' does. Exit codes: 0 it can, perhaps with warnings; 1 something has failed.
    """
    from furiosa_llm.doctor import Machine, examine
    from furiosa_llm.server.option_layers import resolve_layers

    given = {"host": host, "port": port, "cache-dir": cache_dir}
    flags = {key: text for key, text in given.items() if text is not None}
    values = resolve_layers(flags).values
    machine = Machine(host=values["host"], port=values["port"], cache_dir=values["cache-dir"])
    findings = []
    for finding in examine(machine):
        findings.append(finding)
        if not is_json:
            mark, color = _MARKS[finding.level]
            click.echo(f"{click.style(mark, fg=color)} {finding.name:<17}  {finding.text}")
            if finding.fix:
                click.echo(f"  {'':<17}  fix: {finding.fix}")
    if is_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=1))
    num_failed = sum(finding.level == "failure" for finding in findings)
    if num_failed and not is_json:
        click.echo(f"{num_failed} of {len(findings)} checks failed", err=True)
    sys.exit(1 if num_failed else 0)
