"""furiosa-serve drain."""

from __future__ import annotations

import sys

import click

from furiosa_llm.cli.name_option import name_option


@click.command()
@name_option
@click.option(
    "--timeout",
    metavar="TIME",
    help="To wait for requests in flight. [default: the daemon's own --drain-timeout]",
)
def drain(name: str, timeout: str | None) -> None:
    """Have a daemon take no more requests, and wait until those in flight have ended.

    It stays up, answers new requests with 503 and is not ready (/readyz), so that a load balancer
    leaves it alone; 'furiosa-serve stop' or 'restart' is what comes next.

    Exit codes: 0 nothing is in flight; 4 the time was over before that.
    """
    from furiosa_llm.run_dir import RunDir
    from furiosa_llm.server.control_client import ControlClient
    from furiosa_llm.server.option_readers import read_seconds

    timeout_s = None if timeout is None else read_seconds("--timeout", timeout)
    run_dir = RunDir.find(name)
    with ControlClient(run_dir.control, "drain", timeout_s=timeout_s) as control:
        answer = control.receive()
        click.echo(f"draining {name}: {answer['num_in_flight']} in flight", err=True)
        left = control.receive(answer["drain_timeout_s"] + 10.0)["num_in_flight"]
    click.echo(f"{name} is drained" if not left else f"{left} still in flight", err=True)
    sys.exit(4 if left else 0)
