"""--name, of every command that is about a daemon that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from furiosa_llm.run_dir import DEFAULT_NAME


def name_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --name, which FURIOSA_SERVE_NAME stands in for."""
    return click.option(
        "--name",
        default=DEFAULT_NAME,
        show_default=True,
        envvar="FURIOSA_SERVE_NAME",
        metavar="NAME",
        shell_complete=_complete_name,
        help="Of the daemon.",
    )(command)


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from furiosa_llm.run_dir import all_running

    return [each.name for each in all_running() if each.name.startswith(incomplete)]
