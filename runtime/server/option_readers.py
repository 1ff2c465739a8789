"""From the text of a flag, an environment variable or a file to a value for the option's check.

Numbers may be written as people say them: "1k" and "25.6k" are 1000 and 25600, "4Ki" is 4096,
"2GiB" and "500MB" are bytes, "30", "30s", "500ms", "2m" and "1h" are times. Every reader takes what
the user typed the name of (for the refusal) and the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from furiosa_llm.checks import refuse, shown

Read = Callable[[str, str], object]

_SCALED = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*(?:([kmgt])(i?))?(b?)", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|)")
_SECONDS_PER = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_text(flag: str, text: str) -> str:
    """As it is."""
    return text


def read_count(flag: str, text: str) -> int:
    """A whole number, perhaps with a prefix: 8192, 8k, 25.6k, 8Ki."""
    number = _scaled(text, allow_bytes=False)
    if number is None:
        raise refuse(flag, f"{shown(text)} is not a whole number such as 4096, 4k or 4Ki")
    return number


def read_bytes(flag: str, text: str) -> int:
    """A number of bytes: 1048576, 1MiB, 500kB, 2G."""
    number = _scaled(text, allow_bytes=True)
    if number is None:
        raise refuse(flag, f"{shown(text)} is not a number of bytes such as 1048576, 1MiB or 2GB")
    return number


def read_seconds(flag: str, text: str) -> float:
    """A time in seconds: 30, 30s, 1.5s, 500ms, 2m, 1h."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise refuse(flag, f"{shown(text)} is not a time such as 30, 30s, 500ms, 2m or 1h")
    return float(match[1]) * _SECONDS_PER[match[2]]


def read_bool(flag: str, text: str) -> bool:
    """true or false, yes or no, on or off, 1 or 0."""
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise refuse(flag, f"{shown(text)} is not true or false (or yes, no, on, off, 1, 0)")


def read_list(flag: str, text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _scaled(text: str, *, allow_bytes: bool) -> int | None:
    """The whole number that the text says, or None when it says none."""
    match = _SCALED.fullmatch(text.strip())
    if match is None:
        return None
    whole, decimals, prefix, binary, unit = match.groups(default="")
    if unit and not allow_bytes:
        return None
    scale = (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
    number = Fraction(f"{whole}.{decimals or 0}") * scale  # exact: 25.6k is no 25599.999
    return int(number) if number.denominator == 1 else None
