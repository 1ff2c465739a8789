"""What many test files share: the real model, fetched once and built once per weight type."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.known_models import fetch_known_model, find_known_model
from furiosa_llm.workers.artifact.resolve import resolve_model

# An example takes as long as it takes: the machine may be busy with something else.
settings.register_profile("furiosa-serve", deadline=None)
settings.load_profile("furiosa-serve")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: commands under test
# must meet it as on a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2 = "SmolLM2-135M-Instruct"


def default_cache_dir() -> Path:
    """The engine's own default, so that tests and users fetch and build the model once between
    them; read from the environment by hand, as this must not need the front-end.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "furiosa" / "llm"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The embedded default model's file."""
    known = find_known_model(SMOLLM2)
    assert known is not None
    return fetch_known_model(known, default_cache_dir())


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2_gguf: Path) -> Callable[[str], Artifact]:
    """Opens the default model's artifact of a weight type."""

    @cache
    def open_artifact(weights: str) -> Artifact:
        resolved = resolve_model(SMOLLM2, cache_dir=default_cache_dir(), weights=weights)
        return Artifact.open(resolved.path)

    return open_artifact
