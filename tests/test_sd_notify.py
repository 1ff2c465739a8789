"""What systemd is told, byte for byte, over a real datagram socket."""

import configparser
import os
import shlex
import socket
import tempfile
import time
from pathlib import Path

import pytest

from furiosa_llm.cli.main import main
from furiosa_llm.server.options import DaemonConfig
from furiosa_llm.server.sd_notify import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request):
    """The two kinds of address that systemd may give."""
    with (
        tempfile.TemporaryDirectory(prefix="fs-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        name = f"{directory}/notify"
        receiver.bind(name if request.param == "path" else "\0" + name)
        receiver.settimeout(10)
        address = name if request.param == "path" else "@" + name
        yield ServiceManager({"NOTIFY_SOCKET": address}), lambda: receiver.recv(4096).decode()


def test_messages(manager):
    manager, received = manager
    manager.ready("serving m")
    assert received() == "READY=1\nSTATUS=serving m"
    manager.status("loading: 10 %")
    assert received() == "STATUS=loading: 10 %"
    manager.status("packing", extend_s=1.5)
    assert received() == "STATUS=packing\nEXTEND_TIMEOUT_USEC=1500000"
    manager.alive()
    assert received() == "WATCHDOG=1"
    manager.stopping("draining 2 requests")
    assert received() == "STOPPING=1\nSTATUS=draining 2 requests"
    manager.failed(1, "no\nmemory")  # a line break would begin another field
    assert received() == "EXIT_STATUS=1\nSTATUS=no memory"


def test_reloading_carries_the_monotonic_time(manager):
    manager, received = manager
    before = time.monotonic_ns() // 1000
    manager.reloading()
    after = time.monotonic_ns() // 1000
    first, second = received().split("\n")
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= after


@pytest.mark.parametrize("address", [None, "", "relative", "/nowhere/at/all", "@nobody-listens"])
def test_without_a_manager_nothing_fails(address):
    manager = ServiceManager({} if address is None else {"NOTIFY_SOCKET": address})
    manager.ready("x")
    manager.alive()


def test_a_manager_that_does_not_read_does_not_block():
    with (
        tempfile.TemporaryDirectory(prefix="fs-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        receiver.bind(f"{directory}/n")
        manager = ServiceManager({"NOTIFY_SOCKET": f"{directory}/n"})
        for _ in range(2000):
            manager.alive()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
    ],
)
def test_the_watchdogs_time(env, expected):
    assert ServiceManager(env).watchdog_s == expected


def test_the_example_unit_runs_commands_that_exist():
    """Its ExecStart and ExecReload are read by the commands themselves."""
    unit = Path(__file__).parent.parent / "docs/systemd/furiosa-serve.service"
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(unit.read_text())
    service = parser["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"  # the daemon ends its workers itself
    for key in ("ExecStart", "ExecReload"):
        program, name, *arguments = shlex.split(service[key].replace("%i", "main"))
        assert program.endswith("/furiosa-serve")
        command = main.get_command(None, name)
        context = command.make_context(name, arguments)
        assert "main" in context.params.values()
    timeouts = [int(service[key]) for key in ("TimeoutStopSec", "WatchdogSec")]
    assert timeouts[0] > DaemonConfig().drain_timeout_s
