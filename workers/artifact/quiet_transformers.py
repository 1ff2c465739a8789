"""transformers, without its notices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from logging import ERROR


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and use transformers without its advice that torch is missing."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity(ERROR)
        try:
            yield
        finally:
            logging.set_verbosity(level)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
