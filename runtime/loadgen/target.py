"""What a load is aimed at, whatever carries the requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.loadgen.record import Record

Prompt = Sequence[int] | str


class TargetError(FuriosaLLMError):
    """The server to be measured cannot be reached or used."""

    code = "bench_target"


class Target(Protocol):
    """A server, as the runner sees it."""

    async def send(self, prompt: Prompt, record: Record) -> None:
        """Send one request and wait for all of its answer, noting in `record` what comes when.

        What goes wrong is noted too, never raised; but a cancellation is passed on, and leaves
        `record.end_s` at 0.
        """

    async def close(self) -> None:
        """Let go of all connections."""
