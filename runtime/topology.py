"""The cards and processing elements (PEs) of this machine.

A software NPU: card X is NUMA node X, and a PE is one physical core of it, whose CPUs are the
core's hardware threads. Only what this process may use counts: CPUs of its affinity mask, and no
more PEs than its CPU quota pays for. A node without such a CPU is no card; the others keep their
numbers.

FURIOSA_SERVE_TOPOLOGY=4x2 puts 4 cards of 2 PEs each in place of the real ones, to try a
deployment on a smaller machine. Its PEs take the real cores in turn, and share them where there
are too few.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.checks import shown
from furiosa_llm.cpu_quota import cpu_quota
from furiosa_llm.errors import DeviceError

TOPOLOGY_VARIABLE = "FURIOSA_SERVE_TOPOLOGY"
MAX_VIRTUAL_PES = 1024

_NODE = re.compile(r"node([0-9]+)")
_VIRTUAL = re.compile(r"([0-9]{1,4})x([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class PE:
    """One processing element."""

    card: int
    index: int  # within the card, from 0 without gaps
    cpus: tuple[int, ...]  # ascending, at least one

    def __str__(self) -> str:
        return f"npu:{self.card}:{self.index}"


@dataclass(frozen=True, slots=True)
class Card:
    """One card; `pes[i].index == i`."""

    index: int
    pes: tuple[PE, ...]

    def __str__(self) -> str:
        return f"npu:{self.index}"


@dataclass(frozen=True, slots=True)
class Topology:
    """All cards, by ascending index; there is at least one, and each has at least one PE."""

    cards: tuple[Card, ...]

    @property
    def pes(self) -> tuple[PE, ...]:
        """The PEs of all cards, in order."""
        return tuple(pe for card in self.cards for pe in card.pes)


def discover_topology(
    *,
    sysfs: Path = Path("/sys"),
    affinity: Iterable[int] | None = None,
    quota: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Topology:
    """The machine as this process may use it. What the system does not tell is one card of CPUs.

    Args:
        sysfs: where the node and core files are.
        affinity: CPU ids that may be used; None asks the system.
        quota: how many CPUs' worth of time may be used, infinity for all; None asks the system.
        env: holds FURIOSA_SERVE_TOPOLOGY; None is this process's own environment.
    Raises: DeviceError when FURIOSA_SERVE_TOPOLOGY is malformed.
    """
    allowed = frozenset(_affinity() if affinity is None else affinity)
    assert allowed, "a process has at least one CPU"
    quota = cpu_quota() if quota is None else quota
    cores_of = _cores_by_node(sysfs, allowed)
    topology = _topology(_within_quota(cores_of, quota))
    virtual = (os.environ if env is None else env).get(TOPOLOGY_VARIABLE, "").strip()
    return _virtual_topology(virtual, topology) if virtual else topology


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


Cores = list[tuple[int, ...]]
"""The CPUs of each core, by the core's first CPU."""


def _cores_by_node(sysfs: Path, allowed: frozenset[int]) -> dict[int, Cores]:
    cores_of: dict[int, Cores] = {}
    left = set(allowed)
    for node, cpus in _nodes(sysfs).items():
        here = cpus & left
        left -= here
        if here:
            cores_of[node] = _cores(sysfs, here)
    if left:  # the system has no NUMA, or does not say
        cores_of[0] = sorted(cores_of.get(0, []) + _cores(sysfs, left))
    return dict(sorted(cores_of.items()))


def _nodes(sysfs: Path) -> dict[int, set[int]]:
    cpus_of = {}
    for directory in (sysfs / "devices/system/node").glob("node*"):
        match = _NODE.fullmatch(directory.name)
        if match:
            cpus_of[int(match[1])] = _read_cpu_list(directory / "cpulist")
    return dict(sorted(cpus_of.items()))


def _cores(sysfs: Path, cpus: set[int]) -> Cores:
    cores = []
    left = set(cpus)
    for cpu in sorted(cpus):
        if cpu in left:
            topology = sysfs / f"devices/system/cpu/cpu{cpu}/topology"
            siblings = _read_cpu_list(topology / "thread_siblings_list") & left | {cpu}
            left -= siblings
            cores.append(tuple(sorted(siblings)))
    return cores


def _read_cpu_list(path: Path) -> set[int]:
    """The CPUs of a list such as `0-3,8,10-11`; none where the file is missing or unreadable."""
    cpus: set[int] = set()
    try:
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return set()
    return cpus


def _within_quota(cores_of: dict[int, Cores], quota: float) -> dict[int, Cores]:
    """The first cores that the quota pays for: one CPU's worth each, and always one.

    A thread beyond the quota would stall its whole group whenever the time is used up. Taking the
    first cores, not some of each node, keeps a small quota's memory on one node.
    """
    if math.isinf(quota):
        return cores_of
    left = max(1, math.floor(quota))
    kept = {}
    for node, cores in cores_of.items():
        if left:
            kept[node] = cores[:left]
            left -= len(kept[node])
    return kept


def _topology(cores_of: Mapping[int, Cores]) -> Topology:
    return Topology(
        tuple(
            Card(node, tuple(PE(node, index, cpus) for index, cpus in enumerate(cores)))
            for node, cores in cores_of.items()
        )
    )


def _virtual_topology(text: str, real: Topology) -> Topology:
    match = _VIRTUAL.fullmatch(text.lower())
    num_cards, num_pes = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= num_cards * num_pes <= MAX_VIRTUAL_PES:
        raise DeviceError(
            f"{TOPOLOGY_VARIABLE}: {shown(text)} is not CARDSxPES such as 4x2 (4 cards of 2 PEs "
            f"each), with 1 to {MAX_VIRTUAL_PES} PEs in all: correct or unset it",
            param="devices",
        )
    cores = [pe.cpus for pe in real.pes]
    return _topology(
        {
            card: [cores[(card * num_pes + index) % len(cores)] for index in range(num_pes)]
            for card in range(num_cards)
        }
    )
