"""What a start says while it goes on: one line that changes on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

_CLEAR = "\r\x1b[2K"


class StartLines:
    """Say what is being done, each thing once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def say(self, text: str) -> None:
        if text != self._last:
            self._stream.write(f"{_CLEAR}{text}" if self._is_terminal else f"{text}\n")
            self._stream.flush()
            self._last = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_terminal:  # what comes next speaks for itself
            self._stream.write(_CLEAR)
            self._stream.flush()
