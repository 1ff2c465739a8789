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

import dataclasses
import math
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import msgpack

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Added,
    Configure,
    FromWorker,
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
)

MAX_MESSAGE_BYTES = 64 << 20
MAX_TEXT_BYTES = 16 << 10
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


class Kind(NamedTuple):
    """What one field may hold. Both ways raise WireError, with a reason that names no field."""

    pack: Callable[[Any], object]  # field value -> what MessagePack carries
    unpack: Callable[[Any], Any]  # what MessagePack carried -> field value


def _both_ways(check: Callable[[Any], Any]) -> Kind:
    """A kind that travels as itself."""
    return Kind(check, check)


def _shown(value: object) -> str:
    """`value` for an error text: short, whatever a peer sent."""
    if isinstance(value, (str, bytes, bytearray)):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # repr would refuse the longest
    return repr(value)[:40]


# --- kinds of fields ------------------------------------------------------------------------------


def _integer(low: int, high: int) -> Kind:
    def check(value: Any) -> int:
        if type(value) is not int:  # a bool is no integer here
            raise WireError(f"{_shown(value)} is not an integer")
        if not low <= value <= high:
            raise WireError(f"{_shown(value)} is not in {low}..{high}")
        return value

    return _both_ways(check)


def _number(low: float, high: float = math.inf, *, bounds: str = "[]") -> Kind:
    """A finite float between two bounds; "(" or ")" leaves out the bound itself."""

    def check(value: Any) -> float:
        if type(value) is not float and type(value) is not int:
            raise WireError(f"{_shown(value)} is not a number")
        if (
            not low <= value <= high  # false for NaN too
            or abs(value) > sys.float_info.max
            or (bounds[0] == "(" and value == low)
            or (bounds[1] == ")" and value == high)
        ):
            raise WireError(
                f"{_shown(value)} is not a finite number in {bounds[0]}{low:g}, {high:g}{bounds[1]}"
            )
        return float(value)

    return _both_ways(check)


def _boolean() -> Kind:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise WireError(f"{_shown(value)} is not a boolean")
        return value

    return _both_ways(check)


def _text(*allowed: str) -> Kind:
    """Text without surrogates, up to MAX_TEXT_BYTES in UTF-8; one of `allowed` if any is given."""

    def check(value: Any) -> str:
        if type(value) is not str:
            raise WireError(f"{_shown(value)} is not text")
        if allowed and value not in allowed:
            raise WireError(f"{_shown(value)} is none of {', '.join(allowed)}")
        try:
            num_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise WireError("the text has a lone surrogate") from None
        if num_bytes > MAX_TEXT_BYTES:
            raise WireError(f"{num_bytes} bytes of text are over {MAX_TEXT_BYTES}")
        return value

    return _both_ways(check)


def _packed(letter: str, check: Callable[[tuple[Any, ...]], None]) -> Kind:
    """A tuple of numbers as little-endian bytes, each as `letter` of `struct` says."""
    width = struct.calcsize("<" + letter)

    def pack(values: Any) -> bytes:
        if type(values) is not tuple:
            raise WireError(f"{_shown(values)} is not a tuple")
        try:
            packed = struct.pack(f"<{len(values)}{letter}", *values)
        except (struct.error, OverflowError) as error:
            raise WireError(str(error)) from None
        check(values)
        return packed

    def unpack(packed: Any) -> tuple[Any, ...]:
        if type(packed) is not bytes:
            raise WireError(f"{_shown(packed)} is not binary")
        if len(packed) % width:
            raise WireError(f"{len(packed)} bytes are not a multiple of {width}")
        values = struct.unpack(f"<{len(packed) // width}{letter}", packed)
        check(values)
        return values

    return Kind(pack, unpack)


def _integers(letter: str, max_len: int, *, min_len: int = 0) -> Kind:
    """A tuple of integers, none negative; `letter` is struct's: B 1 byte, i 4, q 8."""

    def check(values: tuple[int, ...]) -> None:
        if not min_len <= len(values) <= max_len:
            raise WireError(f"{len(values)} values are not in {min_len}..{max_len}")
        if values and min(values) < 0:
            raise WireError(f"{min(values)} is negative")

    return _packed(letter, check)


def _floats(max_len: int) -> Kind:
    """A tuple of finite floats."""

    def check(values: tuple[float, ...]) -> None:
        if len(values) > max_len:
            raise WireError(f"{len(values)} values are over {max_len}")
        if not all(map(math.isfinite, values)):
            raise WireError("a value is not finite")

    return _packed("d", check)


def _tuple_of(kind: Kind, max_len: int) -> Kind:
    """A tuple whose entries are all of one kind."""

    def pack(values: Any) -> list[object]:
        if type(values) is not tuple or len(values) > max_len:
            raise WireError(f"{_shown(values)} is not a tuple of at most {max_len}")
        return [kind.pack(value) for value in values]

    def unpack(packed: Any) -> tuple[Any, ...]:
        if type(packed) is not list or len(packed) > max_len:
            raise WireError(f"{_shown(packed)} is not a list of at most {max_len}")
        return tuple([kind.unpack(value) for value in packed])

    return Kind(pack, unpack)


def _pair(first: Kind, second: Kind) -> Kind:
    def pack(values: Any) -> list[object]:
        if type(values) is not tuple or len(values) != 2:
            raise WireError(f"{_shown(values)} is not a pair")
        return [first.pack(values[0]), second.pack(values[1])]

    def unpack(packed: Any) -> tuple[Any, Any]:
        if type(packed) is not list or len(packed) != 2:
            raise WireError(f"{_shown(packed)} is not a pair")
        return first.unpack(packed[0]), second.unpack(packed[1])

    return Kind(pack, unpack)


def _record(cls: type, kind_of: dict[str, Kind], fits: Callable[[Any], str] | None = None) -> Kind:
    """A dataclass as the list of its fields.

    Args:
        fits: what is wrong between the fields of a value, each of which is right; "" if nothing is.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    assert names == list(kind_of), f"the kinds of {cls.__name__} do not match its fields"
    packs = [kind.pack for kind in kind_of.values()]
    unpacks = [kind.unpack for kind in kind_of.values()]

    def pack(message: Any) -> list[object]:
        if type(message) is not cls:
            raise WireError(f"{_shown(message)} is not a {cls.__name__}")
        packed = _each(packs, [getattr(message, name) for name in names])
        if fits is not None and (problem := fits(message)):
            raise WireError(problem)
        return packed

    def unpack(packed: Any) -> Any:
        if type(packed) is not list or len(packed) != len(names):
            raise WireError(f"{_shown(packed)} is not a list of {len(names)}")
        message = cls(*_each(unpacks, packed))
        if fits is not None and (problem := fits(message)):
            raise WireError(problem)
        return message

    def _each(convert: list[Callable[[Any], object]], values: Any) -> list[object]:
        converted: list[object] = []
        try:
            for convert_one, value in zip(convert, values, strict=True):
                converted.append(convert_one(value))
        except WireError as error:
            raise WireError(f"{cls.__name__}.{names[len(converted)]}: {error}") from None
        return converted

    return Kind(pack, unpack)


# --- the protocol ---------------------------------------------------------------------------------

_COUNT = _integer(0, _INT64_MAX)
_AT_LEAST_ONE = _integer(1, _INT32_MAX)
_INT32 = _integer(0, _INT32_MAX)
_SEQUENCE_ID = _integer(0, _INT64_MAX)
_SEQUENCE_IDS = _integers("q", MAX_ROWS)
_TEXT = _text()

_SENDER = {"worker_id": _INT32, "epoch": _COUNT, "seq": _COUNT}
"""The fields that every message of a worker begins with."""

_PARAMS = _record(
    SequenceParams,
    {
        "max_tokens": _AT_LEAST_ONE,
        "min_tokens": _INT32,
        "stop_token_ids": _integers("i", MAX_STOP_TOKENS),
        "temperature": _number(0),
        "top_k": _INT32,
        "top_p": _number(0, 1, bounds="(]"),
        "min_p": _number(0, 1),
        "repetition_penalty": _number(0, bounds="(]"),
        "seed": _integer(0, _UINT64_MAX),
        "choice_index": _INT32,
        "num_logprobs": _integer(-1, MAX_LOGPROBS),
    },
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


_LOGPROBS = _record(
    TokenLogprobs,
    {
        "logprob": _number(-math.inf),
        "rank": _AT_LEAST_ONE,
        "top_token_ids": _integers("i", MAX_LOGPROBS),
        "top_logprobs": _floats(MAX_LOGPROBS),
    },
    _tops_fit,
)

_FIELDS: dict[type, Kind] = {
    Configure: _record(
        Configure,
        {
            "worker_id": _INT32,
            "epoch": _COUNT,
            "endpoint": _TEXT,
            "artifact_path": _TEXT,
            "backend": _text("native", "numpy", "mock"),
            "cpus": _tuple_of(_integers("i", MAX_ROWS), MAX_ROWS),
            "kv_cache_dtype": _text("fp32", "bf16"),
            "num_blocks": _AT_LEAST_ONE,
            "block_size": _AT_LEAST_ONE,
            "max_model_len": _integer(2, _INT32_MAX),
            "max_num_seqs": _integer(1, MAX_ROWS),
            "max_num_batched_tokens": _AT_LEAST_ONE,
            "max_processing_samples": _AT_LEAST_ONE,
            "npu_queue_limit": _AT_LEAST_ONE,
            "spare_blocks_ratio": _number(0, 1, bounds="[)"),
            "is_offline": _boolean(),
            "packing_type": _text("IDENTITY", "GREEDY"),
            "vocab_size": _AT_LEAST_ONE,
            "mock_tokens_per_s": _number(0),
        },
    ),
    Add: _record(
        Add,
        {
            "sequence_id": _SEQUENCE_ID,
            "token_ids": _integers("i", MAX_TOKEN_IDS, min_len=1),
            "num_prompt_tokens": _AT_LEAST_ONE,
            "params": _PARAMS,
        },
        _prompt_fits,
    ),
    Abort: _record(Abort, {"sequence_ids": _SEQUENCE_IDS}),
    Ping: _record(Ping, {"nonce": _COUNT}),
    Shutdown: _record(Shutdown, {}),
    Ready: _record(Ready, {**_SENDER, "pid": _AT_LEAST_ONE, "isa": _TEXT, "num_blocks": _INT32}),
    StartFailed: _record(StartFailed, {**_SENDER, "error_code": _TEXT, "message": _TEXT}),
    Added: _record(Added, {**_SENDER, "sequence_ids": _SEQUENCE_IDS}),
    Refused: _record(
        Refused,
        {**_SENDER, "sequence_id": _SEQUENCE_ID, "error_code": _TEXT, "message": _TEXT},
    ),
    Tokens: _record(
        Tokens,
        {
            **_SENDER,
            "sequence_ids": _SEQUENCE_IDS,
            "token_ids": _integers("i", MAX_ROWS),
            "finish_codes": _integers("B", MAX_ROWS),
            "logprobs": _tuple_of(_pair(_INT32, _LOGPROBS), MAX_ROWS),
            "num_running": _INT32,
            "num_waiting": _INT32,
            "num_free_blocks": _INT32,
            "num_preemptions": _COUNT,
        },
        _rows_fit,
    ),
    Pong: _record(Pong, {**_SENDER, "nonce": _COUNT}),
}

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
    return cast(ToWorker, _decode(data, (Add, Abort, Ping, Shutdown)))


def decode_from_worker(data: bytes) -> FromWorker:
    """What a worker says to the front-end. Raises: WireError for any other bytes."""
    return cast(FromWorker, _decode(data, (Ready, StartFailed, Added, Refused, Tokens, Pong)))


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
        raise WireError(f"{_shown(envelope)} is not an envelope")
    version, code, *fields = envelope
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise WireError(f"protocol version {_shown(version)} is not {PROTOCOL_VERSION}")
    for cls in allowed:
        if type(code) is int and code == _CODE_OF[cls]:
            return _FIELDS[cls].unpack(fields)
    raise WireError(f"message code {_shown(code)} is not expected here")


def clip_text(text: str) -> str:
    """`text` as a text field can carry it: surrogates escaped, the middle left out if too long."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) > MAX_TEXT_BYTES:
        half = MAX_TEXT_BYTES // 2 - 8
        encoded = encoded[:half] + b" [...] " + encoded[-half:]
    return encoded.decode("utf-8", "ignore")
