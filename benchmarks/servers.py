"""Servers as processes to be measured: started, loaded, looked at, stopped.

What is measured of one is of its whole process tree: processor time and proportional memory (PSS,
in which a page that k processes map counts 1/k in each; so a sum over processes counts it once).
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

POLL_S = 0.01
START_TIMEOUT_S = 290.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)


class ServerFailedError(SystemExit):
    """A server has not started or has not answered; its words are in the message."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started.

    Attributes:
        arguments: the command line, which makes it listen on 127.0.0.1 at `port`.
        model: what its requests call the model.
    """

    name: str
    arguments: list[str]
    port: int
    model: str
    environment: dict[str, str] = field(default_factory=dict)
    cpus: frozenset[int] | None = None  # where all of it may run; None: anywhere
    home_variable: str | None = None  # names a directory of its own, which goes with it


class RunningServer:
    """Starts the server; a context manager that ends it, and every process of its tree."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._home = tempfile.TemporaryDirectory(prefix="fs-bench-")
        homes = {command.home_variable: self._home.name} if command.home_variable else {}
        self._first_token_s: float | None = None
        self._begin_s = time.monotonic()
        cpus = command.cpus
        self._process = subprocess.Popen(
            command.arguments,
            env=os.environ | command.environment | homes,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: _prepare(cpus),
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._command.port}"

    def wait_for_first_token(self) -> float:
        """Seconds from the start of the process to the end of an answer of one token."""
        body = {
            "model": self._command.model, "prompt": [100, 101, 102], "max_tokens": 1,
            "temperature": 0,
        }  # fmt: skip
        while self._first_token_s is None:
            status = _ask(self._command.port, body)
            if status == 200:
                self._first_token_s = time.monotonic() - self._begin_s
            elif (
                self._process.poll() is not None
                or (status or 0) in range(400, 500)
                or time.monotonic() - self._begin_s > START_TIMEOUT_S
            ):
                name = self._command.name
                raise ServerFailedError(f"{name}: no first token ({status})\n{self.log()}")
            else:
                time.sleep(POLL_S)
        return self._first_token_s

    def log(self) -> str:
        """The end of what it has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]

    def processes(self) -> list[int]:
        """Its process tree."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            fields = _stat(path)
            if fields is not None:
                children.setdefault(int(fields[1]), []).append(int(path.name))
        found = [self._process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def pss_bytes(self) -> int:
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def cpu_s(self) -> dict[int, float]:
        """Processor time so far, by process."""
        found = {}
        for pid in self.processes():
            fields = _stat(Path(f"/proc/{pid}"))
            if fields is not None:
                found[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        return found

    def idle_cpu(self, seconds: float) -> float:
        """Share of a core that it takes with nothing to do."""
        time.sleep(1.0)
        before = sum(self.cpu_s().values())
        time.sleep(seconds)
        return (sum(self.cpu_s().values()) - before) / seconds

    def stop(self) -> None:
        tree = self.processes()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in tree[1:]:  # children that outlived it
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._log.close()
        self._home.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bench(server: RunningServer, *arguments: Any, cpus: frozenset[int] | None = None) -> Any:
    """The results of `furiosa-serve bench` against the server.

    A connection per request: some peers close the connection after a streamed answer, and it is
    the same for all then.
    """
    command = [
        *(sys.executable, "-m", "furiosa_llm", "bench", "--base-url", server.url),
        *("--no-keep-alive", "--json", "-"),
        *map(str, arguments),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: _prepare(cpus),
    )
    if done.returncode != 0:
        said = done.stdout + done.stderr + server.log()
        raise ServerFailedError(f"{' '.join(command)} failed:\n{said}")
    results = json.loads(done.stdout)["results"]
    assert not results["num_short"], "answers were shorter than asked for"
    return results


def ours(
    model: str, *arguments: str, name: str = "ours", cpus: frozenset[int] | None = None
) -> Command:
    """The command of our daemon, in a runtime directory of its own."""
    port = free_port()
    return Command(
        name,
        [
            *(sys.executable, "-m", "furiosa_llm", "serve", model, "--port", str(port)),
            *("--served-model-name", "model", *arguments),
        ],
        port,
        "model",
        cpus=cpus,
        home_variable="XDG_RUNTIME_DIR",
    )


def _prepare(cpus: frozenset[int] | None) -> None:
    """In a child, before its program: it ends with the benchmark, even one that is killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)


def _ask(port: int, body: dict[str, Any]) -> int | None:
    """The status of a request's answer, or None if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _stat(path: Path) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, or None if the process has gone."""
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
