"""The daemon's control socket: how `furiosa-serve status`, `stop`, `drain` and `reload` reach it.

A Unix socket in the runtime directory, which only its owner can enter, so that it needs neither a
port nor a key. One connection is one command: a line of JSON with `command` and its arguments is
answered by lines of JSON. The last one has `ok`, or `error` with a message; the lines before it say
how far the command is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError

MAX_LINE_BYTES = 1 << 16
ANSWER_TIMEOUT_S = 10.0
"""A daemon answers at once; one that does not within this time hangs."""

COMMAND_TIMEOUT_S = 5.0
"""How long a caller may take to send its command."""

_log = logging.getLogger(__name__)

Command = Callable[[Mapping[str, Any]], AsyncIterator[dict[str, Any]]]
"""The command's arguments to the objects of its answer."""


class ControlServer:
    """Answers commands on a Unix socket.

    Args:
        path: of the socket; whatever is there is replaced.
        commands: by name. What one raises is told to its caller, and ends nothing else.
    """

    def __init__(self, path: Path, commands: Mapping[str, Command]) -> None:
        self._path = path
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._connected, str(self._path), limit=MAX_LINE_BYTES
        )
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Listen no more, and end the commands that still run; idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async for answer in self._answers(reader):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass  # the caller has gone, or the daemon goes
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answers(self, reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
        try:
            name, arguments = await self._read_command(reader)
            async for answer in self._commands[name](arguments):
                yield answer
        except FuriosaLLMError as error:
            yield {"error": str(error)}
        except Exception as error:
            _log.exception("a control command failed")
            yield {"error": f"{type(error).__name__}: {error}"}

    async def _read_command(self, reader: asyncio.StreamReader) -> tuple[str, Mapping[str, Any]]:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                line = await reader.readline()
            message = json.loads(line)
        except TimeoutError:
            raise InvalidRequestError(f"no command came in {COMMAND_TIMEOUT_S:g} s") from None
        except (ValueError, RecursionError):
            raise InvalidRequestError("a command is one line of JSON") from None
        name = message.get("command") if isinstance(message, dict) else None
        if not isinstance(name, str) or name not in self._commands:
            raise InvalidRequestError(
                f"there is no command {name!r}: use one of {', '.join(self._commands)}"
            )
        return name, message


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
