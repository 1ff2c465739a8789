"""furiosa-serve top."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from furiosa_llm.cli.name_option import name_option

if TYPE_CHECKING:
    from furiosa_llm.top.history import History
    from furiosa_llm.top.sources import Source

MIN_INTERVAL_S = 0.05


@click.command()
@name_option
@click.option("--base-url", metavar="URL", help="A server of ours over HTTP, in place of --name.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Its first line is sent as the key.",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=MIN_INTERVAL_S),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Between two frames.",
)
@click.option("--once", "is_once", is_flag=True, help="Print one frame, after one interval.")
def top(
    name: str, base_url: str | None, api_key_file: Path | None, interval_s: float, is_once: bool
) -> None:
    """Watch a server: workers, queues, KV blocks, tokens/s, latencies. Ctrl-C ends it.

    Where standard output is no terminal, frames are printed one below the other.
    """
    from furiosa_llm.api_key_file import read_api_key
    from furiosa_llm.loadgen.http_url import HttpUrl
    from furiosa_llm.top.sources import DaemonSource, HttpSource

    api_key = None if api_key_file is None else read_api_key(api_key_file)
    source: Source = (
        DaemonSource(name, api_key)
        if base_url is None
        else HttpSource(HttpUrl.parse("--base-url", base_url), api_key)
    )
    with suppress(KeyboardInterrupt):
        _watch(source, interval_s, is_once=is_once)


def _watch(source: Source, interval_s: float, *, is_once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from furiosa_llm.top.history import History
    from furiosa_llm.top.view import frame

    history = History()
    history.add(source.read())  # a server that is not there ends the command; later it may return
    console = Console(highlight=False)
    if is_once or not console.is_terminal:
        while True:
            time.sleep(interval_s)
            problem = _read(source, history)
            console.print(frame(history, problem=problem))
            if is_once:
                return
            console.print()
            sys.stdout.flush()
    with Live(frame(history), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(frame(history, problem=_read(source, history)), refresh=True)


def _read(source: Source, history: History) -> str | None:
    """Add a reading; or say why there is none."""
    from furiosa_llm.errors import FuriosaLLMError

    try:
        history.add(source.read())
    except FuriosaLLMError as error:
        return str(error)
    return None
