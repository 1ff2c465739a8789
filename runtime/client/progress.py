"""What a client remembers of a request, so that it can go on with it on another connection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from furiosa_llm.wire.client_messages import Accepted, Chat, Finish, Generate, LogprobColumns

ABORTED = Finish("abort", None, 0)


@dataclass(frozen=True, slots=True)
class News:
    """What came of one choice: a row of an `Outputs`."""

    choice_index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish | None = None
    logprobs: LogprobColumns | None = None


class StreamProgress:
    """A request, its tokens so far, and its credits. Pure.

    Args:
        message: what begins it; its stream id is filled in at each send.
        num_choices: `n`.
        window: rows that may be on their way, or unread, at any time.
    """

    def __init__(self, message: Generate | Chat, *, num_choices: int, window: int) -> None:
        assert window > 0
        self.request_id = message.request_id
        self.accepted: Accepted | None = None  # the first one: what it says never changes
        self._message = message
        self._token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        self._has_ended = [False] * num_choices
        self._window = window
        self._num_granted = 0  # credits that the daemon has not used
        self._num_unread = 0  # rows that have come and that the reader has not taken

    @property
    def is_finished(self) -> bool:
        return all(self._has_ended)

    def begin(self, stream_id: int) -> Generate | Chat:
        """The message that begins it, or goes on with it, on a new connection."""
        self._num_granted = max(self._window - self._num_unread, 0)
        accepted = self.accepted
        if accepted is None:
            return replace(self._message, stream_id=stream_id, credits=self._num_granted)
        choices = zip(self._token_ids, self._has_ended, strict=True)
        return Generate(
            stream_id=stream_id,
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=accepted.prompt_token_ids,
            add_special_tokens=False,
            params=self._message.params
            | {"seed": accepted.seed, "max_tokens": accepted.max_tokens},
            credits=self._num_granted,
            resume_token_ids=tuple(None if ended else tuple(ids) for ids, ended in choices),
            model_id=accepted.model_id,
        )

    def take(self, news: Iterable[News]) -> bool:
        """Note what came. Returns: whether it can have come, as far as can be told."""
        for each in news:
            index = each.choice_index
            if index >= len(self._has_ended) or self._has_ended[index]:
                return False
            self._token_ids[index] += each.token_ids
            self._has_ended[index] = each.finish is not None
            self._num_granted -= 1
            self._num_unread += 1
        return True

    def read(self, num_rows: int) -> int:
        """The reader has taken that many rows. Returns: credits to grant now, 0 for none yet.

        They are given back by half a window at a time: a message for each would be as many as those
        that the daemon sends.
        """
        self._num_unread -= num_rows
        num_free = self._window - self._num_granted - self._num_unread
        if self.is_finished or 2 * num_free < self._window:
            return 0
        self._num_granted += num_free
        return num_free

    def abort(self) -> list[News]:
        """End all choices that have not ended, without the daemon. Returns: what to tell of it."""
        running = [index for index, ended in enumerate(self._has_ended) if not ended]
        self._has_ended = [True] * len(self._has_ended)
        self._num_unread += len(running)
        return [News(index, finish=ABORTED) for index in running]
