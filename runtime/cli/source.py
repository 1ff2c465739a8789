"""Where a command's answers come from: a daemon, or an engine of the command's own.

Either way the command talks to an `AsyncClient`; an engine of its own is served to it over a
private socket, so that there is one way of asking.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from furiosa_llm.args import AsyncEngineArgs
    from furiosa_llm.client import AsyncClient, CurveKeys


CONNECT_TIMEOUT_S = 2.0
"""Somebody is waiting at the terminal, and a daemon that runs answers within milliseconds."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of the two."""

    address: str | None
    curve: CurveKeys | None
    engine_args: AsyncEngineArgs | None


def add_source_args(parser: argparse.ArgumentParser) -> None:
    """Add --name, --connect and the engine's flags, of which --model is not required."""
    from furiosa_llm.args import AsyncEngineArgs

    group = parser.add_argument_group("a daemon that runs, instead of an engine of its own")
    group.add_argument("--name", metavar="NAME", help="the daemon's name")
    group.add_argument(
        "--connect", metavar="ADDRESS", help="its name, or the socket: ipc://PATH, tcp://HOST:PORT"
    )
    group.add_argument(
        "--server-key", metavar="FILE", help="for tcp://: the daemon's public key file"
    )
    group.add_argument("--key-file", metavar="FILE", help="for tcp://: your .key_secret file")
    AsyncEngineArgs.add_cli_args(parser)
    for action in parser._actions:  # argparse has no other way to change one
        if action.dest == "model":
            action.required = False


def source_of(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace, *, default: str | None
) -> Source:
    """What the flags name; without any the daemon `default`, or if that is None an error.

    Raises: InvalidRequestError naming the flag whose value is wrong. SystemExit for flags that
        contradict each other.
    """
    address = namespace.connect or namespace.name
    if namespace.connect and namespace.name:
        parser.error("--name and --connect both say which daemon: give one")
    if address and namespace.model:
        parser.error("--model makes an engine and --name or --connect uses a daemon: give one")
    if bool(namespace.server_key) != bool(namespace.key_file):
        parser.error("--server-key and --key-file go together")
    if namespace.model:
        from furiosa_llm.args import AsyncEngineArgs

        return Source(None, None, AsyncEngineArgs.from_cli_args(namespace))
    if not address and default is None:
        parser.error(
            "the following arguments are required: --model, or --name or --connect of a daemon"
        )
    curve = None
    if namespace.server_key:
        from furiosa_llm.client import CurveKeys

        curve = CurveKeys(namespace.server_key, namespace.key_file)
    return Source(address or default, curve, None)


@asynccontextmanager
async def open_source(source: Source) -> AsyncIterator[AsyncClient]:
    """A connected client. Raises: what keeps it from connecting, or the engine from starting."""
    from furiosa_llm.client import AsyncClient

    if source.engine_args is None:
        assert source.address is not None
        async with AsyncClient(
            source.address, curve=source.curve, connect_timeout_s=CONNECT_TIMEOUT_S
        ) as client:
            yield client
        return
    from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
    from furiosa_llm.server.service import Service
    from furiosa_llm.server.socket_server import SocketServer
    from furiosa_llm.wire.sockets import new_endpoint

    async with AsyncLLMEngine.from_engine_args(source.engine_args) as engine:
        service = Service(source.engine_args, build=lambda args, report: engine)
        server = SocketServer(service, new_endpoint())
        try:
            await service.start()
            await server.start()
            async with AsyncClient(server.endpoint) as client:
                yield client
        finally:
            await server.stop()
            await service.stop()
