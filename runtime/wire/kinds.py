"""What a field of a message may hold, both ways: the parts that the codecs' tables are made of.

A `Kind` turns a field's value into what MessagePack carries and back, and knows its type and
bounds. It checks as strictly when it packs as when it unpacks: a wrong value is an error where it
was made; at the receiver it would only be a dropped message that somebody waits for.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from furiosa_llm.wire.errors import WireError

MAX_TEXT_BYTES = 16 << 10
"""Of a text field that states no bound of its own."""


class Kind(NamedTuple):
    """What one field may hold. Both ways raise WireError, with a reason that names no field."""

    pack: Callable[[Any], object]  # field value -> what MessagePack carries
    unpack: Callable[[Any], Any]  # what MessagePack carried -> field value


def _both_ways(check: Callable[[Any], Any]) -> Kind:
    """A kind that travels as itself."""
    return Kind(check, check)


def shown(value: object) -> str:
    """`value` for an error text: short, whatever a peer sent."""
    if isinstance(value, (str, bytes, bytearray)):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # repr would refuse the longest
    return repr(value)[:40]


def integer(low: int, high: int) -> Kind:
    def check(value: Any) -> int:
        if type(value) is not int:  # a bool is no integer here
            raise WireError(f"{shown(value)} is not an integer")
        if not low <= value <= high:
            raise WireError(f"{shown(value)} is not in {low}..{high}")
        return value

    return _both_ways(check)


def number(low: float, high: float = math.inf, *, bounds: str = "[]") -> Kind:
    """A finite float between two bounds; "(" or ")" leaves out the bound itself."""

    def check(value: Any) -> float:
        if type(value) is not float and type(value) is not int:
            raise WireError(f"{shown(value)} is not a number")
        if (
            not low <= value <= high  # false for NaN too
            or abs(value) > sys.float_info.max
            or (bounds[0] == "(" and value == low)
            or (bounds[1] == ")" and value == high)
        ):
            raise WireError(
                f"{shown(value)} is not a finite number in {bounds[0]}{low:g}, {high:g}{bounds[1]}"
            )
        return float(value)

    return _both_ways(check)


def boolean() -> Kind:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise WireError(f"{shown(value)} is not a boolean")
        return value

    return _both_ways(check)


def text(*allowed: str, max_bytes: int = MAX_TEXT_BYTES) -> Kind:
    """Text without surrogates, up to `max_bytes` in UTF-8; one of `allowed` if any is given."""

    def check(value: Any) -> str:
        if type(value) is not str:
            raise WireError(f"{shown(value)} is not text")
        if allowed and value not in allowed:
            raise WireError(f"{shown(value)} is none of {', '.join(allowed)}")
        try:
            num_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise WireError("the text has a lone surrogate") from None
        if num_bytes > max_bytes:
            raise WireError(f"{num_bytes} bytes of text are over {max_bytes}")
        return value

    return _both_ways(check)


def _packed(letter: str, check: Callable[[tuple[Any, ...]], None]) -> Kind:
    """A tuple of numbers as little-endian bytes, each as `letter` of `struct` says."""
    width = struct.calcsize("<" + letter)

    def pack(values: Any) -> bytes:
        if type(values) is not tuple:
            raise WireError(f"{shown(values)} is not a tuple")
        try:
            packed = struct.pack(f"<{len(values)}{letter}", *values)
        except (struct.error, OverflowError) as error:
            raise WireError(str(error)) from None
        check(values)
        return packed

    def unpack(packed: Any) -> tuple[Any, ...]:
        if type(packed) is not bytes:
            raise WireError(f"{shown(packed)} is not binary")
        if len(packed) % width:
            raise WireError(f"{len(packed)} bytes are not a multiple of {width}")
        values = struct.unpack(f"<{len(packed) // width}{letter}", packed)
        check(values)
        return values

    return Kind(pack, unpack)


def integers(letter: str, max_len: int, *, min_len: int = 0) -> Kind:
    """A tuple of integers, none negative; `letter` is struct's: B 1 byte, i 4, q 8."""

    def check(values: tuple[int, ...]) -> None:
        if not min_len <= len(values) <= max_len:
            raise WireError(f"{len(values)} values are not in {min_len}..{max_len}")
        if values and min(values) < 0:
            raise WireError(f"{min(values)} is negative")

    return _packed(letter, check)


def floats(max_len: int) -> Kind:
    """A tuple of finite floats."""

    def check(values: tuple[float, ...]) -> None:
        if len(values) > max_len:
            raise WireError(f"{len(values)} values are over {max_len}")
        if not all(map(math.isfinite, values)):
            raise WireError("a value is not finite")

    return _packed("d", check)


def tuple_of(kind: Kind, max_len: int) -> Kind:
    """A tuple whose entries are all of one kind."""

    def pack(values: Any) -> list[object]:
        if type(values) is not tuple or len(values) > max_len:
            raise WireError(f"{shown(values)} is not a tuple of at most {max_len}")
        return [kind.pack(value) for value in values]

    def unpack(packed: Any) -> tuple[Any, ...]:
        if type(packed) is not list or len(packed) > max_len:
            raise WireError(f"{shown(packed)} is not a list of at most {max_len}")
        return tuple([kind.unpack(value) for value in packed])

    return Kind(pack, unpack)


def pair(first: Kind, second: Kind) -> Kind:
    def pack(values: Any) -> list[object]:
        if type(values) is not tuple or len(values) != 2:
            raise WireError(f"{shown(values)} is not a pair")
        return [first.pack(values[0]), second.pack(values[1])]

    def unpack(packed: Any) -> tuple[Any, Any]:
        if type(packed) is not list or len(packed) != 2:
            raise WireError(f"{shown(packed)} is not a pair")
        return first.unpack(packed[0]), second.unpack(packed[1])

    return Kind(pack, unpack)


def record(cls: type, kind_of: dict[str, Kind], fits: Callable[[Any], str] | None = None) -> Kind:
    """A dataclass as the list of its fields.

    Args:
        fits: what is wrong between the fields of a value, each of which is right; "" if nothing is.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    assert names == list(kind_of), f"the kinds of {cls.__name__} do not match its fields"
    packs = [kind.pack for kind in kind_of.values()]
    unpacks = [kind.unpack for kind in kind_of.values()]

    def pack(message: Any) -> list[object]:
        if type(message) is not cls:
            raise WireError(f"{shown(message)} is not a {cls.__name__}")
        packed = _each(packs, [getattr(message, name) for name in names])
        if fits is not None and (problem := fits(message)):
            raise WireError(problem)
        return packed

    def unpack(packed: Any) -> Any:
        if type(packed) is not list or len(packed) != len(names):
            raise WireError(f"{shown(packed)} is not a list of {len(names)}")
        message = cls(*_each(unpacks, packed))
        if fits is not None and (problem := fits(message)):
            raise WireError(problem)
        return message

    def _each(convert: list[Callable[[Any], object]], values: Any) -> list[object]:
        converted: list[object] = []
        try:
            for convert_one, value in zip(convert, values, strict=True):
                converted.append(convert_one(value))
        except WireError as error:
            raise WireError(f"{cls.__name__}.{names[len(converted)]}: {error}") from None
        return converted

    return Kind(pack, unpack)


def optional(kind: Kind) -> Kind:
    """None, or a value of `kind`."""
    return Kind(
        lambda value: None if value is None else kind.pack(value),
        lambda packed: None if packed is None else kind.unpack(packed),
    )


def plain_map(*, max_values: int, max_depth: int, max_text_bytes: int) -> Kind:
    """A dict of what JSON can say: None, booleans, 64-bit integers, finite floats, text, lists and
    dicts with text keys. `max_values` counts them all, the inner ones too.
    """
    text_kind = text(max_bytes=max_text_bytes)

    def check(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise WireError(f"{shown(value)} is not a map")
        _check_plain(value, text_kind, max_values, max_depth)
        return value

    return _both_ways(check)


def _check_plain(value: Any, text_kind: Kind, num_left: int, depth_left: int) -> int:
    """Raise WireError unless `value` is plain. Returns: how many values more there may be."""
    num_left -= 1
    if num_left < 0:
        raise WireError("there are too many values in it")
    if type(value) is str:
        text_kind.pack(value)
    elif type(value) is dict or type(value) is list:
        if depth_left == 0:
            raise WireError("it is nested too deeply")
        if type(value) is dict:
            for key in value:
                text_kind.pack(key)
        for inner in value.values() if type(value) is dict else value:
            num_left = _check_plain(inner, text_kind, num_left, depth_left - 1)
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise WireError(f"{shown(value)} is not a 64-bit integer")
    elif type(value) is float:
        if not math.isfinite(value):
            raise WireError(f"{value} is not finite")
    elif value is not None and type(value) is not bool:
        raise WireError(f"{shown(value)} is not a plain value")
    return num_left
