"""The messages between a client library and the daemon's socket.

Small frozen values; each says who sends it to whom. `CODE` is its type on the wire (client_codec.py
turns a message into bytes and back, and checks every field).

A client says `Hello`, the daemon answers `Welcome`; everything else follows. A request is a
*stream*: the client chooses its id, which is never used again on that connection; the daemon
accepts it (`Accepted`), sends its tokens as rows of `Outputs`, and ends it by the finish of its
last choice or by `Failed`. A *call* is a question with one answer; its id comes from the same
counter.

**Credits**: the daemon sends at most as many rows of a stream as the client has granted, and each
row uses one. What is made meanwhile joins the next row. So a reader that is slow, or asleep, holds
up to its grant in its own memory and makes nobody's queue grow.

**Resuming**: `Accepted` tells what a request came to (its prompt's token ids, its seed, its
`max_tokens`), and `Outputs` carry the tokens. That, sent again in a `Generate` with
`resume_token_ids`, continues the stream anywhere with the tokens it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

CLIENT_PROTOCOL_VERSION = 1

CANNOT_RESUME = "cannot_resume"
"""The code of a `Failed` whose stream was begun with another model, weights or kernel family."""


# --- client -> daemon -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """client -> daemon, first on every connection; answered by `Welcome`."""

    CODE: ClassVar[int] = 0x21
    client_id: str  # random, the same on every connection of one client: a later one replaces it
    software: str  # for the daemon's log


@dataclass(frozen=True, slots=True)
class Generate:
    """client -> daemon: run this prompt, or go on with it."""

    CODE: ClassVar[int] = 0x22
    stream_id: int
    request_id: str
    prompt: str | None  # either this
    prompt_token_ids: tuple[int, ...]  # or these; () with a text
    add_special_tokens: bool  # to a text
    params: dict[str, Any]  # the fields of SamplingParams that are not at their default
    credits: int  # granted from the start
    # Per choice the tokens it has, or None for one that has ended; () for a request that is new.
    resume_token_ids: tuple[tuple[int, ...] | None, ...]
    model_id: str  # of the `Accepted` that is resumed; "" for a request that is new


@dataclass(frozen=True, slots=True)
class Chat:
    """client -> daemon: answer these messages, as the model's chat template puts them."""

    CODE: ClassVar[int] = 0x23
    stream_id: int
    request_id: str
    messages: tuple[dict[str, Any], ...]
    options: dict[str, Any]  # keywords of Tokenizer.apply_chat_template
    params: dict[str, Any]
    credits: int


@dataclass(frozen=True, slots=True)
class Abort:
    """client -> daemon: end these streams as they stand. Unknown ids are no error."""

    CODE: ClassVar[int] = 0x24
    stream_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """client -> daemon: as `Abort`, but nobody reads these any more, so nothing is answered."""

    CODE: ClassVar[int] = 0x25
    stream_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Credit:
    """client -> daemon: this many rows more may be sent of this stream."""

    CODE: ClassVar[int] = 0x26
    stream_id: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Tokenize:
    """client -> daemon; answered by `Tokenized`."""

    CODE: ClassVar[int] = 0x27
    call_id: int
    text: str
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Detokenize:
    """client -> daemon; answered by `Detokenized`."""

    CODE: ClassVar[int] = 0x28
    call_id: int
    token_ids: tuple[int, ...]
    skip_special_tokens: bool


@dataclass(frozen=True, slots=True)
class GetStatus:
    """client -> daemon; answered by `StatusReport`."""

    CODE: ClassVar[int] = 0x29
    call_id: int


@dataclass(frozen=True, slots=True)
class Drain:
    """client -> daemon: take no new requests; answered by `Drained`, when those running ended."""

    CODE: ClassVar[int] = 0x2A
    call_id: int
    timeout_s: float  # after which it is answered in any case


@dataclass(frozen=True, slots=True)
class Ping:
    """client -> daemon: it lives; answered by `Pong`."""

    CODE: ClassVar[int] = 0x2B
    call_id: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Both ways: this end leaves. A daemon drops what the client had running."""

    CODE: ClassVar[int] = 0x2C
    reason: str


# --- daemon -> client -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """daemon -> client: it may send; the answer to `Hello`."""

    CODE: ClassVar[int] = 0x31
    server_id: str  # random, new at each start of the daemon
    software: str
    heartbeat_s: float  # while anything runs, each end sends something at least this often


@dataclass(frozen=True, slots=True)
class Accepted:
    """daemon -> client: the stream has begun. What to send again to go on with it elsewhere."""

    CODE: ClassVar[int] = 0x32
    stream_id: int
    model_id: str  # two daemons of the same id give the same tokens
    prompt: str | None  # as text, where it was one
    prompt_token_ids: tuple[int, ...]
    seed: int  # the one given, or the one that was drawn
    max_tokens: int  # the one given, or the room in the context


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """The log-probabilities of consecutive tokens, flat: a list per token would cost far more."""

    counts: tuple[int, ...]  # per token: entries, the sampled token's first
    token_ids: tuple[int, ...]  # per entry, as are the following
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]  # 0: unknown
    text_chars: tuple[int, ...]  # characters of the entry's text in `texts`, plus 1; 0: no text
    texts: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice."""

    reason: str  # "stop", "length", "abort", ...
    stop_reason: str | None  # the stop string
    num_cached_tokens: int  # of the prompt


@dataclass(frozen=True, slots=True)
class Outputs:
    """daemon -> client: what is new, of any number of streams, in one message.

    A row is the news of one choice. The first five tuples run in parallel, but for `token_ids`,
    which holds the rows' tokens one after the other.
    """

    CODE: ClassVar[int] = 0x33
    seq: int  # 0, 1, 2, ... on each connection: a gap means that tokens were lost on the way
    stream_ids: tuple[int, ...]
    choice_indices: tuple[int, ...]
    num_tokens: tuple[int, ...]
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    finishes: tuple[tuple[int, Finish], ...]  # (row, its end)
    logprobs: tuple[tuple[int, LogprobColumns], ...]  # (row, those of its tokens)


@dataclass(frozen=True, slots=True)
class Failed:
    """daemon -> client: this stream or call has ended by an error. Id 0: the whole connection."""

    CODE: ClassVar[int] = 0x34
    id: int
    error_code: str  # see furiosa_llm.errors.to_wire
    message: str
    param: str | None
    retry_after: float  # seconds; 0 where the error has no such field


@dataclass(frozen=True, slots=True)
class Tokenized:
    """daemon -> client: the answer to `Tokenize`."""

    CODE: ClassVar[int] = 0x35
    call_id: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Detokenized:
    """daemon -> client: the answer to `Detokenize`."""

    CODE: ClassVar[int] = 0x36
    call_id: int
    text: str


@dataclass(frozen=True, slots=True)
class StatusReport:
    """daemon -> client: the answer to `GetStatus`."""

    CODE: ClassVar[int] = 0x37
    call_id: int
    status: dict[str, Any]  # plain values; its names are those of the HTTP status


@dataclass(frozen=True, slots=True)
class Drained:
    """daemon -> client: the answer to `Drain`."""

    CODE: ClassVar[int] = 0x38
    call_id: int
    num_in_flight: int  # 0 unless the time ran out


@dataclass(frozen=True, slots=True)
class Pong:
    """daemon -> client: it lives. Call id 0 answers nothing: it finds out whether a client does."""

    CODE: ClassVar[int] = 0x39
    call_id: int


FromClient = (
    Hello
    | Generate
    | Chat
    | Abort
    | Drop
    | Credit
    | Tokenize
    | Detokenize
    | GetStatus
    | Drain
    | Ping
    | Goodbye
)
FromDaemon = (
    Welcome
    | Accepted
    | Outputs
    | Failed
    | Tokenized
    | Detokenized
    | StatusReport
    | Drained
    | Pong
    | Goodbye
)
ClientMessage = FromClient | FromDaemon
