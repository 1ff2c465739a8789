"""The daemon's control socket: how `furiosa-serve status`, `stop`, `drain` and `reload` reach it.

A Unix socket in the runtime directory, which only its owner can enter, so that it needs neither a
port nor a key. One connection is one command: a line of JSON with `command` and its arguments is
answered by lines of JSON. The last one has `ok`, or `error` with a message; the lines before it say
how far the command is. `control_client.py` has the other end.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError

MAX_LINE_BYTES = 1 << 16

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
                if writer.is_closing():
                    return  # uvloop knows before `drain` tells, and would refuse the write
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
