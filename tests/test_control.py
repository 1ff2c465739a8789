"""The control socket: whatever is sent to it, the daemon answers or closes, and goes on."""

import asyncio
import json
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.server import control
from furiosa_llm.server.control import ControlServer
from furiosa_llm.server.control_client import ControlClient


@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(prefix="fs-") as directory:
        yield Path(directory) / "control"


async def count(arguments):
    for number in range(arguments["to"]):
        yield {"number": number}
    yield {"ok": True}


async def refuse(arguments):
    raise InvalidRequestError("not like this")
    yield


async def break_down(arguments):
    raise ZeroDivisionError("a defect")
    yield


async def hang(arguments):
    await asyncio.Event().wait()
    yield


@pytest.fixture
async def server(path):
    commands = {"count": count, "refuse": refuse, "break": break_down, "hang": hang}
    server = ControlServer(path, commands)
    await server.start()
    yield server
    await server.stop()
    assert not path.exists()


async def ask(path, command, **arguments):
    """All answers to a command; the client blocks, so it has a thread."""

    def run():
        with ControlClient(path, command, **arguments) as client:
            answers = [client.receive()]
            while "ok" not in answers[-1]:
                answers.append(client.receive())
            return answers

    return await asyncio.to_thread(run)


async def test_answers_come_one_by_one(server, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await ask(path, "count", to=2) == [{"number": 0}, {"number": 1}, {"ok": True}]
    many = await asyncio.gather(*(ask(path, "count", to=3) for _ in range(20)))
    assert many == [[{"number": 0}, {"number": 1}, {"number": 2}, {"ok": True}]] * 20


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("refuse", "not like this"),
        ("break", "ZeroDivisionError: a defect"),
        ("nothing", "there is no command 'nothing': use one of count, refuse"),
        ("count", "KeyError"),
    ],
)
async def test_what_goes_wrong_is_told_and_ends_nothing(server, path, command, reason):
    with pytest.raises(FuriosaLLMError, match=reason):
        await ask(path, command)
    assert (await ask(path, "count", to=0)) == [{"ok": True}]


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\n", b"{\n", b"[]\n", b"7\n", b'{"command": 7}\n', b'{"command": ["count"]}\n',
        b"\xff\xfe\n", b"[" * 60_000 + b"\n", b"x" * 200_000, b"\x00\n",
    ],
)  # fmt: skip
async def test_malformed_commands(server, path, sent):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(sent)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    assert b"error" in answer or answer == b""
    assert (await ask(path, "count", to=0)) == [{"ok": True}]


async def test_one_who_connects_and_says_nothing_is_let_go(server, path, monkeypatch):
    monkeypatch.setattr(control, "COMMAND_TIMEOUT_S", 0.01)
    reader, writer = await asyncio.open_unix_connection(path)
    assert "no command came" in json.loads(await reader.read())["error"]
    writer.close()


async def test_one_who_leaves_early_disturbs_nobody(server, path):
    for _ in range(10):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"command": "count", "to": 10000}\n')
        await writer.drain()
        writer.transport.abort()
    assert (await ask(path, "count", to=0)) == [{"ok": True}]


async def test_a_stop_ends_commands_that_go_on(server, path):
    asking = asyncio.create_task(ask(path, "hang"))
    while not server._tasks:
        await asyncio.sleep(0)
    await server.stop()
    with pytest.raises(FuriosaLLMError, match="the daemon ended before it had answered hang"):
        await asking


def test_a_daemon_that_is_silent_or_not_there(path):
    with pytest.raises(FuriosaLLMError, match="cannot be reached at"):
        ControlClient(path, "count")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with (
            ControlClient(path, "count") as client,
            pytest.raises(FuriosaLLMError, match=r"has not answered count within 0\.01 s"),
        ):
            client.receive(0.01)
