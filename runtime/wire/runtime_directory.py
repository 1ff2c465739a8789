"""The directory that this user's sockets and daemons live in."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from furiosa_llm.errors import FuriosaLLMError

_MAX_PATH_BYTES = 107  # sun_path holds 108 with its terminating zero (unix(7))
_NAME_BYTES = len("/0123456789abcdef.sock")


def runtime_directory() -> Path:
    """This user's own directory for sockets, mode 0700; made if it is not there.

    `$XDG_RUNTIME_DIR/furiosa-serve`, else one under the temporary directory, else under /tmp: the
    first whose path leaves room for a socket's name and that is, or can be made, this user's alone.

    Raises: FuriosaLLMError saying what is wrong with each of them.
    """
    problems = []
    for path in _candidates():
        problem = _claim(path)
        if not problem:
            return path
        problems.append(f"{path}: {problem}")
    raise FuriosaLLMError(
        "no directory for sockets: " + "; ".join(problems) + ": set XDG_RUNTIME_DIR to a short "
        "path of a directory that only you can enter"
    )


def _candidates() -> list[Path]:
    private_name = f"furiosa-serve-{os.getuid()}"
    temporary = [Path(tempfile.gettempdir()) / private_name, Path("/tmp") / private_name]
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return [Path(xdg) / "furiosa-serve", *temporary] if xdg else temporary


def _claim(path: Path) -> str:
    """Make `path` a private directory; "" or why it is none."""
    if not path.is_absolute():
        return "it is not an absolute path"
    if len(os.fsencode(path)) + _NAME_BYTES > _MAX_PATH_BYTES:
        return f"a socket's path in it would be over {_MAX_PATH_BYTES} bytes"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()  # of the link itself: following another user's would be a trap
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}"
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
    return ""
