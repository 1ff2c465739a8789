"""furiosa-serve version."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import click

from furiosa_llm import __version__

_PACKAGES = ("numpy", "tokenizers", "transformers", "gguf", "pyzmq", "msgpack", "jinja2")


@click.command()
@click.option("--full", is_flag=True, help="Also of Python, the system and the packages in use.")
def version(full: bool) -> None:
    """Show the version."""
    click.echo(f"furiosa-serve {__version__}")
    if full:
        click.echo(f"python {platform.python_version()}")
        click.echo(f"{platform.system().lower()} {platform.release()} {platform.machine()}")
        for name in _PACKAGES:
            click.echo(f"{name} {_installed(name)}")


def _installed(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "not installed"
