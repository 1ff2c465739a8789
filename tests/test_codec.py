"""The codec: what goes in comes out, what is wrong is refused by name, no bytes do harm."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from worker_process import make_configure

from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.wire import codec
from furiosa_llm.wire.codec import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_MESSAGE_BYTES,
    MAX_ROWS,
    MAX_TEXT_BYTES,
    clip_text,
    decode_configure,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import (
    MAX_FRONT_ENDS,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Added,
    Attach,
    Configure,
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
    WorkerLoad,
)
from furiosa_llm.wire.pipe import pack_configure, read_configure

DECODERS = [decode_configure, decode_to_worker, decode_from_worker]

# --- every message there can be -------------------------------------------------------------------

int32s = st.integers(0, 2**31 - 1)
int64s = st.integers(0, 2**63 - 1)
counts = st.integers(1, 2**31 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
finite = st.floats(allow_nan=False, allow_infinity=False)


def tuples(values: st.SearchStrategy[Any], max_size: int = 8) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=max_size).map(tuple)


sender = {"worker_id": int32s, "epoch": int64s, "seq": int64s}
bias_ids = st.lists(int32s, max_size=4, unique=True).map(sorted).map(tuple)
params = bias_ids.flatmap(
    lambda ids: st.builds(
        SequenceParams,
        bias_token_ids=st.just(ids),
        bias_values=st.tuples(*[st.floats(-100, 100)] * len(ids)),
        max_tokens=counts,
        min_tokens=int32s,
        stop_token_ids=tuples(int32s),
        temperature=st.floats(0, 1e300),
        top_k=int32s,
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0, 1e300, exclude_min=True),
        seed=st.integers(0, 2**64 - 1),
        choice_index=int32s,
        num_logprobs=st.integers(-1, MAX_LOGPROBS),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
    )
)
configures = st.builds(
    Configure,
    worker_id=int32s,
    epoch=int64s,
    endpoint=texts,
    artifact_path=texts,
    backend=st.sampled_from(["native", "numpy", "mock"]),
    cpus=tuples(tuples(int32s)),
    kv_cache_dtype=st.sampled_from(["fp32", "bf16"]),
    num_blocks=counts,
    block_size=counts,
    max_model_len=st.integers(2, 2**31 - 1),
    max_num_seqs=st.integers(1, MAX_ROWS),
    max_num_batched_tokens=counts,
    max_processing_samples=counts,
    npu_queue_limit=counts,
    spare_blocks_ratio=st.floats(0, 1, exclude_max=True),
    is_offline=st.booleans(),
    packing_type=st.sampled_from(["IDENTITY", "GREEDY"]),
    vocab_size=counts,
    mock_tokens_per_s=st.floats(0, 1e9),
)


@st.composite
def adds(draw: st.DrawFn) -> Add:
    token_ids = draw(st.lists(int32s, min_size=1, max_size=20))
    num_prompt_tokens = draw(st.integers(1, len(token_ids)))
    return Add(draw(int64s), tuple(token_ids), num_prompt_tokens, draw(params))


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprobs:
    tops = draw(st.lists(st.tuples(int32s, finite), max_size=4))
    return TokenLogprobs(
        draw(finite), draw(counts), tuple(t for t, _ in tops), tuple(p for _, p in tops)
    )


loads = st.builds(
    WorkerLoad,
    num_running=int32s,
    num_waiting=int32s,
    num_free_blocks=int32s,
    num_preemptions=int64s,
    num_steps=int64s,
    num_computed_tokens=int64s,
    num_output_tokens=int64s,
)


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    rows = draw(st.lists(st.tuples(int64s, int32s, st.integers(0, 2)), max_size=8))
    logprobs = {}
    if rows:
        logprobs = draw(
            st.dictionaries(st.integers(0, len(rows) - 1), token_logprobs(), max_size=3)
        )
    return Tokens(
        draw(int32s),
        draw(int64s),
        draw(int64s),
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        tuple(logprobs.items()),
        draw(loads),
        draw(st.floats(0, 1e6)),
        tuple(draw(st.lists(st.tuples(int64s, st.floats(0, 1e6)), max_size=4))),
    )


to_worker = st.one_of(
    adds(),
    st.builds(Abort, tuples(int64s)),
    st.builds(Ping, int64s),
    st.just(Shutdown()),
    st.builds(Attach, front_end=st.integers(1, MAX_FRONT_ENDS - 1), endpoint=texts),
)
from_worker = st.one_of(
    st.builds(Ready, **sender, pid=counts, isa=texts, num_blocks=int32s),
    st.builds(StartFailed, **sender, error_code=texts, message=texts),
    st.builds(Added, **sender, sequence_ids=tuples(int64s)),
    st.builds(Refused, **sender, sequence_id=int64s, error_code=texts, message=texts),
    tokens(),
    st.builds(Idle, **sender, load=loads),
    st.builds(Leaving, **sender),
    st.builds(Pong, **sender, nonce=int64s),
)
messages = st.one_of(configures, to_worker, from_worker)

# --- the way there and back -----------------------------------------------------------------------


@given(messages)
def test_a_message_survives_the_way_through_its_own_decoder_only(message: Message) -> None:
    data = encode(message)
    accepted = []
    for decode in DECODERS:
        try:
            accepted.append((decode, decode(data)))
        except WireError as error:
            assert "is not expected here" in str(error)  # noqa: PT017 - only one may accept
    ((decode, decoded),) = accepted
    assert decoded == message
    assert type(decoded) is type(message)
    assert encode(decoded) == data


def test_the_strategies_above_make_every_message() -> None:
    assert set(codec._FIELDS) == {
        Configure, Add, Abort, Ping, Shutdown, Attach,
        Ready, StartFailed, Added, Refused, Tokens, Idle, Leaving, Pong,
    }  # fmt: skip


def test_ids_travel_as_little_endian_bytes() -> None:
    add = Add(5, (1, 258), 2, SequenceParams(max_tokens=4))
    version, code, _, token_ids, *_ = msgpack.unpackb(encode(add))
    assert (version, code) == (PROTOCOL_VERSION, Add.CODE)
    assert token_ids == b"\x01\0\0\0\x02\x01\0\0"
    assert msgpack.unpackb(encode(Abort((1,))))[2] == b"\x01" + bytes(7)


# --- what is refused ------------------------------------------------------------------------------

ADD = Add(5, (1, 2, 3), 2, SequenceParams(max_tokens=4))
LOGPROBS = TokenLogprobs(-0.5, 1, (7,), (-0.5,))
LOAD = WorkerLoad(1, 0, 10, 0, 7, 90, 6)
TOKENS = Tokens(0, 1, 2, (5, 6), (7, 8), (0, 1), ((1, LOGPROBS),), LOAD)
REFUSED = Refused(0, 1, 2, 5, "overloaded", "too many")


@pytest.mark.parametrize(
    ("message", "changes", "reason"),
    [
        (ADD, {"sequence_id": True}, "Add.sequence_id: True is not an integer"),
        (ADD, {"sequence_id": 5.0}, "Add.sequence_id: 5.0 is not an integer"),
        (ADD, {"sequence_id": -1}, "Add.sequence_id: -1 is not in 0.."),
        (ADD, {"sequence_id": 2**63}, "is not in 0.."),
        (ADD, {"sequence_id": 10**6000}, "an integer of 19932 bits is not in"),
        (ADD, {"token_ids": ()}, "Add.token_ids: 0 values are not in 1.."),
        (ADD, {"token_ids": (1, 2, -3)}, "Add.token_ids: -3 is negative"),
        (ADD, {"token_ids": (1, 2, 2**31)}, "Add.token_ids: "),
        (ADD, {"token_ids": (1, 2, "3")}, "Add.token_ids: "),
        (ADD, {"token_ids": [1, 2, 3]}, "Add.token_ids: a list of 3 is not a tuple"),
        (ADD, {"num_prompt_tokens": 0}, "Add.num_prompt_tokens: 0 is not in 1.."),
        (ADD, {"num_prompt_tokens": 4}, "Add: 4 prompt tokens of 3 tokens"),
        (ADD, {"params": None}, "Add.params: None is not a SequenceParams"),
        (TOKENS, {"token_ids": (7,)}, "Tokens: sequence_ids, token_ids and finish_codes differ"),
        (TOKENS, {"finish_codes": (0, 3)}, "Tokens: finish code 3 is unknown"),
        (TOKENS, {"finish_codes": (0, 256)}, "Tokens.finish_codes: "),
        (TOKENS, {"logprobs": ((2, LOGPROBS),)}, "Tokens: logprobs of a row that is not there"),
        (TOKENS, {"logprobs": (LOGPROBS,)}, "Tokens.logprobs: "),
        (TOKENS, {"sequence_ids": tuple(range(MAX_ROWS + 1))}, "values are not in 0..8192"),
        (TOKENS, {"step_s": -0.5}, "Tokens.step_s: -0.5 is not a finite number in [0"),
        (TOKENS, {"begun": ((5, -1.0),)}, "Tokens.begun: -1.0 is not a finite number"),
        (TOKENS, {"load": None}, "Tokens.load: None is not a WorkerLoad"),
        (
            TOKENS,
            {"load": dataclasses.replace(LOAD, num_steps=-1)},
            "Tokens.load: WorkerLoad.num_steps: -1 is not in 0..",
        ),
        (REFUSED, {"message": b"bytes"}, "Refused.message: a bytes of length 5 is not text"),
        (REFUSED, {"message": "\ud800"}, "Refused.message: the text has a lone surrogate"),
        (REFUSED, {"message": "é" * (MAX_TEXT_BYTES // 2 + 1)}, "bytes of text are over"),
    ],
)
def test_a_wrong_field_is_refused_where_it_is_made(
    message: Message, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(WireError) as caught:
        encode(dataclasses.replace(message, **changes))
    assert reason in str(caught.value)


PARAMS = SequenceParams(max_tokens=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0}, {"min_tokens": -1}, {"temperature": math.nan},
        {"temperature": math.inf}, {"temperature": -0.1}, {"temperature": 10**400},
        {"temperature": True}, {"temperature": "1"}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0},
        {"seed": -1}, {"seed": 2**64}, {"choice_index": -1}, {"num_logprobs": -2},
        {"num_logprobs": MAX_LOGPROBS + 1}, {"stop_token_ids": (-1,)},
        {"presence_penalty": 2.1}, {"presence_penalty": math.nan}, {"frequency_penalty": -2.1},
        {"bias_token_ids": (-1,)}, {"bias_values": (math.inf,)},
        {"bias_token_ids": tuple(range(MAX_BIASES + 1))},
    ],
    ids=str,
)  # fmt: skip
def test_params_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(WireError, match=rf"Add.params: SequenceParams.{field}: "):
        encode(dataclasses.replace(ADD, params=dataclasses.replace(PARAMS, **changes)))


@pytest.mark.parametrize(
    ("token_ids", "values"),
    [
        pytest.param((1, 2), (0.5,), id="of unequal number"),
        pytest.param((2, 1), (0.5, 0.5), id="not ascending"),
        pytest.param((1, 1), (0.5, 0.5), id="one twice"),
        pytest.param((1,), (100.5,), id="too large"),
        pytest.param((1,), (-100.5,), id="too small"),
    ],
)
def test_biases_that_do_not_fit_are_refused(
    token_ids: tuple[int, ...], values: tuple[float, ...]
) -> None:
    params = dataclasses.replace(PARAMS, bias_token_ids=token_ids, bias_values=values)
    with pytest.raises(WireError, match="SequenceParams: bias"):
        encode(dataclasses.replace(ADD, params=params))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprob": -math.inf}, "TokenLogprobs.logprob"),
        ({"rank": 0}, "TokenLogprobs.rank"),
        ({"top_logprobs": (math.nan,)}, "TokenLogprobs.top_logprobs: a value is not finite"),
        ({"top_logprobs": ()}, "top_token_ids and top_logprobs differ in length"),
    ],
)
def test_wrong_logprobs_are_refused(changes: dict[str, Any], reason: str) -> None:
    logprobs = dataclasses.replace(LOGPROBS, **changes)
    with pytest.raises(WireError, match=reason):
        encode(dataclasses.replace(TOKENS, logprobs=((1, logprobs),)))


def envelope_of(message: Message) -> list[Any]:
    unpacked = msgpack.unpackb(encode(message))
    assert isinstance(unpacked, list)
    return unpacked


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, PROTOCOL_VERSION + 1, "protocol version 2 is not 1"),
        (0, True, "protocol version True is not 1"),
        (1, 0x7F, "message code 127 is not expected here"),
        (1, Ready.CODE, "message code 17 is not expected here"),
        (1, "2", "message code a str of length 1 is not expected here"),
        (2, True, "Add.sequence_id: True is not an integer"),
        (2, None, "Add.sequence_id: None is not an integer"),
        (3, [1, 2, 3], "Add.token_ids: a list of 3 is not binary"),
        (3, b"\1\0\0", "Add.token_ids: 3 bytes are not a multiple of 4"),
        (3, b"\xff\xff\xff\xff", "Add.token_ids: -1 is negative"),
        (3, b"", "Add.token_ids: 0 values are not in 1.."),
        (4, 9, "Add: 9 prompt tokens of 3 tokens"),
        (5, [], "Add.params: a list of 0 is not a list of 15"),
        (5, {}, "Add.params: {} is not a list of 15"),
    ],
)
def test_a_wrong_field_is_refused_where_it_arrives(place: int, value: object, reason: str) -> None:
    envelope = envelope_of(ADD)
    envelope[place] = value
    with pytest.raises(WireError) as caught:
        decode_to_worker(msgpack.packb(envelope))
    assert reason in str(caught.value)


def test_a_missing_and_a_surplus_field_are_refused() -> None:
    envelope = envelope_of(ADD)
    for wrong in (envelope[:-1], [*envelope, 0], envelope[:1], [], {}, 1, "add"):
        with pytest.raises(WireError):
            decode_to_worker(msgpack.packb(wrong))


# --- no bytes do harm -----------------------------------------------------------------------------


def decode_all(data: bytes) -> list[Message]:
    """What the decoders make of `data`; any exception but WireError is the caller's."""
    decoded: list[Message] = []
    for decode in DECODERS:
        try:
            decoded.append(decode(data))
        except WireError as error:
            assert str(error)  # noqa: PT017 - whatever was wrong, it is said
    return decoded


ONE_OF_EACH = [
    encode(message)
    for message in (
        ADD,
        TOKENS,
        REFUSED,
        Abort((1, 2)),
        Ping(1),
        Shutdown(),
        Pong(0, 1, 2, 3),
        Idle(0, 1, 2, LOAD),
        Attach(1, "ipc:///x"),
        Leaving(0, 1, 2),
    )
]


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x91" * 100_000)  # nested deeper than any stack
@example(b"\x81" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")  # four billion entries, none there
@example(b"\xdd\x00\x00\x20\x00" * 1000)  # each within its limit, 8192 entries in 1000 levels
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdb\xff\xff\xff\xff")
@example(b"\xc9\xff\xff\xff\xff\x01")
@example(b"\xc7\x00\x01")  # an extension type of no length
@example(b"\xd6\xff\x00\x00\x00\x00")  # a timestamp
@example(b"\x92\x01\xa1\xff")  # text that is not UTF-8
@example(b"\xc1")  # never used by MessagePack
@example(b"\x93\x01\x04\xcf\xff\xff\xff\xff\xff\xff\xff\xff")  # Ping(2**64 - 1)
def test_random_bytes_are_refused(data: bytes) -> None:
    assert all(encode(message) for message in decode_all(data))


@pytest.mark.parametrize("data", ONE_OF_EACH)
def test_a_message_cut_short_or_followed_by_more_is_refused(data: bytes) -> None:
    assert len(decode_all(data)) == 1
    for length in range(len(data)):
        assert decode_all(data[:length]) == []
    assert decode_all(data + b"\0") == []
    assert decode_all(data + data) == []


@settings(max_examples=400)
@given(
    st.sampled_from(ONE_OF_EACH),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_mutated_message_is_refused_or_is_another_valid_one(
    data: bytes, changes: list[tuple[int, int]]
) -> None:
    mutated = bytearray(data)
    for place, value in changes:
        mutated[place % len(mutated)] = value
    for message in decode_all(bytes(mutated)):
        assert decode_all(encode(message)) == [message]


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


@given(
    st.sampled_from([Add, Abort, Configure, Tokens, Ready, Idle, Pong]),
    st.lists(nested, max_size=12),
)
def test_well_formed_messagepack_of_the_wrong_shape_is_refused(cls: Any, fields: list[Any]) -> None:
    for message in decode_all(msgpack.packb([PROTOCOL_VERSION, cls.CODE, *fields])):
        assert decode_all(encode(message)) == [message]


def test_a_message_over_the_size_limit_is_not_even_looked_at() -> None:
    with pytest.raises(WireError, match=f"bytes are over {MAX_MESSAGE_BYTES}"):
        decode_to_worker(bytes(MAX_MESSAGE_BYTES + 1))


# --- text and the pipe ----------------------------------------------------------------------------


@given(st.text())
@example("\ud800 a path that is not UTF-8")
@example("é" * MAX_TEXT_BYTES)
@example("€" * MAX_TEXT_BYTES)
def test_clipped_text_always_fits_a_field(text: str) -> None:
    clipped = clip_text(text)
    assert decode_from_worker(encode(dataclasses.replace(REFUSED, message=clipped)))
    if len(text) < 100 and text.isascii():
        assert clipped == text


class OneByteAtATime(io.RawIOBase):
    """A pipe at its slowest."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 1))


@settings(max_examples=20)
@given(configures, st.binary(max_size=9))
def test_a_configure_is_read_off_a_pipe_and_not_a_byte_more(
    configure: Configure, behind: bytes
) -> None:
    whole = io.BytesIO(pack_configure(configure) + behind)
    assert read_configure(whole) == configure
    assert whole.read() == behind
    assert read_configure(OneByteAtATime(pack_configure(configure))) == configure  # type: ignore[arg-type]


def test_a_pipe_that_ends_early_or_holds_something_else_is_refused() -> None:
    frame = pack_configure(make_configure("ipc:///x"))
    for length in (0, 3, 4, len(frame) - 1):
        with pytest.raises(EOFError):
            read_configure(io.BytesIO(frame[:length]))
    with pytest.raises(WireError, match="a frame of 4294967295 bytes is over"):
        read_configure(io.BytesIO(b"\xff\xff\xff\xff"))
    shutdown = encode(Shutdown())
    with pytest.raises(WireError, match="message code 5 is not expected here"):
        read_configure(io.BytesIO(len(shutdown).to_bytes(4, "little") + shutdown))
