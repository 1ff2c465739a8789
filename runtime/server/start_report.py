"""How a daemon in the background tells the `furiosa-serve start` that waits for it how it fares.

Lines of JSON through a pipe: {"phase": ...} as often as it changes, then {"ready": {...}} or
{"error": ..., "exit_code": ...}. The pipe's end without either means that the daemon was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


class StartReport:
    """The daemon's end of the pipe.

    Args:
        descriptor: of the pipe, which is closed with the last word; None: nobody waits.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_inheritable(descriptor, False)  # a worker that held it would keep it open

    def phase(self, text: str) -> None:
        """What is being done now."""
        self._send({"phase": text})

    def ready(self, address: dict[str, Any]) -> None:
        """The last word of a start that went well."""
        self._send({"ready": address})
        self.close()

    def failed(self, message: str, exit_code: int) -> None:
        """The last word of one that did not."""
        self._send({"error": message, "exit_code": exit_code})
        self.close()

    def close(self) -> None:
        """Say no more; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _send(self, message: dict[str, Any]) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # the one who waited has left, which is no concern of ours
                os.write(self._descriptor, json.dumps(message).encode() + b"\n")


def read_reports(descriptor: int) -> Iterator[dict[str, Any]]:
    """The messages of a daemon that starts, until it has said its last word or has died."""
    with os.fdopen(descriptor, "rb") as lines:
        for line in lines:
            yield json.loads(line)
