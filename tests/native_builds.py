"""Builds of the native kernel beside the installed one, for tests of other CPUs' families."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "workers" / "kernels" / "native"
EMULATION = Path(__file__).parent / "native_emulation"

# Those of setup.py that change what is computed. Not optimised: building takes most of the time.
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")


def find_compiler() -> str | None:
    """The C++ compiler of this machine."""
    named = os.environ.get("CXX", "g++").split()
    return shutil.which(named[0])


def compile_all(
    compiler: str, directory: Path, sources: Sequence[Path], *, flags: Sequence[str] = ()
) -> list[str]:
    """Compile sources side by side. Returns: the object files."""
    objects = [str(directory / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: str) -> None:
        command = [compiler, *FLAGS, *flags, f"-I{NATIVE}", "-c", str(source), "-o", target]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


def build_emulated(compiler: str, directory: Path) -> Path:
    """The library with AVX-VNNI, AVX-512 and AMX families that run on any AVX2 CPU."""
    flags = ("-DFS_EMULATE_ISA", f"-I{EMULATION}", "-Wno-psabi")
    objects = compile_all(compiler, directory, sorted(NATIVE.glob("*.cpp")), flags=flags)
    library = directory / "emulated.so"
    subprocess.run(
        [compiler, "-shared", "-pthread", *objects, "-o", str(library)], check=True, timeout=100
    )
    return library
