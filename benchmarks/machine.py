"""Facts about this machine and what runs on it, for the head of a result file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """The checkout's commit, marked if files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts() -> dict[str, str]:
    """Name -> value, in the order in which they are shown."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "CPU": f"{cpu_model()}, {num_cores()} cores, {memory_gib():.1f} GiB",
        "system": f"{platform.system()} {re.match(r'[0-9.]*', platform.release())[0]}, "  # type: ignore[index]
        f"Python {platform.python_version()}",
        "packages": ", ".join(
            f"{n} {version(n)}" for n in ("furiosa-serve", "numpy", "tokenizers")
        ),
        "load before": f"{os.getloadavg()[0]:.2f} (one minute's average)",
    }


def results_path(name: str) -> Path:
    """Where a result of today is written: benchmarks/results/NAME-DATE.md."""
    directory = Path(__file__).parent / "results"
    directory.mkdir(exist_ok=True)
    return directory / f"{name}-{datetime.now(UTC):%Y-%m-%d}.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, rule, *rows]
    ]
    return "\n".join(lines)
