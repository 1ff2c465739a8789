"""How busy other processes keep the machine's cores, while something is measured and before."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


class OtherLoad:
    """A context manager around a measurement; afterwards `cores` says how many cores, on average,
    processes other than this one and its finished children kept busy."""

    def __enter__(self) -> OtherLoad:
        self.cores = 0.0
        self._begin_s, self._all_s, self._own_s = time.monotonic(), _busy_s(), _own_s()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed_s = time.monotonic() - self._begin_s
        foreign_s = (_busy_s() - self._all_s) - (_own_s() - self._own_s)
        self.cores = max(0.0, foreign_s / elapsed_s)


MAX_CORES = 0.1  # kept busy by others; a run beside more says little
_LOOK_S, _WAIT_S = 0.5, 30.0


def wait_until_quiet() -> bool:
    """Wait, half a minute at most, until other processes leave the machine alone.

    It matters: threads that spin at a barrier, as llama.cpp's do, lose not one other process's
    share but most of their speed to it. Returns: whether they do.
    """
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        with OtherLoad() as other:
            time.sleep(_LOOK_S)
        if other.cores <= MAX_CORES:
            return True
        if time.monotonic() > deadline_s:
            return False


def _busy_s() -> float:
    """Seconds that all cores together have been busy, a hypervisor's other guests included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)
