"""A long benchmark in pieces, so that it may be stopped and gone on with.

    until python benchmarks/serving_vs_llamacpp.py --state run.json --budget-s 280; do :; done

Each piece's result is kept in a file as soon as there is one. With a budget, a piece that would
probably end too late is left for the next call, and the program then exits with code 75 ("try
again", sysexits.h).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRY_AGAIN = 75


class Pieces:
    """Results by key. Without a file they last as long as the process.

    Args:
        budget_s: the time for new pieces; None: no limit. One piece is always done.
    """

    def __init__(self, file: Path | None, budget_s: float | None) -> None:
        self._file, self._budget_s = file, budget_s
        self._begin_s = time.monotonic()
        self._num_done = 0
        self._results: dict[str, Any] = {}
        self._took_s: dict[str, float] = {}
        if file is not None and file.exists():
            kept = json.loads(file.read_text())
            self._results, self._took_s = kept["results"], kept["took_s"]

    def get(self, key: str, measure: Callable[[], Any], *, like: str | None = None) -> Any:
        """The result of the piece `key`, measured if it is not there yet.

        Args:
            like: a piece that took about as long, where it has been done.
        """
        if key in self._results:
            return self._results[key]
        elapsed_s = time.monotonic() - self._begin_s
        expected_s = self._took_s.get(like or "", 30.0)
        if (
            self._budget_s is not None
            and self._num_done
            and elapsed_s + 1.2 * expected_s > self._budget_s
        ):
            print(f"the budget of {self._budget_s:g} s is used up: call again for {key}")
            sys.exit(TRY_AGAIN)
        begin_s = time.monotonic()
        self._results[key] = result = measure()
        self._took_s[key] = time.monotonic() - begin_s
        self._num_done += 1
        print(f"{key}: {self._took_s[key]:.1f} s", flush=True)
        if self._file is not None:
            kept = {"results": self._results, "took_s": self._took_s}
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(kept))
            partial.replace(self._file)
        return result
