"""What a machine needs to serve, checked one thing at a time; what is not well comes with its fix.

Nothing is changed, but that the runtime and cache directories are made if they are not there.
"""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from furiosa_llm.cpu_quota import cpu_quota
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.topology import discover_topology

MIN_PYTHON = (3, 11)
MIN_MEMORY_BYTES = 1 << 30
MIN_CACHE_BYTES = 1 << 30
MIN_SHM_BYTES = 16 << 20
MIN_OPEN_FILES = 1024
GOOD_OPEN_FILES = 2 * HttpConfig().max_connections
"""Each connection is a descriptor, and so are the workers' pipes and the sockets' own."""

_NATIVE_CHECK = (
    "from furiosa_llm.workers.kernels.native_library import available_isas\n"
    "print(' '.join(available_isas()))"
)
_NATIVE_TIMEOUT_S = 60
_MINIMUM = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)$")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    level: str  # ok, warning (it will serve, less well) or failure (it will not)
    text: str
    fix: str = ""  # empty only if `level` is ok


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks look; tests give other places than the real ones."""

    host: str = HttpConfig().host
    port: int = HttpConfig().port
    cache_dir: Path | None = None  # None: the engine keeps nothing
    sysfs: Path = Path("/sys")
    proc: Path = Path("/proc")
    shm: Path = Path("/dev/shm")
    env: Mapping[str, str] | None = None  # None: this process's


def examine(machine: Machine) -> Iterator[Finding]:
    """All checks, in an order that a reader can follow. One that breaks is a failure of its own."""
    for name, check in _CHECKS.items():
        try:
            level, text, *fix = check(machine)
        except (OSError, FuriosaLLMError, ValueError) as error:
            yield Finding(name, "failure", f"{error}", "correct what the message names")
            continue
        yield Finding(name, level, text, *fix)


Result = tuple[str, str] | tuple[str, str, str]


def _python(machine: Machine) -> Result:
    text = f"Python {platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return "failure", text, "install Python 3.11 or newer"
    return "ok", text


def _packages(machine: Machine) -> Result:
    missing, old, found = [], [], 0
    for line in requires("furiosa-serve") or ():
        match = _MINIMUM.fullmatch(line.partition(";")[0].strip())
        if match is None or "extra ==" in line:
            continue
        name, minimum = match.groups()
        try:
            installed = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        found += 1
        if _numbers(installed) < _numbers(minimum):
            old.append(f"{name} {installed} (needs {minimum})")
    if missing or old:
        text = "; ".join(
            f"{what}: {', '.join(names)}"
            for what, names in (("missing", missing), ("too old", old))
            if names
        )
        return "failure", text, f"run '{sys.executable} -m pip install --upgrade furiosa-serve'"
    return "ok", f"{found} packages installed, none too old"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", text)[:3])


def _compiler(machine: Machine) -> Result:
    env = os.environ if machine.env is None else machine.env
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return (
            "warning",
            f"no C++ compiler ({', '.join(names)}): the native kernel cannot be built again",
            "install g++ or clang++ (Debian: apt install g++), or name one in CXX",
        )
    return "ok", found


def _native(machine: Machine) -> Result:
    """In a process of its own: a library built for another CPU would end this one."""
    done = subprocess.run(
        [sys.executable, "-c", _NATIVE_CHECK],
        capture_output=True,
        text=True,
        timeout=_NATIVE_TIMEOUT_S,
        env=None if machine.env is None else dict(machine.env),
    )
    if done.returncode == 0:
        return "ok", f"kernel families this CPU runs, best first: {done.stdout.strip()}"
    words = done.stderr.strip().splitlines() or [f"signal {-done.returncode}"]
    return (
        "failure",
        f"the native kernel does not run ({words[-1]})",
        "install a C++17 compiler and install the package again ('pip install --force-reinstall "
        "--no-deps furiosa-serve', in a checkout 'scripts/setup.sh'), or serve with the slow "
        "--backend numpy",
    )


def _cpu(machine: Machine) -> Result:
    text = (machine.proc / "cpuinfo").read_text()
    model = re.search(r"^(?:model name|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(
        " ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)).split()
    )
    wanted = (
        "avx2",
        "fma",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
        "asimddp",
    )
    name = model[1] if model else platform.machine()
    line = f"{name}: {' '.join(flag for flag in wanted if flag in flags) or 'no vector extension'}"
    if platform.machine() == "x86_64" and not {"avx2", "fma"} <= flags:
        return (
            "warning", f"{line}; without AVX2 and FMA the portable kernel runs, several times "
            f"slower", "use a machine with AVX2, or have the hypervisor pass its CPU's flags on",
        )  # fmt: skip
    return "ok", line


def _cores(machine: Machine) -> Result:
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota(machine.sysfs / "fs/cgroup")
    text = f"{allowed} CPUs may be used"
    if math.isinf(quota):
        return "ok", f"{text}, no CPU quota"
    text += f", with a quota of {quota:g} CPUs' time"
    if quota < 1 or quota != int(quota):
        return (
            "warning", f"{text}: workers use whole cores, so {max(1, int(quota))} of them",
            "give the container a whole number of CPUs (docker run --cpus, Kubernetes limits.cpu)",
        )  # fmt: skip
    return "ok", text


def _numa(machine: Machine) -> Result:
    topology = discover_topology(sysfs=machine.sysfs, env=machine.env)
    cards = ", ".join(f"{card} with {len(card.pes)} PEs" for card in topology.cards)
    return "ok", f"{len(topology.cards)} NUMA node{'s'[: len(topology.cards) > 1]}: {cards}"


def _memory(machine: Machine) -> Result:
    from furiosa_llm.workers.artifact.memory import available_memory_bytes

    available = available_memory_bytes()
    if available is None:
        return "warning", "the system does not say how much memory is left", "mount /proc"
    text = f"{available / 2**30:.1f} GiB available"
    if available < MIN_MEMORY_BYTES:
        return (
            "failure", f"{text}: a small model and its KV cache need at least "
            f"{MIN_MEMORY_BYTES >> 30} GiB",
            "end other programs, raise the container's memory limit, or use --weights int4 and "
            "--kv-cache-memory",
        )  # fmt: skip
    return "ok", text


def _huge_pages(machine: Machine) -> Result:
    path = machine.sysfs / "kernel/mm/transparent_hugepage/enabled"
    try:
        text = path.read_text()
    except OSError:
        return "ok", "the kernel has no transparent huge pages"
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else text.strip()
    if mode == "never":
        return (
            "warning", "transparent huge pages are off: large weights take more TLB misses",
            f"run 'echo madvise | sudo tee {path}'",
        )  # fmt: skip
    return "ok", f"transparent huge pages: {mode}"


def _open_files(machine: Machine) -> Result:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft == resource.RLIM_INFINITY or soft >= GOOD_OPEN_FILES:
        return "ok", f"{shown} open files"
    fix = f"run 'ulimit -n {GOOD_OPEN_FILES}' before (systemd: LimitNOFILE={GOOD_OPEN_FILES})"
    if hard != resource.RLIM_INFINITY and hard < GOOD_OPEN_FILES:
        fix += f"; the hard limit is {hard}: raise it in /etc/security/limits.conf"
    level = "failure" if soft < MIN_OPEN_FILES else "warning"
    return level, f"{shown} open files: each connection takes one", fix


def _shm(machine: Machine) -> Result:
    try:
        status = os.statvfs(machine.shm)
    except OSError as error:
        return (
            "warning", f"{machine.shm} cannot be used: {error.strerror}",
            "mount a tmpfs there (docker run --shm-size=64m)",
        )  # fmt: skip
    free = status.f_bavail * status.f_frsize
    if free < MIN_SHM_BYTES:
        return (
            "warning", f"{free >> 20} MiB free in {machine.shm}: libraries' semaphores live there",
            "remove old files from it, or make it larger (docker run --shm-size=64m)",
        )  # fmt: skip
    return "ok", f"{free >> 20} MiB free in {machine.shm}"


def _port(machine: Machine) -> Result:
    found = socket.getaddrinfo(machine.host, machine.port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            return (
                "failure", f"{machine.host}:{machine.port} cannot be listened on: {error.strerror}",
                f"see who has it ('furiosa-serve status --all', 'ss -ltnp sport = {machine.port}'),"
                f" or serve with another --port",
            )  # fmt: skip
    return "ok", f"{machine.host}:{machine.port} is free"


def _runtime_dir(machine: Machine) -> Result:
    from furiosa_llm.run_dir import all_running
    from furiosa_llm.wire.runtime_directory import runtime_directory

    path = runtime_directory()  # raises with the fix in its message
    names = ", ".join(each.name for each in all_running()) or "none"
    return "ok", f"{path} is ours alone; daemons that run: {names}"


def _cache_dir(machine: Machine) -> Result:
    path = machine.cache_dir
    if path is None:
        return "ok", "models are not kept"
    fix = "give a directory you may write to with --cache-dir, or set XDG_CACHE_HOME"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return "failure", f"{path} cannot be made: {error.strerror}", fix
    if not os.access(path, os.W_OK | os.X_OK):
        return "failure", f"{path} cannot be written to", fix
    free = shutil.disk_usage(path).free
    text = f"{path}, {free / 2**30:.1f} GiB free"
    if free < MIN_CACHE_BYTES:
        return "warning", f"{text}: a model may not fit", f"free some space there, or {fix}"
    return "ok", text


def _variables(machine: Machine) -> Result:
    from furiosa_llm.server.option_layers import resolve_layers

    layers = resolve_layers({}, env=os.environ if machine.env is None else machine.env)
    if layers.warnings:
        return "warning", "; ".join(layers.warnings), "correct the names, or unset them"
    given = [key for key, origin in layers.origins.items() if origin.kind != "default"]
    return "ok", f"options set by variables or a file: {', '.join(given) or 'none'}"


_CHECKS: dict[str, Callable[[Machine], Result]] = {
    "python": _python,
    "packages": _packages,
    "compiler": _compiler,
    "native kernel": _native,
    "cpu": _cpu,
    "cores": _cores,
    "numa": _numa,
    "memory": _memory,
    "huge pages": _huge_pages,
    "open files": _open_files,
    "shared memory": _shm,
    "port": _port,
    "runtime directory": _runtime_dir,
    "cache directory": _cache_dir,
    "options": _variables,
}
