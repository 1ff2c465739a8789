"""How a worker dies with its parent: by holding the other end of a pipe that only the parent has.

The front-end never closes a worker's standard input while it lives, and the kernel closes it when
the front-end ends, whatever ended it. This holds where the parent-death signal does not: that one
follows the thread that started the process, not the process (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import threading

EXIT_ORPHANED = 71


def hold_tether(pipe_fd: int) -> None:
    """End this process as soon as `pipe_fd` is at its end. Starts a daemon thread."""
    threading.Thread(target=_watch, args=(pipe_fd,), name="tether", daemon=True).start()


def _watch(pipe_fd: int) -> None:
    try:
        while os.read(pipe_fd, 4096):
            pass  # nothing is said here after `Configure`
    finally:
        os._exit(EXIT_ORPHANED)  # at once: there is nobody left to tidy up for
