"""Strict checks of single values that a user gave: the value in its normal form, or a refusal.

`name` is what the user typed, `--npu-queue-limit` or `top_p`; a refusal reads
"NAME: VALUE is not WHAT IS ALLOWED", and its `param` is the name as a Python identifier.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

from furiosa_llm.errors import InvalidRequestError

MAX_INT32 = 2**31 - 1
"""Bounds every count and token id: they travel and are computed with as int32."""

_MAX_SHOWN_CHARS = 80


def refuse(name: str, message: str) -> InvalidRequestError:
    """The error to raise for the value of `name`."""
    return InvalidRequestError(f"{name}: {message}", param=name.lstrip("-").replace("-", "_"))


def shown(value: object) -> str:
    """`value` for a message: short, and never an error (Python refuses to print huge ints)."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


def check_int(name: str, value: Any, *, low: int, high: int = MAX_INT32) -> int:
    """An integer within [low, high]; bools and floats are none, numpy's integers are."""
    if type(value) is int and low <= value <= high:  # nearly always, and each request asks often
        return value
    if (
        not isinstance(value, bool)
        and isinstance(value, numbers.Integral)
        and low <= value.__index__() <= high
    ):
        return int(value)
    allowed = f"of at least {low}" if high == MAX_INT32 else f"from {low} to {high}"
    raise refuse(name, f"{shown(value)} is not an integer {allowed}")


def check_number(
    name: str, value: Any, *, low: float, high: float, above: bool = False, below: bool = False
) -> float:
    """A finite number within [low, high], as a float; `above`/`below` leave out a bound itself."""
    if (
        (type(value) is float or (not isinstance(value, bool) and _is_real(value)))
        and low <= value <= high  # false for NaN; float() of a huge int would overflow
        and not (above and value == low)
        and not (below and value == high)
    ):
        return float(value)
    lower = f"above {low:g}" if above else f"{'of at least' if below else 'from'} {low:g}"
    upper = f"and below {high:g}" if below else f"{'and at most' if above else 'to'} {high:g}"
    raise refuse(name, f"{shown(value)} is not a number {lower} {upper}")


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # numpy's numbers are


def check_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise refuse(name, f"{shown(value)} is not True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """The one of `choices` that `value` spells, whatever its case."""
    choices = tuple(choices)
    for choice in choices:
        if isinstance(value, str) and value.lower() == choice.lower():
            return choice
    raise refuse(name, f"{shown(value)} is not one of {', '.join(choices)}")
