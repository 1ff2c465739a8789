"""Shows how far a build is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

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
    with ExitStack() as stack:
        bars: Any = None  # made with the first progress: mostly there is none, and rich is large
        task_of: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal bars
            if bars is None:
                bars = stack.enter_context(_make_bars(stream))
            if stage not in task_of:
                task_of[stage] = bars.add_task(stage, total=total)
            bars.update(task_of[stage], completed=done, total=total)

        yield progress


def _make_bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=stream))
