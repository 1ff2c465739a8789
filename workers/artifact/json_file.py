"""Reads a checkpoint's small JSON files and takes typed fields out of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.errors import ArtifactError

_MAX_NBYTES = 64 << 20


class Fields:
    """The fields of one JSON object; taking one checks its type and names the file at fault."""

    def __init__(self, name: str, table: Mapping[str, Any]) -> None:
        self.name = name
        self.table = table

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Read a file that holds one JSON object. Raises: ArtifactError."""
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_NBYTES + 1)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
        if len(text) > _MAX_NBYTES:
            raise ArtifactError(f"{path} is larger than {_MAX_NBYTES} bytes")
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            raise ArtifactError(f"{path} is not valid JSON") from None
        if not isinstance(table, dict):
            raise ArtifactError(f"{path} does not hold a JSON object")
        return cls(path.name, table)

    def integer(self, field: str, default: int | None = None) -> int:
        value = self._get(field, default)
        if type(value) is not int or abs(value) >= 1 << 62:
            raise self._wrong(field, "an integer", value)
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._get(field, default)
        if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
            raise self._wrong(field, "a finite number", value)
        return float(value)

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self._get(field, default)
        if type(value) is not bool:
            raise self._wrong(field, "true or false", value)
        return value

    def mapping(self, field: str) -> dict[str, Any]:
        value = self._get(field, {})
        if not isinstance(value, dict):
            raise self._wrong(field, "an object", value)
        return value

    def token_ids(self, field: str) -> list[int]:
        """A token id or a list of them; [] if absent or null."""
        value = self._get(field, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(x) is int and 0 <= x < 1 << 31 for x in values):
            raise self._wrong(field, "a token id or a list of them", value)
        return values

    def _get(self, field: str, default: Any) -> Any:
        value = self.table.get(field)
        if value is None:
            value = default
        if value is None:
            raise ArtifactError(f"{self.name}: {field} is missing")
        return value

    def _wrong(self, field: str, expected: str, value: Any) -> ArtifactError:
        return ArtifactError(f"{self.name}: {field} must be {expected}, not {str(value)[:80]!r}")
