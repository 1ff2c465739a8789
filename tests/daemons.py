"""Real daemons for tests: a home of their own, and the commands run in it."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner

from furiosa_llm.cli.main import main

SERVE = [sys.executable, "-m", "furiosa_llm"]
TIMEOUT_S = 60

NUM_TOKENS = 200
SLOW = {"FURIOSA_SERVE_MOCK_TOKENS_PER_S": "100"}  # NUM_TOKENS take two seconds
VERY_SLOW = {"FURIOSA_SERVE_MOCK_TOKENS_PER_S": "2"}  # they take longer than any test

_SMALL_COMMANDS = ("status", "stop", "drain", "reload", "logs")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Home:
    """A user's runtime directory and environment, apart from those of whoever runs the tests."""

    def __init__(self, path: Path, **variables: str) -> None:
        self.path = path
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FURIOSA_SERVE_")}
        self.env = kept | {
            "XDG_RUNTIME_DIR": str(path),
            "FURIOSA_SERVE_TOPOLOGY": "2x1",
            "FURIOSA_SERVE_BACKEND": "mock",
            "FURIOSA_SERVE_DEVICES": "npu:0:0",
            "FURIOSA_SERVE_PORT": "0",
            **variables,
        }

    def run(self, *arguments: str, expect: int | None = 0, **env: str) -> Done:
        """Run `furiosa-serve` to its end.

        The small commands run in this process, which spares most of the time they take.
        """
        run = self._run_here if arguments[0] in _SMALL_COMMANDS else self.run_process
        done = run(*arguments, **env)
        assert expect is None or done.returncode == expect, done
        return done

    def run_process(self, *arguments: str, **env: str) -> Done:
        """Run `furiosa-serve` to its end, in a process of its own."""
        done = subprocess.run(
            [*SERVE, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=self.env | env,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def _run_here(self, *arguments: str, **env: str) -> Done:
        result = CliRunner(env=self.env | env).invoke(main, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return Done(result.exit_code, result.stdout, result.stderr)

    @contextmanager
    def begin(self, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        """Begin `furiosa-serve`, and kill it if it is still there at the end."""
        process = subprocess.Popen(
            [*SERVE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env | env,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def patch(self, code: str, *, where: str = "serve") -> None:
        """Have every process of this home that has `where` on its command line run code first."""
        site = self.path / "site"
        site.mkdir()
        guard = f"import sys\nif {where!r} in sys.orig_argv:\n"
        (site / "sitecustomize.py").write_text(guard + textwrap.indent(code, "    "))
        self.env["PYTHONPATH"] = str(site)

    def status(self, name: str = "default") -> dict[str, Any]:
        done = self.run("status", "--json", "--name", name, expect=None)
        (found,) = json.loads(done.stdout)
        return dict(found)

    def file(self, name: str, daemon: str = "default") -> Path:
        """A file of a daemon's runtime directory."""
        return self.path / "furiosa-serve" / daemon / name

    def pid(self, name: str = "default") -> int:
        return int(self.file("pid", name).read_text())


@contextmanager
def make_home(**variables: str) -> Iterator[Home]:
    """A home whose daemons all end with it. Not in pytest's directory: a socket's path is short."""
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    home = Home(path, **variables)
    try:
        yield home
    finally:
        if any(pid.read_text() for pid in path.glob("furiosa-serve/*/pid")):
            home.run("stop", "--all", "--timeout", "0", expect=None)
        shutil.rmtree(path)


def http(home: Home, name: str = "default") -> httpx.Client:
    """A client of a daemon's HTTP."""
    address = json.loads(home.file("address.json", name).read_text())
    return httpx.Client(base_url=address["http"], timeout=30)


@contextmanager
def streaming(home: Home) -> Iterator[Iterator[str]]:
    """A completion that is under way: its first token has come. Yields its lines."""
    body = {
        "model": json.loads(home.file("address.json").read_text())["model"],
        "prompt": [5, 6, 7],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with http(home) as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield lines


def num_tokens(lines: Iterator[str]) -> int:
    """Of a whole stream, as its last chunk but one says."""
    *_, usage, done = lines
    assert done == "data: [DONE]"
    return int(json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"])


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read a process's output up to the line that matches."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"it ended without saying {pattern!r}")


def has_ended(pid: int) -> bool:
    """Whether all of the process is gone; it may still be a zombie, for who started it has left.

    By its pidfd: the state in /proc is the first thread's, and others may still hold its files.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    finally:
        os.close(descriptor)
