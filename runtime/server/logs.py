"""Where a daemon's log goes: to its terminal or its manager, or to a bounded file of its own."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path

MAX_LOG_BYTES = 16 << 20
"""Of `log`; one older file of this size is kept as `log.1`."""


def set_up_logging(
    level: str, format_name: str, file: Path | None = None, *, is_owner: bool = True
) -> None:
    """Send all records to standard error, or to `file`, where whatever else this process and its
    workers write on standard output and error goes as well.

    Args:
        is_owner: whether this process rotates the file; another one only follows.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        handler = _OwnLogFile(file) if is_owner else WatchedFileHandler(file, encoding="utf-8")
    handler.setFormatter(_JsonFormatter() if format_name == "json" else _TextFormatter())
    root = logging.getLogger()
    for other in list(root.handlers):
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class _OwnLogFile(RotatingFileHandler):
    """Descriptors 1 and 2 follow the file when it is rotated: a traceback of the interpreter or a
    word of a C library would else end up in the old one.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
        self._point_standard_streams()

    def doRollover(self) -> None:
        super().doRollover()
        self._point_standard_streams()

    def _point_standard_streams(self) -> None:
        assert self.stream is not None
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(self.stream.fileno(), descriptor)


class _TextFormatter(logging.Formatter):
    """2026-11-24 11:33:07.123 INFO server.daemon: ready"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(short)s: %(message)s")
        self.datefmt = "%Y-%m-%d %H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        record.short = record.name.removeprefix("furiosa_llm.")
        return super().format(record)


class _JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
