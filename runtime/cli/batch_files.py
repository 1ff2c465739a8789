"""The two files of a batch: requests in, one line of answer each out, whatever ends the process.

An output line is written in one go. A line that a killed process, or a full disk, left half-written
is cut off by the next run, which then skips what is answered and goes on with the rest.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError

MAX_LINE_BYTES = 32 << 20
MAX_ID_CHARS = 512
URLS = ("/v1/chat/completions", "/v1/completions")


class BatchLine(msgspec.Struct):
    """A line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Answered(msgspec.Struct):
    """What matters of a line of the output."""

    custom_id: str


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of requests that has been looked through."""

    path: Path
    num_lines: int

    @classmethod
    def check(cls, path: Path) -> InputFile:
        """Look at every line before any of them is run.

        Raises: InvalidRequestError naming the first line that is no request, or whose custom_id
            another line has.
        """
        line_of: dict[str, int] = {}
        for number, line in cls._read(path):
            if line.custom_id in line_of:
                raise InvalidRequestError(
                    f"{path}, line {number}: custom_id {line.custom_id[:80]!r} is that of line "
                    f"{line_of[line.custom_id]}: make them differ"
                )
            line_of[line.custom_id] = number
        return cls(path, len(line_of))

    def lines(self) -> Iterator[BatchLine]:
        """The requests, one at a time: the file may be larger than the memory."""
        for _, line in self._read(self.path):
            yield line

    @staticmethod
    def _read(path: Path) -> Iterator[tuple[int, BatchLine]]:
        decode = msgspec.json.Decoder(BatchLine).decode
        try:
            with path.open("rb") as file:
                number = 0
                while raw := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(raw) > MAX_LINE_BYTES:
                        raise _wrong(path, number, f"it is longer than {MAX_LINE_BYTES} bytes")
                    if not raw.strip():
                        continue
                    try:
                        line = decode(raw)
                    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                        raise _wrong(path, number, str(error)) from None
                    _check(path, number, line)
                    yield number, line
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from None


def _check(path: Path, number: int, line: BatchLine) -> None:
    if not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        raise _wrong(path, number, f"custom_id does not have 1 to {MAX_ID_CHARS} characters")
    if line.method != "POST":
        raise _wrong(path, number, f"method is {line.method[:20]!r}: only POST is possible")
    if line.url not in URLS:
        raise _wrong(path, number, f"url is {line.url[:80]!r}: use {' or '.join(URLS)}")


def _wrong(path: Path, number: int, problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f'{path}, line {number}: {problem}. A line is {{"custom_id": "...", "method": "POST", '
        f'"url": "{URLS[0]}", "body": {{...}}}}'
    )


class OutputFile:
    """Where the answers go; this process's alone while it is open.

    Attributes:
        answered: the custom_ids that have a line.
    Raises: FuriosaLLMError if another process writes it, or it cannot be opened;
        InvalidRequestError if it holds something else than answers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FuriosaLLMError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self.answered = self._repair()
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Append one answer. Raises: FuriosaLLMError if the disk does not take it."""
        packed = msgspec.json.encode(line) + b"\n"
        try:
            while packed:  # a short write means that the disk is full; the next one says so
                packed = packed[os.write(self._fd, packed) :]
        except OSError as error:
            raise FuriosaLLMError(
                f"{self._path} cannot be written: {error.strerror}; run the same command again to "
                f"go on from here"
            ) from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FuriosaLLMError(
                f"{self._path} is being written by another batch: wait for it, or choose another "
                f"file"
            ) from None

    def _repair(self) -> set[str]:
        answered = set()
        end = 0  # of the last whole line
        decode = msgspec.json.Decoder(_Answered).decode
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    if not raw.endswith(b"\n"):
                        break
                    if raw.strip():
                        answered.add(decode(raw).custom_id)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise InvalidRequestError(
                        f"{self._path}, line {number}: it is no line of a batch's output "
                        f"({error}): choose another file, or mend it"
                    ) from None
                end += len(raw)
        os.ftruncate(self._fd, end)
        return answered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
