"""How much CPU time this process may use, as its control groups say.

A limit of any group holds for all groups below it, so the least on the way up counts. Inside a
container the paths of /proc/self/cgroup may be the host's, of which only the root can be seen; a
file that is not there limits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(cgroup_root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> float:
    """CPUs' worth of time this process may use; infinity where nothing limits it.

    Source: cgroup-v2.rst (cpu.max) and sched-bwc.rst (cpu.cfs_quota_us) of the kernel's guide.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return math.inf
    return min(
        (_limit(directory) for directory in _directories(lines, cgroup_root)), default=math.inf
    )


def _directories(lines: list[str], root: Path) -> Iterator[Path]:
    """The directory of each group that this process is in, and of those above it."""
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mounts = [root, root / "unified"]  # the second where version 1 is mounted as well
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # outside of the namespace that this process sees
            group = PurePosixPath()
        for mount in mounts:
            yield from (mount / each for each in (group, *group.parents))


def _limit(directory: Path) -> float:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            return math.inf
    if not (quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit()):
        return math.inf  # "max" in version 2, -1 in version 1
    return int(quota) / int(period) if int(period) else math.inf
