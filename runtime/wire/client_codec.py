"""The messages of the client socket to bytes and back: `codec.py`'s way, with their own table.

A message is one MessagePack array, `[protocol version, message code, field, ...]`. Whatever bytes
come in, decoding gives a valid message or raises `WireError`; a version of the other end that is
not ours raises `VersionError`, so that it can be told.
"""

from __future__ import annotations

from typing import Any, cast, get_args

import msgpack

from furiosa_llm.wire.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    Abort,
    Accepted,
    Chat,
    ClientMessage,
    Credit,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    Drop,
    Failed,
    Finish,
    FromClient,
    FromDaemon,
    Generate,
    GetStatus,
    Goodbye,
    Hello,
    LogprobColumns,
    Outputs,
    Ping,
    Pong,
    StatusReport,
    Tokenize,
    Tokenized,
    Welcome,
)
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.kinds import (
    Kind,
    boolean,
    floats,
    integer,
    integers,
    number,
    optional,
    pair,
    plain_map,
    record,
    shown,
    text,
    tuple_of,
)

MAX_CLIENT_MESSAGE_BYTES = 32 << 20
MAX_PROMPT_BYTES = 16 << 20
MAX_TOKEN_IDS = 4 << 20
"""Of one sequence; far over any model's context."""
MAX_ENTRIES = 8192
"""Of any list: rows of one `Outputs`, messages of one chat, ..."""
MAX_CHOICES = 1024
MAX_CREDITS = 65536
MAX_LOGPROB_ENTRIES = 1 << 20
MAX_SECONDS = 1e6

_INT32 = integer(0, 2**31 - 1)
_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1
_ID = integer(1, _INT64_MAX)
_IDS = integers("q", MAX_ENTRIES)
_TEXT = text()
_NAME = text(max_bytes=2048)  # 512 characters of any kind
_LONG_TEXT = text(max_bytes=MAX_PROMPT_BYTES)
_TOKEN_IDS = integers("i", MAX_TOKEN_IDS)
_CREDITS = integer(0, MAX_CREDITS)
_SECONDS = number(0, MAX_SECONDS)
# Large enough for logit_bias with an entry for each of a model's likelier tokens.
_PARAMS = plain_map(max_values=4096, max_depth=8, max_text_bytes=64 << 10)
_CHAT_MESSAGE = plain_map(max_values=4096, max_depth=16, max_text_bytes=MAX_PROMPT_BYTES)


class VersionError(WireError):
    """The other end speaks another version of the protocol.

    Attributes:
        version: that version.
    """

    def __init__(self, version: int) -> None:
        super().__init__(f"client protocol version {version} is not {CLIENT_PROTOCOL_VERSION}")
        self.version = version


def _generate_fits(generate: Generate) -> str:
    if (generate.prompt is None) == (not generate.prompt_token_ids):
        return "Generate: either prompt or prompt_token_ids must be given"
    return ""


def _columns_fit(columns: LogprobColumns) -> str:
    num_entries = sum(columns.counts)
    per_entry = (columns.token_ids, columns.logprobs, columns.ranks, columns.text_chars)
    if any(len(column) != num_entries for column in per_entry):
        return "LogprobColumns: the columns differ in length"
    if sum(chars - 1 for chars in columns.text_chars if chars) != len(columns.texts):
        return "LogprobColumns: text_chars and texts do not fit"
    return ""


def _rows_fit(outputs: Outputs) -> str:
    num_rows = len(outputs.stream_ids)
    if not num_rows == len(outputs.choice_indices) == len(outputs.num_tokens) == len(outputs.texts):
        return "Outputs: the columns differ in length"
    if sum(outputs.num_tokens) != len(outputs.token_ids):
        return "Outputs: num_tokens and token_ids do not fit"
    if any(row >= num_rows for row, _ in outputs.finishes):
        return "Outputs: the finish of a row that is not there"
    for row, columns in outputs.logprobs:
        if row >= num_rows or len(columns.counts) != outputs.num_tokens[row]:
            return "Outputs: logprobs that do not fit their row"
    return ""


_COLUMNS = record(
    LogprobColumns,
    {
        "counts": integers("i", MAX_LOGPROB_ENTRIES),
        "token_ids": integers("i", MAX_LOGPROB_ENTRIES),
        "logprobs": floats(MAX_LOGPROB_ENTRIES),
        "ranks": integers("i", MAX_LOGPROB_ENTRIES),
        "text_chars": integers("i", MAX_LOGPROB_ENTRIES),
        "texts": _LONG_TEXT,
    },
    _columns_fit,
)
_FINISH = record(
    Finish, {"reason": _NAME, "stop_reason": optional(_TEXT), "num_cached_tokens": _INT32}
)
_STREAM = {"stream_id": _ID, "request_id": _NAME}

_FIELDS: dict[type, Kind] = {
    Hello: record(Hello, {"client_id": _NAME, "software": _NAME}),
    Generate: record(
        Generate,
        {
            **_STREAM,
            "prompt": optional(_LONG_TEXT),
            "prompt_token_ids": _TOKEN_IDS,
            "add_special_tokens": boolean(),
            "params": _PARAMS,
            "credits": _CREDITS,
            "resume_token_ids": tuple_of(optional(_TOKEN_IDS), MAX_CHOICES),
            "model_id": _NAME,
        },
        _generate_fits,
    ),
    Chat: record(
        Chat,
        {
            **_STREAM,
            "messages": tuple_of(_CHAT_MESSAGE, MAX_ENTRIES),
            "options": _PARAMS,
            "params": _PARAMS,
            "credits": _CREDITS,
        },
    ),
    Abort: record(Abort, {"stream_ids": _IDS}),
    Drop: record(Drop, {"stream_ids": _IDS}),
    Credit: record(Credit, {"stream_id": _ID, "num_rows": _CREDITS}),
    Tokenize: record(
        Tokenize, {"call_id": _ID, "text": _LONG_TEXT, "add_special_tokens": boolean()}
    ),
    Detokenize: record(
        Detokenize, {"call_id": _ID, "token_ids": _TOKEN_IDS, "skip_special_tokens": boolean()}
    ),
    GetStatus: record(GetStatus, {"call_id": _ID}),
    Drain: record(Drain, {"call_id": _ID, "timeout_s": _SECONDS}),
    Ping: record(Ping, {"call_id": _ID}),
    Goodbye: record(Goodbye, {"reason": _TEXT}),
    Welcome: record(
        Welcome,
        {
            "server_id": _NAME,
            "software": _NAME,
            "heartbeat_s": number(0, MAX_SECONDS, bounds="(]"),
        },
    ),
    Accepted: record(
        Accepted,
        {
            "stream_id": _ID,
            "model_id": _NAME,
            "prompt": optional(_LONG_TEXT),
            "prompt_token_ids": _TOKEN_IDS,
            "seed": integer(0, _UINT64_MAX),
            "max_tokens": _INT32,
        },
    ),
    Outputs: record(
        Outputs,
        {
            "seq": integer(0, _INT64_MAX),
            "stream_ids": _IDS,
            "choice_indices": integers("i", MAX_ENTRIES),
            "num_tokens": integers("i", MAX_ENTRIES),
            "token_ids": _TOKEN_IDS,
            "texts": tuple_of(_LONG_TEXT, MAX_ENTRIES),
            "finishes": tuple_of(pair(_INT32, _FINISH), MAX_ENTRIES),
            "logprobs": tuple_of(pair(_INT32, _COLUMNS), MAX_ENTRIES),
        },
        _rows_fit,
    ),
    Failed: record(
        Failed,
        {
            "id": integer(0, _INT64_MAX),
            "error_code": _NAME,
            "message": _TEXT,
            "param": optional(_NAME),
            "retry_after": _SECONDS,
        },
    ),
    Tokenized: record(Tokenized, {"call_id": _ID, "token_ids": _TOKEN_IDS}),
    Detokenized: record(Detokenized, {"call_id": _ID, "text": _LONG_TEXT}),
    StatusReport: record(
        StatusReport,
        {
            "call_id": _ID,
            "status": plain_map(max_values=65536, max_depth=8, max_text_bytes=16 << 10),
        },
    ),
    Drained: record(Drained, {"call_id": _ID, "num_in_flight": _INT32}),
    Pong: record(Pong, {"call_id": integer(0, _INT64_MAX)}),
}

_CODE_OF: dict[type, int] = {cls: cast(Any, cls).CODE for cls in _FIELDS}


def _by_code(union: object) -> dict[int, Kind]:
    classes = get_args(union)
    kinds = {_CODE_OF[cls]: _FIELDS[cls] for cls in classes}
    assert len(kinds) == len(classes), "two messages share a code"
    return kinds


_FROM_CLIENT, _FROM_DAEMON = _by_code(FromClient), _by_code(FromDaemon)


def encode_client(message: ClientMessage) -> bytes:
    """The bytes that stand for `message`.

    Raises: WireError if a field is not what the protocol allows, or the whole is too long.
    """
    cls = type(message)
    fields = cast("list[object]", _FIELDS[cls].pack(message))
    packed = cast(bytes, msgpack.packb([CLIENT_PROTOCOL_VERSION, _CODE_OF[cls], *fields]))
    if len(packed) > MAX_CLIENT_MESSAGE_BYTES:
        raise WireError(
            f"{cls.__name__} takes {len(packed)} bytes, over {MAX_CLIENT_MESSAGE_BYTES}"
        )
    return packed


def decode_from_client(packed: bytes) -> FromClient:
    """What a client says. Raises: VersionError; WireError for any other bytes."""
    return cast(FromClient, _decode(packed, _FROM_CLIENT))


def decode_from_daemon(packed: bytes) -> FromDaemon:
    """What the daemon says. Raises: VersionError; WireError for any other bytes."""
    return cast(FromDaemon, _decode(packed, _FROM_DAEMON))


def _decode(packed: bytes, kinds: dict[int, Kind]) -> Any:
    if len(packed) > MAX_CLIENT_MESSAGE_BYTES:
        raise WireError(f"{len(packed)} bytes are over {MAX_CLIENT_MESSAGE_BYTES}")
    try:
        envelope = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_PROMPT_BYTES,
            max_bin_len=MAX_CLIENT_MESSAGE_BYTES,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not MessagePack: {error}") from None
    if type(envelope) is not list or len(envelope) < 2:
        raise WireError(f"{shown(envelope)} is not an envelope")
    version, code, *fields = envelope
    if type(version) is not int or version.bit_length() > 31:
        raise WireError(f"{shown(version)} is not a protocol version")
    if version != CLIENT_PROTOCOL_VERSION:
        raise VersionError(version)
    kind = kinds.get(code) if type(code) is int else None
    if kind is None:
        raise WireError(f"message code {shown(code)} is not expected here")
    return kind.unpack(fields)
