"""What a daemon says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The state of a daemon at one moment."""

    state: str
    """"starting", "ready", "draining" or "failed"."""
    phase: str
    """What it is doing while it starts."""
    model: str
    max_model_len: int | None
    """Tokens that prompt and answer may have together; None until the model is loaded."""
    num_in_flight: int
    """Requests that have not ended, over HTTP and the socket."""
    raw: dict[str, Any]
    """Everything it said, its workers among it."""

    @property
    def workers(self) -> list[dict[str, Any]]:
        """One dict per worker; [] until the workers have been started."""
        engine = self.raw.get("engine")
        workers = engine.get("workers") if isinstance(engine, dict) else None
        return workers if isinstance(workers, list) else []

    @classmethod
    def of(cls, raw: dict[str, Any]) -> DaemonStatus:
        """From the plain values of a `StatusReport`."""
        max_model_len = raw.get("max_model_len")
        num_in_flight = raw.get("num_in_flight")
        return cls(
            state=str(raw.get("state", "")),
            phase=str(raw.get("phase", "")),
            model=str(raw.get("model", "")),
            max_model_len=max_model_len if isinstance(max_model_len, int) else None,
            num_in_flight=num_in_flight if isinstance(num_in_flight, int) else 0,
            raw=raw,
        )
