"""SamplingParams as the client socket carries them: the fields that are not at their default.

So a field that only one end knows is refused by name where it is not known, and one that neither
side uses costs nothing.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from typing import Any

from furiosa_llm.checks import shown
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.sampling_params import SamplingParams

_DEFAULTS = SamplingParams()
_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def params_to_plain(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults, as plain values."""
    plain = {}
    for name in _NAMES:
        value = getattr(params, name)
        if value != getattr(_DEFAULTS, name):
            plain[name] = _to_plain(value)
    return plain


def params_from_plain(plain: dict[str, Any]) -> SamplingParams:
    """What `params_to_plain` wrote. Raises: InvalidRequestError for anything else."""
    unknown = sorted(plain.keys() - _NAMES)
    if unknown:
        raise InvalidRequestError(
            f"sampling_params has the field {shown(unknown[0])}, which this daemon does not know: "
            f"leave it out, or use a daemon of the client's version",
            param=unknown[0],
        )
    return SamplingParams(**{name: _from_plain(value) for name, value in plain.items()})


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(inner) for inner in value]
    return int(value) if isinstance(value, IntEnum) else value


def _from_plain(value: Any) -> Any:
    # MessagePack's keys are text here; those of a dict by token id (logit_bias) are all numbers.
    if isinstance(value, dict) and all(k.isascii() and k.isdigit() and len(k) < 12 for k in value):
        return {int(key): inner for key, inner in value.items()}
    return value
