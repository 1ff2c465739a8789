"""Binding this process to the CPUs of its PEs."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger(__name__)


def bind_process(cpus: tuple[tuple[int, ...], ...]) -> frozenset[int]:
    """Bind the calling thread, and every thread it starts later, to the CPUs of all PEs.

    To be called before there is any other thread. The executor binds each PE's thread further, to
    that PE alone. Where the CPUs cannot be had (a container's limits may have changed since the
    front-end looked), the process runs unbound: slower, but right; a warning says so.

    Args:
        cpus: for each PE its CPU ids; when there are none at all, nothing is bound.
    Returns: the CPUs that the thread may use afterwards.
    """
    wanted = frozenset().union(*cpus)
    if wanted:
        try:
            os.sched_setaffinity(0, wanted)
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("cannot bind to CPUs %s: %s; running unbound", sorted(wanted), error)
    return frozenset(os.sched_getaffinity(0))
