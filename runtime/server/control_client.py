"""The caller's end of a daemon's control socket (see control.py).

Blocking, and apart from the server's end: a command of the command line needs no asyncio for it.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from furiosa_llm.errors import FuriosaLLMError

ANSWER_TIMEOUT_S = 10.0
"""A daemon answers at once; one that does not within this time hangs."""


class ControlClient:
    """A caller's end: one command, and its answers.

    Raises: FuriosaLLMError from every method if the daemon cannot be reached, is silent for too
        long, goes away, or says why not.
    """

    def __init__(self, path: Path, command: str, **arguments: object) -> None:
        self._command = command
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(ANSWER_TIMEOUT_S)
        self._lines = self._connection.makefile("rb")
        try:
            self._connection.connect(str(path))
            line = json.dumps({"command": command, **arguments}).encode()
            self._connection.sendall(line + b"\n")
        except OSError as error:
            self.close()
            reason = error.strerror or str(error)
            raise FuriosaLLMError(f"the daemon cannot be reached at {path}: {reason}") from None

    def receive(self, timeout_s: float | None = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """The next answer. Args: timeout_s: None waits for ever."""
        self._connection.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise FuriosaLLMError(
                f"the daemon has not answered {self._command} within {timeout_s:g} s: it hangs, or "
                f"was stopped by a signal"
            ) from None
        except OSError as error:
            raise FuriosaLLMError(f"the daemon went away: {error.strerror or error}") from None
        if not line:
            raise FuriosaLLMError(f"the daemon ended before it had answered {self._command}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        if "error" in answer:
            raise FuriosaLLMError(answer["error"])
        return answer

    def close(self) -> None:
        """Idempotent. A command that is under way goes on."""
        self._lines.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
