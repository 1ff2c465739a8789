"""Messages to bytes and back, every field checked on both ways.

A message is one MessagePack array, `[protocol version, message code, field, field, ...]`, its
fields in the order of its dataclass. Integer tuples that can be long (token ids, sequence ids)
travel as one binary field of little-endian integers, which costs a fraction of an array of them.

`_FIELDS` is the whole protocol as one table: a field's `Kind` turns its value into what MessagePack
carries and back, and knows its type and bounds. Encoding checks as strictly as decoding does, so
that a wrong value is an error where it was made; at the receiver it would only be a dropped
message that somebody waits for.

Whatever bytes come in, decoding gives a valid message or raises `WireError`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast, get_args

import msgpack

from furiosa_llm.scheduler.params import MAX_BIAS, MAX_BIASES, MAX_PENALTY, SequenceParams
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.kinds import (
    MAX_TEXT_BYTES,
    Kind,
    boolean,
    floats,
    integer,
    integers,
    number,
    pair,
    record,
    shown,
    text,
    tuple_of,
)
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    MAX_FRONT_ENDS,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Added,
    Attach,
    Configure,
    FromWorker,
    Idle,
    Leaving,
    Message,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    StartFailed,
    TokenLogprobs,
    Tokens,
    ToWorker,
    WorkerLoad,
)

MAX_MESSAGE_BYTES = 64 << 20
MAX_TOKEN_IDS = 4 << 20
"""Of one sequence; far over any model's context."""
MAX_ROWS = 8192
"""Sequences in one step, and entries of any other list."""
MAX_LOGPROBS = 1024
"""The likeliest tokens reported at one position."""
MAX_STOP_TOKENS = 4096

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1


# --- the protocol ---------------------------------------------------------------------------------

_COUNT = integer(0, _INT64_MAX)
_AT_LEAST_ONE = integer(1, _INT32_MAX)
_INT32 = integer(0, _INT32_MAX)
_SEQUENCE_ID = integer(0, _INT64_MAX)
_SEQUENCE_IDS = integers("q", MAX_ROWS)
_TEXT = text()

_SENDER = {"worker_id": _INT32, "epoch": _COUNT, "seq": _COUNT}
"""The fields that every message of a worker begins with."""


def _biases_fit(params: SequenceParams) -> str:
    token_ids, values = params.bias_token_ids, params.bias_values
    if len(token_ids) != len(values):
        return "SequenceParams: bias_token_ids and bias_values differ in length"
    if any(left >= right for left, right in pairwise(token_ids)):
        return "SequenceParams: bias_token_ids do not ascend"
    if any(abs(value) > MAX_BIAS for value in values):
        return f"SequenceParams: bias_values go beyond {MAX_BIAS:g}"
    return ""


_PARAMS = record(
    SequenceParams,
    {
        "max_tokens": _AT_LEAST_ONE,
        "min_tokens": _INT32,
        "stop_token_ids": integers("i", MAX_STOP_TOKENS),
        "temperature": number(0),
        "top_k": _INT32,
        "top_p": number(0, 1, bounds="(]"),
        "min_p": number(0, 1),
        "repetition_penalty": number(0, bounds="(]"),
        "presence_penalty": number(-MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": number(-MAX_PENALTY, MAX_PENALTY),
        "bias_token_ids": integers("i", MAX_BIASES),
        "bias_values": floats(MAX_BIASES),
        "seed": integer(0, _UINT64_MAX),
        "choice_index": _INT32,
        "num_logprobs": integer(-1, MAX_LOGPROBS),
    },
    _biases_fit,
)


def _tops_fit(logprobs: TokenLogprobs) -> str:
    if len(logprobs.top_token_ids) == len(logprobs.top_logprobs):
        return ""
    return "TokenLogprobs: top_token_ids and top_logprobs differ in length"


def _prompt_fits(add: Add) -> str:
    if add.num_prompt_tokens <= len(add.token_ids):
        return ""
    return f"Add: {add.num_prompt_tokens} prompt tokens of {len(add.token_ids)} tokens"


def _rows_fit(tokens: Tokens) -> str:
    num_rows = len(tokens.sequence_ids)
    if not num_rows == len(tokens.token_ids) == len(tokens.finish_codes):
        return "Tokens: sequence_ids, token_ids and finish_codes differ in length"
    if tokens.finish_codes and max(tokens.finish_codes) >= len(FINISH_REASONS):
        return f"Tokens: finish code {max(tokens.finish_codes)} is unknown"
    if any(index >= num_rows for index, _ in tokens.logprobs):
        return "Tokens: logprobs of a row that is not there"
    return ""


_LOGPROBS = record(
    TokenLogprobs,
    {
        "logprob": number(-math.inf),
        "rank": _AT_LEAST_ONE,
        "top_token_ids": integers("i", MAX_LOGPROBS),
        "top_logprobs": floats(MAX_LOGPROBS),
    },
    _tops_fit,
)

_LOAD = record(
    WorkerLoad,
    {
        "num_running": _INT32,
        "num_waiting": _INT32,
        "num_free_blocks": _INT32,
        "num_preemptions": _COUNT,
        "num_steps": _COUNT,
        "num_computed_tokens": _COUNT,
        "num_output_tokens": _COUNT,
    },
)

_FIELDS: dict[type, Kind] = {
    Configure: record(
        Configure,
        {
            "worker_id": _INT32,
            "epoch": _COUNT,
            "endpoint": _TEXT,
            "artifact_path": _TEXT,
            "backend": text("native", "numpy", "mock"),
            "cpus": tuple_of(integers("i", MAX_ROWS), MAX_ROWS),
            "kv_cache_dtype": text("fp32", "bf16", "int8"),
            "num_blocks": _AT_LEAST_ONE,
            "block_size": _AT_LEAST_ONE,
            "max_model_len": integer(2, _INT32_MAX),
            "max_num_seqs": integer(1, MAX_ROWS),
            "max_num_batched_tokens": _AT_LEAST_ONE,
            "max_processing_samples": _AT_LEAST_ONE,
            "npu_queue_limit": _AT_LEAST_ONE,
            "spare_blocks_ratio": number(0, 1, bounds="[)"),
            "is_offline": boolean(),
            "packing_type": text("IDENTITY", "GREEDY"),
            "vocab_size": _AT_LEAST_ONE,
            "mock_tokens_per_s": number(0),
        },
    ),
    Add: record(
        Add,
        {
            "sequence_id": _SEQUENCE_ID,
            "token_ids": integers("i", MAX_TOKEN_IDS, min_len=1),
            "num_prompt_tokens": _AT_LEAST_ONE,
            "params": _PARAMS,
        },
        _prompt_fits,
    ),
    Abort: record(Abort, {"sequence_ids": _SEQUENCE_IDS}),
    Ping: record(Ping, {"nonce": _COUNT}),
    Shutdown: record(Shutdown, {}),
    Attach: record(Attach, {"front_end": integer(1, MAX_FRONT_ENDS - 1), "endpoint": _TEXT}),
    Ready: record(Ready, {**_SENDER, "pid": _AT_LEAST_ONE, "isa": _TEXT, "num_blocks": _INT32}),
    StartFailed: record(StartFailed, {**_SENDER, "error_code": _TEXT, "message": _TEXT}),
    Added: record(Added, {**_SENDER, "sequence_ids": _SEQUENCE_IDS}),
    Refused: record(
        Refused,
        {**_SENDER, "sequence_id": _SEQUENCE_ID, "error_code": _TEXT, "message": _TEXT},
    ),
    Tokens: record(
        Tokens,
        {
            **_SENDER,
            "sequence_ids": _SEQUENCE_IDS,
            "token_ids": integers("i", MAX_ROWS),
            "finish_codes": integers("B", MAX_ROWS),
            "logprobs": tuple_of(pair(_INT32, _LOGPROBS), MAX_ROWS),
            "load": _LOAD,
            "step_s": number(0),
            "begun": tuple_of(pair(_SEQUENCE_ID, number(0)), MAX_ROWS),
        },
        _rows_fit,
    ),
    Idle: record(Idle, {**_SENDER, "load": _LOAD}),
    Leaving: record(Leaving, _SENDER),
    Pong: record(Pong, {**_SENDER, "nonce": _COUNT}),
}

_TO_WORKER: tuple[type, ...] = get_args(ToWorker)
_FROM_WORKER: tuple[type, ...] = get_args(FromWorker)
_CODE_OF: dict[type, int] = {cls: cast(Any, cls).CODE for cls in _FIELDS}
assert len(set(_CODE_OF.values())) == len(_CODE_OF), "two messages share a code"


# --- the envelope ---------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The bytes that stand for `message`.

    Raises: WireError if a field is not what the protocol allows, or the whole is too long.
    """
    cls = type(message)
    data = msgpack.packb(
        [PROTOCOL_VERSION, _CODE_OF[cls], *cast("list[object]", _FIELDS[cls].pack(message))]
    )
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"{cls.__name__} takes {len(data)} bytes, over {MAX_MESSAGE_BYTES}")
    return cast(bytes, data)


def decode_configure(data: bytes) -> Configure:
    """The `Configure` that `data` stands for. Raises: WireError for any other bytes."""
    return cast(Configure, _decode(data, (Configure,)))


def decode_to_worker(data: bytes) -> ToWorker:
    """What the front-end says to a running worker. Raises: WireError for any other bytes."""
    return cast(ToWorker, _decode(data, _TO_WORKER))


def decode_from_worker(data: bytes) -> FromWorker:
    """What a worker says to the front-end. Raises: WireError for any other bytes."""
    return cast(FromWorker, _decode(data, _FROM_WORKER))


def _decode(data: bytes, allowed: tuple[type, ...]) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"{len(data)} bytes are over {MAX_MESSAGE_BYTES}")
    try:
        envelope = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=MAX_ROWS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not MessagePack: {error}") from None
    if type(envelope) is not list or len(envelope) < 2:
        raise WireError(f"{shown(envelope)} is not an envelope")
    version, code, *fields = envelope
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise WireError(f"protocol version {shown(version)} is not {PROTOCOL_VERSION}")
    for cls in allowed:
        if type(code) is int and code == _CODE_OF[cls]:
            return _FIELDS[cls].unpack(fields)
    raise WireError(f"message code {shown(code)} is not expected here")


def clip_text(text: str) -> str:
    """`text` as a text field can carry it: surrogates escaped, the middle left out if too long."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) > MAX_TEXT_BYTES:
        half = MAX_TEXT_BYTES // 2 - 8
        encoded = encoded[:half] + b" [...] " + encoded[-half:]
    return encoded.decode("utf-8", "ignore")
