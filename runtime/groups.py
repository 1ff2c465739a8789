"""From devices to data-parallel groups: which PEs each worker process gets.

Each device is one group, unless a size says otherwise; then all PEs in order are cut into groups of
equal size. A group lies within one card, or else it is made of whole devices: no group takes a part
of one card and a part of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from furiosa_llm.devices import DeviceEntry
from furiosa_llm.errors import DeviceError
from furiosa_llm.topology import PE, Topology


@dataclass(frozen=True, slots=True)
class PEGroup:
    """What one worker runs on."""

    index: int
    pes: tuple[PE, ...]  # at least one

    @property
    def cpus(self) -> tuple[tuple[int, ...], ...]:
        """The CPU ids of each PE."""
        return tuple(pe.cpus for pe in self.pes)

    def __str__(self) -> str:
        """As a device list: `npu:0:0-3`, `npu:0:4,npu:1:0-1`."""
        runs: list[list[PE]] = []
        for pe in self.pes:
            last = runs[-1][-1] if runs else None
            if last is not None and (last.card, last.index + 1) == (pe.card, pe.index):
                runs[-1].append(pe)
            else:
                runs.append([pe])
        return ",".join(
            str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1].index}" for run in runs
        )


@dataclass(frozen=True, slots=True)
class _Device:
    """An entry with its PEs."""

    entry: DeviceEntry
    pes: tuple[PE, ...]


def form_groups(
    entries: tuple[DeviceEntry, ...] | None,
    topology: Topology,
    *,
    data_parallel_size: int | None = None,
    tensor_parallel_size: int | None = None,
) -> tuple[PEGroup, ...]:
    """The groups, by index.

    Args:
        entries: as `parse_devices` gives them; None is every card.
        data_parallel_size: how many groups; None is one per entry, or as many as the other size
            makes.
        tensor_parallel_size: how many PEs each group has; None is whatever comes out.
    Raises: DeviceError for a card or PE that is not there, or PEs that do not divide evenly.
    """
    if entries is None:
        entries = tuple(DeviceEntry(card.index) for card in topology.cards)
    devices = [_Device(entry, _pes_of(entry, topology)) for entry in entries]
    if data_parallel_size is None and tensor_parallel_size is None:
        parts = [device.pes for device in devices]
    else:
        pes = tuple(pe for device in devices for pe in device.pes)
        size = _group_size(len(pes), data_parallel_size, tensor_parallel_size)
        parts = [pes[start : start + size] for start in range(0, len(pes), size)]
        for part in parts:
            _check_within_card(part, devices)
    return tuple(PEGroup(index, part) for index, part in enumerate(parts))


def _pes_of(entry: DeviceEntry, topology: Topology) -> tuple[PE, ...]:
    if entry.card is None:
        return topology.pes
    card = next((card for card in topology.cards if card.index == entry.card), None)
    if card is None:
        raise DeviceError(
            f"--devices: there is no card npu:{entry.card} for {entry}: this process may use "
            f"{', '.join(map(str, topology.cards))}",
            param="devices",
        )
    if entry.first is None:
        return card.pes
    assert entry.last is not None
    if entry.last >= len(card.pes):
        there = f"PEs 0 to {len(card.pes) - 1}" if len(card.pes) > 1 else "PE 0 only"
        raise DeviceError(
            f"--devices: {entry} needs PE {entry.last} but {card} has {there} (the cores that this "
            f"process may use)",
            param="devices",
        )
    return card.pes[entry.first : entry.last + 1]


def _group_size(num_pes: int, data_parallel: int | None, tensor_parallel: int | None) -> int:
    have = f"the devices have {_pes(num_pes)}"
    if data_parallel is not None and tensor_parallel is not None:
        wanted = data_parallel * tensor_parallel
        if wanted != num_pes:
            raise DeviceError(
                f"--data-parallel-size {data_parallel} times --tensor-parallel-size "
                f"{tensor_parallel} is {_pes(wanted)} but {have}: leave one of them out, or name "
                f"other --devices",
                param="data_parallel_size",
            )
        return tensor_parallel
    if tensor_parallel is not None:
        if tensor_parallel > num_pes or num_pes % tensor_parallel:
            raise DeviceError(
                f"--tensor-parallel-size: {have}, which {_remainder(num_pes, tensor_parallel)}: "
                f"use {_choices(num_pes)}, or name other --devices",
                param="tensor_parallel_size",
            )
        return tensor_parallel
    assert data_parallel is not None
    if data_parallel > num_pes or num_pes % data_parallel:
        raise DeviceError(
            f"--data-parallel-size: {have}, which cannot be divided evenly into {data_parallel} "
            f"groups ({num_pes} / {data_parallel} = {num_pes // data_parallel} remainder "
            f"{num_pes % data_parallel}): use {_choices(num_pes)}, or name other --devices",
            param="data_parallel_size",
        )
    return num_pes // data_parallel


def _check_within_card(part: Sequence[PE], devices: Sequence[_Device]) -> None:
    if len({pe.card for pe in part}) == 1:
        return
    members = set(part)
    for device in devices:
        inside = members.intersection(device.pes)
        if inside and len(inside) < len(device.pes) and not device.entry.is_cpu:
            raise DeviceError(
                f"a group of {_pes(len(part))} would be {PEGroup(0, tuple(part))}, which spans "
                f"cards and takes {len(inside)} of the {_pes(len(device.pes))} of {device.entry}: "
                f"choose sizes that divide each card or unite whole devices, or name other "
                f"--devices",
                param="data_parallel_size",
            )


def _remainder(num_pes: int, size: int) -> str:
    return (
        f"cannot be divided evenly into groups of {size} ({num_pes} / {size} = "
        f"{num_pes // size} remainder {num_pes % size})"
    )


def _choices(num_pes: int) -> str:
    return ", ".join(str(n) for n in range(1, num_pes + 1) if num_pes % n == 0)


def _pes(count: int) -> str:
    return f"{count} PE{'' if count == 1 else 's'}"
