"""What this machine can do at most: memory bandwidth and arithmetic, measured by limits.cpp.

    python benchmarks/limits.py [--threads 1 2] [--seconds 0.5]

The program is compiled with plain g++ into the cache directory; every instruction it measures is
named in it, so no compiler flag matters. Each figure is the best of three short runs: a limit is
what the machine can do when nothing is in the way.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import facts, table

SOURCE = Path(__file__).parent / "limits.cpp"
CACHE_DIR = Path("~/.cache/furiosa-serve-benchmarks").expanduser()
UNSUPPORTED = 3  # the program's exit status for a mode that this CPU lacks
NUM_RUNS = 3

# kernel family -> the modes of limits.cpp that bound it: (any int8, nibbles, float32, bf16).
ISA_MODES = {
    "portable": ("int8-256", "int4-256", "fp32-256", "fp32-256"),
    "avx2": ("int8-256", "int4-256", "fp32-256", "fp32-256"),
    "avxvnni": ("vnni-256", "vnni-256", "fp32-256", "fp32-256"),
    "avx512": ("vnni-512", "vnni-512", "fp32-512", "bf16-512"),
    "amx": ("amx-int8", "amx-int8", "fp32-512", "amx-bf16"),
}
MODES = (
    "int8-256", "int4-256", "vnni-256", "vnni-512", "amx-int8", "bf16-512", "amx-bf16", "fp32-256",
    "fp32-512",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one number of threads. Arithmetic counts a multiply and an add as two operations."""

    num_threads: int
    read_gb_per_s: float
    gop_per_s: dict[str, float]  # by mode; without those that this CPU lacks

    def arithmetic(self, isa: str, weights: str) -> float:
        """The GOP/s that bound products with weights of this type in this kernel family."""
        modes = dict(zip(("int8", "int4", "fp32", "bf16"), ISA_MODES[isa], strict=True))
        # Where the type's own instructions are missing, or slow, float32 is multiplied.
        return max(self.gop_per_s.get(modes[weights], 0.0), self.gop_per_s[modes["fp32"]])


def program(cache_dir: Path = CACHE_DIR) -> Path:
    """The compiled limits.cpp, made if it is not there yet."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    path = cache_dir / f"limits-{digest}"
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-O2", "-std=c++17", "-pthread", "-o", str(building), str(SOURCE)]
        subprocess.run(command, check=True)
        building.rename(path)
    return path


def measure(num_threads: int, *, seconds: float = 0.5, read_mib: int = 256) -> Limits:
    """Measure all modes; `read_mib` a thread must be several times the last-level cache."""

    def best(mode: str) -> float | None:
        command = [str(program()), mode, str(num_threads), str(seconds), str(read_mib)]
        values = []
        for _ in range(NUM_RUNS):
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
            if run.returncode == UNSUPPORTED:
                return None
            run.check_returncode()
            values.append(float(run.stdout))
        return max(values)

    read = best("read")
    assert read is not None
    rates = {mode: best(mode) for mode in MODES}
    return Limits(num_threads, read, {m: rate for m, rate in rates.items() if rate is not None})


def limits_table(limits: Sequence[Limits]) -> str:
    """One row per number of threads."""
    modes = [mode for mode in MODES if mode in limits[0].gop_per_s]
    rows = [
        [str(of.num_threads), f"{of.read_gb_per_s:.1f}", *(f"{of.gop_per_s[m]:.0f}" for m in modes)]
        for of in limits
    ]
    return table(["threads", "read GB/s", *(f"{mode} GOP/s" for mode in modes)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one run (default: 0.5)")
    options = parser.parse_args()
    threads = options.threads or sorted({1, len(os.sched_getaffinity(0))})
    for name, value in facts().items():
        print(f"- {name}: {value}")
    print("\n" + limits_table([measure(n, seconds=options.seconds) for n in threads]))


if __name__ == "__main__":
    main()
