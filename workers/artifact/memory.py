"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int | None:
    """The lesser of what the machine and the process's control group have left; None if unknown."""
    bounds = [x for x in (_machine_available(), _cgroup_available()) if x is not None]
    return min(bounds, default=None)


def _machine_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """Of a version 2 group; its page cache counts as used only where it cannot be dropped."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        directory = Path("/sys/fs/cgroup") / group
        limit = (directory / "memory.max").read_text().strip()
        used = int((directory / "memory.current").read_text())
        stat = dict(x.split() for x in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    droppable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(int(limit) - used + droppable, 0)
