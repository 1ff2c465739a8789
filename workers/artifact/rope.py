"""Rotary frequencies, with the scaling that the model was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import ArtifactError

SUPPORTED = ("default", "linear", "llama3")


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> NDArray[np.float32]:
    """The angle per position of each pair of a head's values, (head_dim / 2,) float32.

    Args:
        theta: the base; pair i turns by theta ** (-2 i / head_dim) per position.
        scaling: `rope_type` (default, linear or llama3) and its parameters as config.json has
            them: `factor`; for llama3 also `low_freq_factor`, `high_freq_factor` and
            `original_max_position_embeddings`.
    Raises: ArtifactError for another type, or parameters that are missing or out of range.
    Source: RoPE (Su et al. 2021); position interpolation (Chen et al. 2023); Llama 3.1's
        scaling, which divides long wavelengths by `factor`, keeps short ones, and blends between.
    """
    if not (math.isfinite(theta) and theta > 1):
        raise ArtifactError(f"rope_theta is {theta}; it must be a number above 1")
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SUPPORTED:
        raise ArtifactError(
            f"RoPE scaling {str(kind)[:40]!r} is not supported; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    if kind == "default":
        return plain.astype(np.float32)
    factor = _number(scaling, "factor")
    if kind == "linear":
        return (plain / factor).astype(np.float32)
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if high <= low:
        raise ArtifactError(
            f"RoPE scaling: high_freq_factor {high} must exceed low_freq_factor {low}"
        )
    rotations = _number(scaling, "original_max_position_embeddings") * plain / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * plain / factor).astype(np.float32)


def _number(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtifactError(f"RoPE scaling needs {name} to be a number, not {value!r}")
    if not (math.isfinite(value) and 0 < value < 1e15):
        raise ArtifactError(f"RoPE scaling: {name} is {value}; it must be a positive number")
    return float(value)
