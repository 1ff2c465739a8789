"""The runtime directory of a daemon: how the processes of one user find each other by a name.

`$XDG_RUNTIME_DIR/furiosa-serve/NAME/` (or the private fallback of `wire.sockets`) holds

    pid           the daemon's process id; it holds a lock on this file for as long as it lives
    address.json  where it can be reached, once it listens
    start.json    how `furiosa-serve start` started it, so that it can be started again the same way
    log, log.1    what a daemon in the background said
    socket        the endpoint of client libraries
    control       the endpoint of `furiosa-serve status`, `stop`, `drain` and `reload`

The lock is the truth and the rest is text: the kernel drops a lock with its process, however that
ends, so a file that a killed daemon left behind is told from a living one without guessing from
process ids, which are used again. The pid file is never deleted, for a file that is deleted while
somebody waits for its lock would let two daemons hold "the" lock at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from furiosa_llm.checks import refuse, shown
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.wire.runtime_directory import runtime_directory

DEFAULT_NAME = "default"
MAX_NAME_CHARS = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_PATH_BYTES = 107  # sun_path holds 108 with its terminating zero (unix(7))
_MAX_FILE_BYTES = 1 << 20
_PID_WAIT_S = 1.0

# struct flock of Linux on 64-bit machines: type, whence, start, length, pid (fcntl(2)).
_FLOCK = struct.Struct("hhqqi4x")


class AlreadyRunningError(FuriosaLLMError):
    """Another process holds this daemon's name.

    Attributes:
        pid: its process id; None when it has not written that yet.
    """

    code = "already_running"
    exit_code = 3

    def __init__(self, message: str, *, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


@dataclass(frozen=True, slots=True)
class Address:
    """Where a running daemon can be reached."""

    pid: int
    model: str
    http: str  # such as http://127.0.0.1:8000 or unix:/path
    socket: str  # the client libraries' endpoint; "" where there is none
    started_s: float  # Unix time
    is_background: bool  # whether `furiosa-serve start` started it


def check_name(flag: str, value: Any) -> str:
    """A daemon's name: it is a directory's name and part of a socket's path."""
    if isinstance(value, str) and len(value) <= MAX_NAME_CHARS and _NAME.fullmatch(value):
        return value
    raise refuse(
        flag,
        f"{shown(value)} is not a daemon's name: at most {MAX_NAME_CHARS} letters, digits, '.', "
        f"'_' and '-', the first of them a letter or digit",
    )


class RunDir:
    """The directory of the daemon `name`, mode 0700; made if it is not there.

    Raises: InvalidRequestError for a bad name; FuriosaLLMError if the directory is not ours alone.
    """

    def __init__(self, name: str = DEFAULT_NAME) -> None:
        self.name = check_name("--name", name)
        self.path = runtime_directory() / name
        self.pid_file = self.path / "pid"
        self.address_file = self.path / "address.json"
        self.start_file = self.path / "start.json"
        self.log = self.path / "log"
        self.socket = self.path / "socket"
        self.control = self.path / "control"
        if len(os.fsencode(self.control)) > _MAX_PATH_BYTES:
            raise FuriosaLLMError(
                f"{self.control} is too long for a socket's path, which has at most "
                f"{_MAX_PATH_BYTES} bytes: use a shorter --name or XDG_RUNTIME_DIR"
            )
        _claim(self.path)

    @classmethod
    def find(cls, name: str = DEFAULT_NAME) -> Self:
        """The directory of a daemon that runs.

        Raises: FuriosaLLMError naming those that do run, if this one does not.
        """
        found = cls(name)
        if found.running_pid() is not None:
            return found
        others = ", ".join(other.name for other in all_running()) or "none"
        raise FuriosaLLMError(
            f"no daemon named {name} is running (running: {others}): start it with "
            f"'furiosa-serve start MODEL --name {name}', or name another with --name"
        )

    def running_pid(self) -> int | None:
        """The process id of the daemon that holds this name; None when nobody does."""
        try:
            descriptor = os.open(self.pid_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            deadline_s = time.monotonic() + _PID_WAIT_S
            while _is_locked(descriptor):
                text = os.pread(descriptor, 32, 0).strip()
                if text.isdigit():
                    return int(text)
                if time.monotonic() > deadline_s:
                    raise FuriosaLLMError(
                        f"{self.pid_file} is locked, but holds {shown(text)} instead of a process "
                        f"id: see with 'fuser {self.pid_file}' who holds it"
                    )
                time.sleep(0.005)  # it is between taking the lock and writing its id
            return None
        finally:
            os.close(descriptor)

    def lock(self) -> PidLock:
        """Take the name for this process.

        Raises: AlreadyRunningError with the process id of the one that has it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.pid_file, flags, 0o600)
        try:
            if not _try_lock(descriptor):
                raise self._already_running(self.running_pid())
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        # What the last holder of the name left is not this one's.
        for left in (self.address_file, self.socket, self.control):
            left.unlink(missing_ok=True)
        return PidLock(self, descriptor)

    def refuse_if_running(self) -> None:
        """Raises: AlreadyRunningError if a process has the name now."""
        pid = self.running_pid()
        if pid is not None:
            raise self._already_running(pid)

    def _already_running(self, pid: int | None) -> AlreadyRunningError:
        return AlreadyRunningError(
            f"a daemon named {self.name} is running already, with pid {pid}: stop it with "
            f"'furiosa-serve stop --name {self.name}', or use another --name",
            pid=pid,
        )

    def write_address(self, address: Address) -> None:
        """Say where the daemon can be reached. A reader sees all of it or nothing."""
        write_json(self.address_file, asdict(address))

    def read_address(self) -> Address | None:
        """Where the daemon can be reached; None while it does not say."""
        content = read_json(self.address_file)
        try:
            return Address(**{each.name: content[each.name] for each in fields(Address)})
        except (KeyError, TypeError):
            return None


class PidLock:
    """A held name. It is let go by `release`, or by the end of the process."""

    def __init__(self, run_dir: RunDir, descriptor: int) -> None:
        self._run_dir = run_dir
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the name go; idempotent."""
        if self._descriptor < 0:
            return
        for path in (self._run_dir.address_file, self._run_dir.socket, self._run_dir.control):
            path.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)  # the last descriptor of this open file: the lock goes with it
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def all_running() -> list[RunDir]:
    """The directories of all daemons of this user that run, by name."""
    found = []
    for path in sorted(runtime_directory().iterdir()):
        if _NAME.fullmatch(path.name) and (path / "pid").is_file():
            with suppress(FuriosaLLMError):  # a directory that is not ours is none of our daemons
                run_dir = RunDir(path.name)
                if run_dir.running_pid() is not None:
                    found.append(run_dir)
    return found


def write_json(path: Path, content: Any) -> None:
    """Replace the file in one go, readable by this user alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; an empty one where there is no such file or object."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _claim(path: Path) -> None:
    """Make `path` a directory of this user's alone."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()  # of the link itself: following another user's would be a trap
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        problem = f"has mode {stat.S_IMODE(status.st_mode):04o}, so that others can enter it"
    if problem:
        raise FuriosaLLMError(
            f"the runtime directory {path} {problem}: remove it, or set XDG_RUNTIME_DIR to a "
            f"directory that only you can enter"
        )


# Open-file-description locks, not flock(2): a flock can be asked about only by trying to take it,
# and a daemon that starts in that very moment would take the asker for another daemon.


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_locked(descriptor: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    assert isinstance(answer, bytes)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
