"""furiosa-serve config."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.serve_options import GroupedCommand, given_flags, with_serve_options

if TYPE_CHECKING:
    from furiosa_llm.server.option_layers import Layers


@click.group()
def config() -> None:
    """What 'furiosa-serve serve' would run with."""


@config.command(cls=GroupedCommand)
@with_serve_options
@click.option("--changed", is_flag=True, help="Only what is not the default.")
@click.option("--json", "is_json", is_flag=True, help="As JSON.")
def show(config: str | None, changed: bool, is_json: bool, **arguments: Any) -> None:
    """Show the value of each option, and where it came from.

    Takes what 'furiosa-serve serve' takes: put 'config show' in place of 'serve' to see what that
    would do. A flag goes before a variable, a variable before the file, the file before the
    default. Exit code 2, with the reason, if the values do not go together.
    """
    from furiosa_llm.cli.main import exit_code_of, print_error
    from furiosa_llm.errors import FuriosaLLMError
    from furiosa_llm.server.option_layers import resolve_layers

    layers = resolve_layers(given_flags(arguments), config=config)
    keys = [key for key in layers.values if not changed or layers.origins[key].kind != "default"]
    click.echo(_as_json(layers, keys) if is_json else _as_text(layers, keys))
    for warning in layers.warnings:
        click.echo(f"warning: {warning}", err=True)
    if layers.values["model"] is None:
        return  # the one option without a default: all the others are worth seeing without it
    try:
        layers.options()
    except FuriosaLLMError as error:
        print_error(error)
        sys.exit(exit_code_of(error))


def _as_json(layers: Layers, keys: list[str]) -> str:
    from furiosa_llm.server.options import OPTIONS

    rows = {
        key: {
            "value": layers.values[key],
            "from": layers.origins[key].kind,
            "where": layers.origins[key].where,
            "flag": OPTIONS[key].flag,
            "variable": OPTIONS[key].variable,
        }
        for key in keys
    }
    return json.dumps(rows, indent=1, default=_plain)


def _plain(value: object) -> str:
    assert isinstance(value, Path)
    return str(value)


def _as_text(layers: Layers, keys: list[str]) -> str:
    rows = [(key, _shown(layers.values[key]), str(layers.origins[key])) for key in keys]
    key_width, value_width = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    return "\n".join(
        f"{key:<{key_width}}  {value:<{min(value_width, 40)}}  {origin}"
        for key, value, origin in rows
    )


def _shown(value: object) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
