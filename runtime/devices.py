"""Device strings: which processing elements (PEs) the caller wants, as written, not yet looked up.

    npu:X  npu:X:*   all PEs of card X
    npu:X:N          PE N of card X
    npu:X:A-B        PEs A to B, both included; as many as a power of two, A a multiple of that many
    cpu              all PEs of all cards

Several are separated by commas, and are all of one kind. Whether the machine has them is decided
in `groups.form_groups`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from furiosa_llm.checks import shown
from furiosa_llm.errors import DeviceError

MAX_ENTRIES = 1024

_NPU = re.compile(r"npu:([0-9]{1,4})(?::(?:(\*)|([0-9]{1,4})(?:-([0-9]{1,4}))?))?")

_ALLOWED = (
    "a device is npu:X (a card), npu:X:N (one PE of it), npu:X:A-B (PEs A to B), npu:X:* (all PEs) "
    "or cpu; several are separated by commas"
)


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device of the list: a run of PEs of one card, a whole card, or the whole machine."""

    card: int | None
    """None is `cpu`, all cards."""
    first: int | None = None
    """Index of the first PE; None is all PEs of the card."""
    last: int | None = None
    """Index of the last PE, itself included."""

    @property
    def is_cpu(self) -> bool:
        return self.card is None

    def overlaps(self, other: DeviceEntry) -> bool:
        """Whether some PE belongs to both, whatever the machine."""
        if self.card is None or other.card is None:
            return True
        if self.card != other.card:
            return False
        if self.first is None or other.first is None:
            return True
        assert self.last is not None
        assert other.last is not None
        return self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        if self.card is None:
            return "cpu"
        if self.first is None:
            return f"npu:{self.card}"
        if self.first == self.last:
            return f"npu:{self.card}:{self.first}"
        return f"npu:{self.card}:{self.first}-{self.last}"


def parse_devices(spec: str | Sequence[str]) -> tuple[DeviceEntry, ...]:
    """The devices that `spec` names, by card and then PE, both as numbers.

    Args:
        spec: a comma-separated string, or a list of such strings. Spaces around each are dropped.
    Raises: DeviceError on anything else, on no device at all, on two kinds, and where a PE is
        named twice.
    """
    strings = [spec] if isinstance(spec, str) else spec
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise _refuse(f"{shown(spec)} is not a string or a list of strings")
    texts = [text.strip() for string in strings for text in string.split(",")]
    if not any(texts):
        raise _refuse(f"{shown(spec)} names no device")
    if len(texts) > MAX_ENTRIES:
        raise _refuse(f"{len(texts)} devices are more than {MAX_ENTRIES}")
    entries = [_parse_entry(text, spec) for text in texts]
    if len({entry.is_cpu for entry in entries}) > 1:
        raise _refuse(f"{shown(spec)} mixes npu and cpu: all devices must be of one kind")
    entries.sort(key=_order)
    _check_overlaps(entries)
    return tuple(entries)


def _parse_entry(text: str, spec: object) -> DeviceEntry:
    if not text:
        raise _refuse(f"{shown(spec)} has an empty entry")
    if text == "cpu":
        return DeviceEntry(card=None)
    match = _NPU.fullmatch(text)
    if match is None:
        raise _refuse(f"{shown(text)} is not a device")
    card, _, first, last = match.groups()
    if first is None:
        return DeviceEntry(int(card))
    entry = DeviceEntry(int(card), int(first), int(last or first))
    _check_range(text, int(first), int(last or first))
    return entry


def _check_range(text: str, first: int, last: int) -> None:
    width = last - first + 1
    if width < 1:
        raise _refuse(f"{shown(text)} runs backwards: write the lower PE first")
    if width & (width - 1):
        raise _refuse(
            f"{shown(text)} has {width} PEs: a range has 1, 2, 4, 8 or another power of two"
        )
    if first % width:
        raise _refuse(
            f"{shown(text)} has {width} PEs but begins at {first}: a range begins at a multiple of "
            f"its width, such as {first - first % width} or {first - first % width + width}"
        )


def _check_overlaps(entries: list[DeviceEntry]) -> None:
    # Every pair: what overlaps need not be neighbours in the order. At most MAX_ENTRIES squared / 2
    # comparisons, a fraction of a second.
    for one, other in combinations(entries, 2):
        if one == other:
            raise _refuse(f"{one} is named twice")
        if one.overlaps(other):
            raise _refuse(f"{one} and {other} overlap: name each PE once")


def _order(entry: DeviceEntry) -> tuple[int, int, int]:
    return (
        -1 if entry.card is None else entry.card,
        -1 if entry.first is None else entry.first,
        -1 if entry.last is None else entry.last,
    )


def _refuse(message: str) -> DeviceError:
    return DeviceError(f"{message} ({_ALLOWED})", param="devices")
