"""The client's side of the protocol as a state machine: no socket, no clock, no thread.

Method calls carry what happened and the time; they return what is to be done. Two shells do it, one
on a thread and one on an event loop.

    DOWN ──somebody wants something──► DIALLING ──Welcome──► UP
      ▲           (after a pause)          │                 │
      └────────── no answer ───────────────┴── lost ─────────┘

What was asked and not answered is kept. When the connection is back, calls are sent again, and
streams are begun again with the tokens they have, so that they go on as if nothing had happened.
Each has its own time after which it fails instead. With nothing asked, a lost connection is
not even dialled again, and an idle one sends nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import cast

from furiosa_llm.client.errors import ClientClosedError, DaemonUnreachableError, error_of
from furiosa_llm.client.progress import News, StreamProgress
from furiosa_llm.errors import (
    EngineShutDownError,
    FuriosaLLMError,
    OverloadedError,
    ServiceUnavailableError,
)
from furiosa_llm.wire.client_codec import VersionError, decode_from_daemon, encode_client
from furiosa_llm.wire.client_messages import (
    Abort,
    Accepted,
    Credit,
    Detokenize,
    Drain,
    Drop,
    Failed,
    FromClient,
    FromDaemon,
    GetStatus,
    Goodbye,
    Hello,
    Outputs,
    Ping,
    Tokenize,
    Welcome,
)
from furiosa_llm.wire.errors import WireError

ATTEMPT_TIMEOUT_S = 5.0
"""From dialling to `Welcome`; then it is tried again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two attempts: doubling, and each a random part shorter, lest clients come in step."""
MAX_SILENT_BEATS = 3
MAX_INTERRUPTIONS = 10
"""Of one stream, with no token in between: more, and the stream itself is what ends the daemon."""
RETRYABLE = (ServiceUnavailableError, OverloadedError, EngineShutDownError)
"""What a daemon that is just starting, or stopping, says to a stream that goes on with its work."""

Call = Tokenize | Detokenize | GetStatus | Drain | Ping


@dataclass(frozen=True, slots=True)
class Dial:
    """effect: open a new connection to the daemon; what follows is sent on it."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """effect: close the connection; nothing of it is to be reported any more."""


@dataclass(frozen=True, slots=True)
class Send:
    """effect: send this on the connection."""

    packed: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """effect: hand this to whoever asked.

    A stream gets `Accepted` once, lists of `News`, and at the end maybe an error; a call gets its
    answer or an error, and that is all.
    """

    to: Hashable
    item: FromDaemon | list[News] | FuriosaLLMError


Effect = Dial | HangUp | Send | Deliver


class _Link(Enum):
    DOWN = 0
    DIALLING = 1
    UP = 2
    CLOSED = 3


class _Asked:
    """A stream or a call that has not ended."""

    __slots__ = ("give_up_s", "id", "is_abort_asked", "num_interruptions", "retry_s", "what")

    def __init__(self, what: StreamProgress | Call, give_up_s: float) -> None:
        self.what = what
        self.id = 0  # on the connection there is; 0: not sent on it
        self.give_up_s = give_up_s  # unless it is sent by then
        self.retry_s = 0.0  # it is not sent before
        self.num_interruptions = 0  # since something came of it
        self.is_abort_asked = False


class Connection:
    """One client's connection to one daemon, across restarts of the daemon.

    Args:
        client_id: random, for the life of the client.
        address: for texts.
        connect_timeout_s: how long the first asker, and those after it, wait for a daemon.
        reconnect_timeout_s: how long what was begun waits for the daemon to come back.
        jitter: random numbers from 0 to 1.
    """

    def __init__(
        self,
        client_id: str,
        *,
        software: str,
        address: str,
        connect_timeout_s: float,
        reconnect_timeout_s: float,
        jitter: Iterator[float] | None = None,
    ) -> None:
        self._hello = encode_client(Hello(client_id, software))
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._jitter = iter(random.random, None) if jitter is None else jitter
        self.num_malformed = 0
        self.num_connections = 0
        self._link = _Link.DOWN
        self._asked: dict[Hashable, _Asked] = {}  # all, in the order of asking
        self._unsent: dict[Hashable, _Asked] = {}  # those of id 0
        self._by_id: dict[int, Hashable] = {}
        self._next_id = 1
        self._next_seq = 0  # of the next Outputs
        self._pause_s = FIRST_PAUSE_S
        self._dial_s = 0.0  # when DOWN: not before
        self._attempt_ends_s = math.inf
        self._heartbeat_s = math.inf
        self._last_sent_s = self._last_heard_s = 0.0
        self._reason = "nothing listens there"  # why the last attempt or connection ended

    @property
    def is_up(self) -> bool:
        return self._link is _Link.UP

    # --- what callers ask -------------------------------------------------------------------------

    def begin(self, to: Hashable, stream: StreamProgress, now_s: float) -> list[Effect]:
        """Run a stream; `to` gets what comes of it."""
        return self._ask(to, stream, now_s)

    def call(self, to: Hashable, message: Call, now_s: float) -> list[Effect]:
        """Ask for one answer; the message's call id is filled in."""
        return self._ask(to, message, now_s)

    def read(self, to: Hashable, num_rows: int, now_s: float) -> list[Effect]:
        """The reader of a stream has taken that many of its `News`."""
        asked = self._asked.get(to)
        if asked is None or not isinstance(asked.what, StreamProgress):
            return []
        num_credits = asked.what.read(num_rows)
        if num_credits and asked.id:
            return [self._send(Credit(asked.id, num_credits), now_s)]
        return []

    def abort(self, request_id: str, now_s: float) -> list[Effect]:
        """End the streams of this request as they stand; their readers get a last output."""
        effects: list[Effect] = []
        for to, asked in list(self._asked.items()):
            stream = asked.what
            if not isinstance(stream, StreamProgress) or stream.request_id != request_id:
                continue
            if asked.id:
                asked.is_abort_asked = True  # in case the connection is lost before it is heard
                effects.append(self._send(Abort((asked.id,)), now_s))
            else:
                del self._asked[to], self._unsent[to]
                effects.append(Deliver(to, stream.abort()))
        return effects

    def drop(self, to: Hashable, now_s: float) -> list[Effect]:
        """Nobody waits for this any more."""
        asked = self._asked.pop(to, None)
        if asked is None:
            return []
        if not asked.id:
            del self._unsent[to]
            return []
        del self._by_id[asked.id]
        if isinstance(asked.what, StreamProgress):
            return [self._send(Drop((asked.id,)), now_s)]
        return []

    def close(self, now_s: float) -> list[Effect]:
        """Leave for good; whoever waits gets ClientClosedError."""
        effects: list[Effect] = []
        if self._link is _Link.UP:
            effects.append(self._send(Goodbye("the client was closed"), now_s))
        if self._link in (_Link.UP, _Link.DIALLING):
            effects.append(HangUp())
        self._link = _Link.CLOSED
        return effects + self._fail_all(ClientClosedError("the client was closed"))

    # --- what happens -----------------------------------------------------------------------------

    def received(self, packed: bytes, now_s: float) -> list[Effect]:
        """A message came on the connection."""
        if self._link not in (_Link.DIALLING, _Link.UP):
            return []
        self._last_heard_s = now_s
        try:
            message = decode_from_daemon(packed)
        except VersionError as error:
            return self.refused(
                f"the daemon at {self._address} speaks version {error.version} of the protocol "
                f"and this client another: use the furiosa-serve of the daemon for both"
            )
        except WireError as error:
            # It may have held tokens; the streams begin again with those that came before it.
            self.num_malformed += 1
            return self.lost(f"it sent a malformed message: {error}", now_s)
        return self._handle(message, now_s)

    def lost(self, reason: str, now_s: float) -> list[Effect]:
        """The connection, or the attempt at one, has ended."""
        if self._link not in (_Link.DIALLING, _Link.UP):
            return []
        self._link = _Link.DOWN
        self._reason = reason
        self._by_id.clear()
        effects: list[Effect] = [HangUp()]
        for to, asked in list(self._asked.items()):
            if not asked.id:
                continue
            asked.id = 0
            self._unsent[to] = asked
            if asked.num_interruptions == 0:  # until now its time to connect was running
                asked.give_up_s = math.inf
            asked.give_up_s = min(asked.give_up_s, now_s + self._reconnect_timeout_s)
            asked.num_interruptions += 1
            if asked.is_abort_asked and isinstance(asked.what, StreamProgress):
                del self._asked[to], self._unsent[to]
                effects.append(Deliver(to, asked.what.abort()))
            elif asked.num_interruptions > MAX_INTERRUPTIONS:
                effects += self._fail(to, self._unreachable())
        self._dial_s = now_s + self._pause_s * (0.5 + next(self._jitter) / 2)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return effects

    def refused(self, problem: str) -> list[Effect]:
        """The daemon will not have this client, so another attempt is no use."""
        if self._link not in (_Link.DIALLING, _Link.UP):
            return []
        self._link = _Link.DOWN
        self._by_id.clear()
        return [HangUp(), *self._fail_all(DaemonUnreachableError(problem))]

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed; call it when `deadline_s` has come."""
        effects: list[Effect] = []
        if self._link is _Link.DIALLING and now_s >= self._attempt_ends_s:
            effects += self.lost("it does not answer", now_s)
        if self._link is _Link.UP and self._asked:
            if now_s - self._last_heard_s >= MAX_SILENT_BEATS * self._heartbeat_s:
                effects += self.lost("it has fallen silent", now_s)
            elif now_s - self._last_sent_s >= self._heartbeat_s:
                effects.append(self._send(Ping(self._take_id()), now_s))
        for to, asked in list(self._unsent.items()):
            if now_s >= asked.give_up_s:
                effects += self._fail(to, self._unreachable())
        if self._link is _Link.DOWN and self._asked and now_s >= self._dial_s:
            effects += self._dial(now_s)
        if self._link is _Link.UP:
            effects += self._send_unsent(now_s)
        return effects

    @property
    def deadline_s(self) -> float:
        """When `tick` is due; inf while nothing is going on."""
        if not self._asked or self._link is _Link.CLOSED:
            return math.inf
        due_s = min((asked.give_up_s for asked in self._unsent.values()), default=math.inf)
        if self._link is _Link.DOWN:
            return min(due_s, self._dial_s)
        if self._link is _Link.DIALLING:
            return min(due_s, self._attempt_ends_s)
        retry_s = min((asked.retry_s for asked in self._unsent.values()), default=math.inf)
        silent_s = self._last_heard_s + MAX_SILENT_BEATS * self._heartbeat_s
        return min(due_s, retry_s, silent_s, self._last_sent_s + self._heartbeat_s)

    # --- inside -----------------------------------------------------------------------------------

    def _ask(self, to: Hashable, what: StreamProgress | Call, now_s: float) -> list[Effect]:
        assert to not in self._asked
        if self._link is _Link.CLOSED:
            return [Deliver(to, ClientClosedError("the client was closed: make a new one"))]
        is_first = not self._asked
        self._asked[to] = self._unsent[to] = _Asked(what, now_s + self._connect_timeout_s)
        if self._link is _Link.UP:
            if is_first:  # nothing was due while nothing was asked, an answer neither
                self._last_heard_s = now_s
            return self._send_unsent(now_s)
        if self._link is _Link.DOWN and is_first:
            self._dial_s = now_s
        return self.tick(now_s)

    def _dial(self, now_s: float) -> list[Effect]:
        self._link = _Link.DIALLING
        self._attempt_ends_s = now_s + ATTEMPT_TIMEOUT_S
        return [Dial(), Send(self._hello)]

    def _handle(self, message: FromDaemon, now_s: float) -> list[Effect]:
        if isinstance(message, Welcome):
            return self._welcome(message, now_s)
        if isinstance(message, Goodbye):
            return self.lost(message.reason, now_s)
        if isinstance(message, Failed):
            return self._failed(message, now_s)
        if self._link is not _Link.UP:
            return []
        if isinstance(message, Outputs):
            return self._take_outputs(message, now_s)
        if isinstance(message, Accepted):
            return self._take_accepted(message)
        to = self._by_id.pop(message.call_id, None)
        if to is None or isinstance(self._asked[to].what, StreamProgress):
            return []  # a heartbeat's, or of a call that nobody waits for any more
        del self._asked[to]
        return [Deliver(to, message)]

    def _welcome(self, welcome: Welcome, now_s: float) -> list[Effect]:
        if self._link is not _Link.DIALLING:
            return []
        self._link = _Link.UP
        self.num_connections += 1
        self._heartbeat_s = welcome.heartbeat_s
        self._pause_s = FIRST_PAUSE_S
        self._next_seq = 0
        return self._send_unsent(now_s)

    def _take_accepted(self, accepted: Accepted) -> list[Effect]:
        to = self._by_id.get(accepted.stream_id)
        asked = None if to is None else self._asked[to]
        if to is None or asked is None or not isinstance(asked.what, StreamProgress):
            return []
        asked.give_up_s = math.inf
        if asked.what.accepted is not None:
            return []
        asked.what.accepted = accepted
        return [Deliver(to, accepted)]

    def _take_outputs(self, outputs: Outputs, now_s: float) -> list[Effect]:
        if outputs.seq != self._next_seq:
            return self.lost(f"output {outputs.seq} came where {self._next_seq} was due", now_s)
        self._next_seq += 1
        effects: list[Effect] = []
        for stream_id, news in _by_stream(outputs).items():
            to = self._by_id.get(stream_id)
            if to is None:
                continue  # dropped, and the daemon had not heard of it yet
            asked = self._asked[to]
            stream = cast(StreamProgress, asked.what)
            if not isinstance(stream, StreamProgress) or not stream.take(news):
                return [*effects, *self.lost("it sent tokens that nobody waits for", now_s)]
            asked.num_interruptions = 0
            effects.append(Deliver(to, news))
            if stream.is_finished:
                del self._asked[to], self._by_id[stream_id]
        return effects

    def _failed(self, failed: Failed, now_s: float) -> list[Effect]:
        error = error_of(failed)
        if failed.id == 0:
            if isinstance(error, RETRYABLE):
                return self.lost(failed.message, now_s)
            return self.refused(f"the daemon at {self._address} refuses this client: {error}")
        to = self._by_id.pop(failed.id, None)
        if to is None:
            return []
        asked = self._asked[to]
        asked.id = 0
        self._unsent[to] = asked
        stream = asked.what
        has_begun = isinstance(stream, StreamProgress) and (
            stream.accepted is not None or asked.num_interruptions > 0
        )
        if not has_begun or not isinstance(error, RETRYABLE):
            return self._fail(to, error)
        asked.give_up_s = min(asked.give_up_s, now_s + self._reconnect_timeout_s)
        asked.retry_s = now_s + min(max(failed.retry_after, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._reason = failed.message
        return []

    def _send_unsent(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        for to, asked in list(self._unsent.items()):
            if now_s < asked.retry_s:
                continue
            del self._unsent[to]
            asked.id = self._take_id()
            self._by_id[asked.id] = to
            if isinstance(asked.what, StreamProgress):
                effects.append(self._send(asked.what.begin(asked.id), now_s))
            else:
                effects.append(self._send(replace(asked.what, call_id=asked.id), now_s))
        return effects

    def _send(self, message: FromClient, now_s: float) -> Send:
        self._last_sent_s = now_s
        return Send(encode_client(message))

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _unreachable(self) -> DaemonUnreachableError:
        return DaemonUnreachableError(
            f"the daemon at {self._address} cannot be reached: {self._reason}; see "
            f"'furiosa-serve status', or start one with 'furiosa-serve start MODEL'"
        )

    def _fail(self, to: Hashable, error: FuriosaLLMError) -> list[Effect]:
        asked = self._asked.pop(to)
        self._unsent.pop(to, None)
        self._by_id.pop(asked.id, None)
        return [Deliver(to, error)]

    def _fail_all(self, error: FuriosaLLMError) -> list[Effect]:
        failed = list(self._asked)
        self._asked.clear()
        self._unsent.clear()
        self._by_id.clear()
        # An error each: raising one adds to its traceback.
        return [Deliver(to, type(error)(str(error))) for to in failed]


def _by_stream(outputs: Outputs) -> dict[int, list[News]]:
    finishes, logprobs = dict(outputs.finishes), dict(outputs.logprobs)
    news_of: dict[int, list[News]] = {}
    first = 0
    for row, stream_id in enumerate(outputs.stream_ids):
        end = first + outputs.num_tokens[row]
        news = News(
            outputs.choice_indices[row],
            outputs.token_ids[first:end],
            outputs.texts[row],
            finishes.get(row),
            logprobs.get(row),
        )
        news_of.setdefault(stream_id, []).append(news)
        first = end
    return news_of
