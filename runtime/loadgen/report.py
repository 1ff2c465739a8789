"""A run's settings and figures as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from furiosa_llm import __version__
from furiosa_llm.loadgen.summary import Summary

FORMAT_VERSION = 1


def report_json(settings: Mapping[str, Any], summary: Summary) -> str:
    """One object; times are in seconds; what could not be measured is null."""
    report = {
        "format": FORMAT_VERSION,
        "version": __version__,
        "settings": dict(settings),
        "results": asdict(summary),
    }
    return json.dumps(_without_nan(report), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
