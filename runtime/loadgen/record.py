"""What became of one request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

clock = time.perf_counter
"""The clock of all times here, in seconds."""


@dataclass(slots=True)
class Record:
    """One request: what was meant, and what came.

    `due_s` is the moment at which the request should have been sent. All latencies count from it:
    a client or server too slow to take a request in time does not hide how long the caller waited
    (the "coordinated omission" of load generators that measure from the sending).
    """

    due_s: float
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)  # when each piece of the answer came
    end_s: float = 0.0  # 0 while it runs
    num_prompt_tokens: int | None = None  # as the server counted them, if it said
    num_counted_tokens: int | None = None  # the answer's, likewise
    error: str | None = None  # its kind, few and countable, such as "http 429"
    detail: str = ""  # the error's own words

    @property
    def is_ok(self) -> bool:
        return self.error is None and self.end_s > 0

    @property
    def num_output_tokens(self) -> int:
        """The server's count, else one per piece."""
        return len(self.token_s) if self.num_counted_tokens is None else self.num_counted_tokens

    def fail(self, kind: str, detail: str = "") -> None:
        """Note the error that ends the request; the first one stays."""
        if self.error is None:
            self.error, self.detail = kind, detail
