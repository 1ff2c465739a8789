"""A lock between processes, held on a file; the kernel frees it when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, made if need be; waits while another process has it.

    The file stays: removing it would let two processes hold locks on two files of one name.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
