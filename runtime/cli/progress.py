"""Shows how far a build is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, of how much)"""

SECONDS_PER_LINE = 3.0


@contextmanager
def console_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A progress callback that writes to `stream`, by default standard error."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        with _bars(stream) as progress:
            yield progress
    else:
        yield ProgressLines(stream)


class ProgressLines:
    """One line per stage's begin and end, and one every SECONDS_PER_LINE in between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage = ""
        self._next_line_s = 0.0
        self._percent = -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        now_s = self._clock()
        is_due = stage != self._stage or percent == 100 or now_s >= self._next_line_s
        if is_due and (stage, percent) != (self._stage, self._percent):
            self._stage, self._percent = stage, percent
            self._next_line_s = now_s + SECONDS_PER_LINE
            print(f"{stage}: {percent} %", file=self._stream, flush=True)


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    task_of = {}
    with Bars(*columns, TimeRemainingColumn(), console=Console(file=stream)) as bars:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in task_of:
                task_of[stage] = bars.add_task(stage, total=total)
            bars.update(task_of[stage], completed=done, total=total)

        yield progress
