"""Daemons in the background, seen from the command line: how one is started and ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.run_dir import RunDir, read_json, write_json
from furiosa_llm.server.control_client import ControlClient
from furiosa_llm.server.options import VARIABLE_PREFIX
from furiosa_llm.server.start_report import read_reports

GRACE_S = 15.0
"""A daemon gets so much time to end once its requests have, and once more before it is killed."""

SIGNAL_DRAIN_S = 30.0
"""How long one that does not answer may drain after SIGTERM."""

_TAIL_BYTES = 2000
_KEY_VARIABLES = ("FURIOSA_SERVE_API_KEY", "FURIOSA_SERVE_API_KEYS")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Start:
    """How a daemon is started: kept in its runtime directory, so that it can be done again."""

    arguments: tuple[str, ...]  # of `furiosa-serve serve`
    directory: str  # that relative paths are of
    environment: Mapping[str, str]  # its FURIOSA_SERVE_ variables, but for keys
    needs_keys: tuple[str, ...]  # the variables of keys that were set: keys are not written down

    @classmethod
    def here(cls, flags: Mapping[str, str], config: str | None) -> Start:
        """With these flags, in this directory and environment."""
        arguments = [f"--{key}={text}" for key, text in flags.items()]
        if config is not None:
            arguments.append(f"--config={config}")
        ours = {k: v for k, v in os.environ.items() if k.startswith(VARIABLE_PREFIX)}
        return cls(
            arguments=tuple(arguments),
            directory=os.getcwd(),
            environment={k: v for k, v in ours.items() if k not in _KEY_VARIABLES},
            needs_keys=tuple(k for k in _KEY_VARIABLES if ours.get(k)),
        )

    @classmethod
    def of(cls, run_dir: RunDir) -> Start:
        """As the daemon of this directory was started.

        Raises: FuriosaLLMError if `furiosa-serve start` has not started it, or a key is missing.
        """
        content = read_json(run_dir.start_file)
        try:
            start = cls(
                arguments=tuple(map(str, content["arguments"])),
                directory=str(content["directory"]),
                environment={str(k): str(v) for k, v in content["environment"].items()},
                needs_keys=tuple(map(str, content["needs_keys"])),
            )
        except (KeyError, TypeError, AttributeError):
            raise FuriosaLLMError(
                f"nobody has started {run_dir.name} with 'furiosa-serve start', so there is no "
                f"telling how to start it again: use 'furiosa-serve start MODEL'"
            ) from None
        missing = [variable for variable in start.needs_keys if not os.environ.get(variable)]
        if missing:
            raise InvalidRequestError(
                f"{' and '.join(missing)} held the API keys of {run_dir.name} when it was started "
                f"and is not set now: set it, or start it anew with --api-key-file"
            )
        return start

    def save(self, run_dir: RunDir) -> None:
        content = {
            "arguments": list(self.arguments),
            "directory": self.directory,
            "environment": dict(self.environment),
            "needs_keys": list(self.needs_keys),
        }
        write_json(run_dir.start_file, content)


def start_daemon(run_dir: RunDir, start: Start, say: Say) -> dict[str, Any]:
    """Start a daemon and wait until it is ready. Returns: its address (`run_dir.Address`).

    Args:
        say: told what is being done, whenever that changes.
    Raises: StartError with the reason and the exit code of a daemon that does not become ready.
    """
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "furiosa_llm", "serve", *start.arguments]
    command.append(f"--report-fd={write_end}")
    others = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(VARIABLE_PREFIX) or k in start.needs_keys
    }
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(run_dir.log, log_flags, 0o600)
    log_size = os.fstat(log).st_size
    try:
        # A fresh interpreter in a session of its own, not a fork: nothing of this process comes
        # along, and the terminal's Ctrl-C and hang-up do not reach it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=start.directory,
            env={**others, **start.environment},
            pass_fds=(write_end,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(read_end)
        raise FuriosaLLMError(f"the daemon cannot be started: {error}") from None
    finally:
        os.close(write_end)
        os.close(log)
    start.save(run_dir)
    try:
        for report in read_reports(read_end):
            if "phase" in report:
                say(report["phase"])
            elif "ready" in report:
                return dict(report["ready"])
            else:
                process.wait(GRACE_S)
                raise StartError(str(report["error"]), exit_code=int(report["exit_code"]))
    except BaseException:  # Ctrl-C, too: who does not wait for it does not want it
        if process.poll() is None:
            process.terminate()
        raise
    raise StartError(_how_it_died(run_dir, process.wait(), log_size), exit_code=1)


class StartError(FuriosaLLMError):
    """A daemon did not become ready.

    Attributes:
        exit_code: what it exited with.
    """

    code = "start_failed"

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _how_it_died(run_dir: RunDir, code: int, log_size: int) -> str:
    with run_dir.log.open("rb") as log:
        log.seek(max(log_size, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
        tail = log.read().decode(errors="replace").strip()
    how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    return f"the daemon {how} before it was ready; its last words: {tail or '(none)'}"


def stop_daemon(run_dir: RunDir, timeout_s: float | None, say: Say) -> int:
    """Have a daemon drain and end, and wait for that; kill it if it does not.

    Args:
        timeout_s: of the drain; None is what the daemon was started with.
    Returns: 0 if it ended (or did not run), 4 if requests were cut.
    """
    pid = run_dir.running_pid()
    if pid is None:
        say(f"{run_dir.name} is not running")
        return 0
    try:
        pid_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        if run_dir.running_pid() != pid:  # it ended meanwhile, and the id may be another's
            return 0
        code = _drain_and_end(run_dir, pid, pid_fd, timeout_s, say)
    finally:
        os.close(pid_fd)
    say(f"{run_dir.name} (pid {pid}) has ended" + (", requests were cut" if code else ""))
    return code


def _drain_and_end(
    run_dir: RunDir, pid: int, pid_fd: int, timeout_s: float | None, say: Say
) -> int:
    try:
        with closing(ControlClient(run_dir.control, "stop", timeout_s=timeout_s)) as control:
            answer = control.receive()
            drain_s = float(answer["drain_timeout_s"])
            num = answer["num_in_flight"]
            say(f"stopping {run_dir.name} (pid {pid}): {num} in flight, at most {drain_s:g} s")
            num_cut = control.receive(drain_s + GRACE_S)["num_cut"]
        if _has_ended(pid_fd, GRACE_S):
            return 4 if num_cut else 0
    except InvalidRequestError:
        raise
    except FuriosaLLMError as error:
        if _has_ended(pid_fd, 0):
            return 0
        say(f"{error}; sending SIGTERM to pid {pid}")
        signal.pidfd_send_signal(pid_fd, signal.SIGTERM)
        if _has_ended(pid_fd, SIGNAL_DRAIN_S if timeout_s is None else timeout_s):
            return 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        say(f"pid {pid} has not ended: sending {number.name}")
        signal.pidfd_send_signal(pid_fd, number)
        if _has_ended(pid_fd, GRACE_S):
            break
    return 4


def _has_ended(pid_fd: int, timeout_s: float) -> bool:
    """Whether the process ends within the time."""
    return bool(select.select([pid_fd], [], [], timeout_s)[0])
