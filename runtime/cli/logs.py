"""furiosa-serve logs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from furiosa_llm.cli.name_option import name_option

POLL_S = 0.2
_BLOCK_BYTES = 1 << 16


@click.command()
@name_option
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows, until Ctrl-C.")
@click.option(
    "-n", "--lines", "num_lines", type=click.IntRange(min=0), default=50, show_default=True,
    metavar="N", help="How many of the last lines.",
)  # fmt: skip
def logs(name: str, follow: bool, num_lines: int) -> None:
    """Show what a daemon in the background said, also after it has ended."""
    from furiosa_llm.errors import FuriosaLLMError
    from furiosa_llm.run_dir import RunDir

    run_dir = RunDir(name)
    if not run_dir.log.exists():
        raise FuriosaLLMError(
            f"there is no log of {name}: 'furiosa-serve start' makes one; a daemon in the "
            f"foreground writes to its terminal, one under systemd to the journal"
        )
    for piece in _pieces(run_dir.log, num_lines, follow=follow):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def _pieces(path: Path, num_lines: int, *, follow: bool) -> Iterator[bytes]:
    """The end of the file and, with `follow`, what is added to it, also once it is rotated."""
    file: IO[bytes] = path.open("rb")
    try:
        _seek_last_lines(file, num_lines)
        while True:
            while piece := file.read(_BLOCK_BYTES):
                yield piece
            if not follow:
                return
            successor = _successor(path, file)
            if successor is None:
                time.sleep(POLL_S)
            else:
                yield file.read()  # written between the last look and the rotation
                file.close()
                file = successor
    finally:
        file.close()


def _seek_last_lines(file: IO[bytes], num_lines: int) -> None:
    """Go to where the last `num_lines` lines begin."""
    end = file.seek(0, os.SEEK_END)
    position, tail = end, b""
    while position > 0 and tail.count(b"\n") <= num_lines:
        step = min(_BLOCK_BYTES, position)
        position -= step
        file.seek(position)
        tail = file.read(step) + tail
    lines = tail.splitlines(keepends=True)
    kept = sum(map(len, lines[-num_lines:])) if num_lines else 0
    file.seek(end - kept)


def _successor(path: Path, file: IO[bytes]) -> IO[bytes] | None:
    """The file that is at `path` now, if it is another than `file`."""
    try:
        status = path.stat()
        if status.st_ino == os.fstat(file.fileno()).st_ino:
            return None
        return path.open("rb")
    except FileNotFoundError:
        return None
