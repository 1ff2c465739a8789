"""What the serving code tells of itself. The base class listens to nothing."""

from __future__ import annotations

from collections.abc import Sequence


class MetricsHooks:
    """Override what is of interest. Called on the event loop; must neither block nor raise.

    A request that was started ends by exactly one of `finished`, `aborted` and `refused`.
    """

    def request_started(self, *, endpoint: str, num_choices: int, max_tokens: int | None) -> None:
        """A request was parsed and goes to the engine; `endpoint` is its path or "socket"."""

    def first_token(self, *, seconds: float | None, num_prompt_tokens: int, count: int = 1) -> None:
        """`seconds` after it was started, the request's first `count` tokens came.

        None: nobody saw the first one come, since the reply came as a whole.
        """

    def tokens(self, *, count: int, seconds: float) -> None:
        """`count` further tokens of one request, `seconds` after those before them."""

    def finished(
        self,
        *,
        reasons: Sequence[str],
        num_prompt_tokens: int,
        num_tokens: int,
        seconds: float,
    ) -> None:
        """All choices have ended, for these reasons (one each): "stop" or "length"."""

    def aborted(self, *, num_tokens: int) -> None:
        """The client left before the end."""

    def refused(self, *, status: int, reason: str) -> None:
        """A request was answered by this HTTP status and this error code instead of tokens."""
