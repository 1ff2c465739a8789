"""Options as plain JSON values, for another process of the same daemon."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from furiosa_llm.server.options import OPTIONS, ServeOptions, make_options


def options_to_json(options: ServeOptions) -> dict[str, Any]:
    """Every option's value by key."""
    return {
        key: _plain(getattr(getattr(options, option.owner), option.field))
        for key, option in OPTIONS.items()
    }


def options_of_json(values: Mapping[str, Any]) -> ServeOptions:
    """What `options_to_json` was given. Raises: InvalidRequestError for any other values."""
    checked = {}
    for key, value in values.items():
        option = OPTIONS[key]
        checked[key] = None if value is None else option.check(option.flag, value)
    return make_options(checked)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
