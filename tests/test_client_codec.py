"""The client socket's codec: what goes in comes out, what is wrong is refused, no bytes do harm."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from furiosa_llm import SamplingParams
from furiosa_llm.client.logprobs import columns_of, logprobs_of
from furiosa_llm.client.params import params_from_plain, params_to_plain
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.outputs import Logprob
from furiosa_llm.sampling_params import RequestOutputKind
from furiosa_llm.wire import client_codec
from furiosa_llm.wire.client_codec import (
    MAX_CHOICES,
    MAX_CLIENT_MESSAGE_BYTES,
    MAX_CREDITS,
    VersionError,
    decode_from_client,
    decode_from_daemon,
    encode_client,
)
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

DECODERS = [decode_from_client, decode_from_daemon]

# --- every message there can be -------------------------------------------------------------------

int32s = st.integers(0, 2**31 - 1)
ids = st.integers(1, 2**63 - 1)
credit_counts = st.integers(0, MAX_CREDITS)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
finite = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, 1e6)


def tuples(values: st.SearchStrategy[Any], max_size: int = 6) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=max_size).map(tuple)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
plain_maps = st.dictionaries(texts, plain, max_size=3)


@st.composite
def generates(draw: st.DrawFn) -> Generate:
    prompt = draw(st.none() | texts)
    token_ids = () if prompt is not None else draw(tuples(int32s).filter(len))
    return Generate(
        draw(ids), draw(texts), prompt, token_ids, draw(st.booleans()), draw(plain_maps),
        draw(credit_counts), draw(tuples(st.none() | tuples(int32s))), draw(texts),
    )  # fmt: skip


@st.composite
def columns(draw: st.DrawFn, num_tokens: int) -> LogprobColumns:
    positions = [
        draw(
            st.dictionaries(
                int32s,
                st.builds(Logprob, finite, st.none() | st.integers(1, 99), st.none() | texts),
            )
        )
        for _ in range(num_tokens)
    ]
    return columns_of(positions)


finishes = st.builds(Finish, texts, st.none() | texts, int32s)


@st.composite
def outputs(draw: st.DrawFn) -> Outputs:
    num_rows = draw(st.integers(0, 4))
    num_tokens = [draw(st.integers(0, 3)) for _ in range(num_rows)]
    rows = st.integers(0, num_rows - 1) if num_rows else st.nothing()
    with_logprobs = draw(st.lists(rows, max_size=2, unique=True)) if num_rows else []
    return Outputs(
        seq=draw(st.integers(0, 2**63 - 1)),
        stream_ids=tuple(draw(ids) for _ in range(num_rows)),
        choice_indices=tuple(draw(int32s) for _ in range(num_rows)),
        num_tokens=tuple(num_tokens),
        token_ids=tuple(draw(int32s) for _ in range(sum(num_tokens))),
        texts=tuple(draw(texts) for _ in range(num_rows)),
        finishes=draw(tuples(st.tuples(rows, finishes), 2)) if num_rows else (),
        logprobs=tuple((row, draw(columns(num_tokens[row]))) for row in with_logprobs),
    )


messages = st.one_of(
    st.builds(Hello, texts, texts),
    generates(),
    st.builds(Chat, ids, texts, tuples(plain_maps, 3), plain_maps, plain_maps, credit_counts),
    st.builds(Abort, tuples(ids)),
    st.builds(Drop, tuples(ids)),
    st.builds(Credit, ids, credit_counts),
    st.builds(Tokenize, ids, texts, st.booleans()),
    st.builds(Detokenize, ids, tuples(int32s), st.booleans()),
    st.builds(GetStatus, ids),
    st.builds(Drain, ids, seconds),
    st.builds(Ping, ids),
    st.builds(Goodbye, texts),
    st.builds(Welcome, texts, texts, st.floats(0.001, 1e6)),
    st.builds(
        Accepted, ids, texts, st.none() | texts, tuples(int32s), st.integers(0, 2**64 - 1), int32s
    ),
    outputs(),
    st.builds(Failed, st.integers(0, 2**63 - 1), texts, texts, st.none() | texts, seconds),
    st.builds(Tokenized, ids, tuples(int32s)),
    st.builds(Detokenized, ids, texts),
    st.builds(StatusReport, ids, plain_maps),
    st.builds(Drained, ids, int32s),
    st.builds(Pong, st.integers(0, 2**63 - 1)),
)
BOTH_WAYS = {Goodbye}

# --- the way there and back -----------------------------------------------------------------------


@given(messages)
def test_a_message_survives_the_way_through_its_own_decoder_only(message: ClientMessage) -> None:
    packed = encode_client(message)
    decoded = decode_all(packed)
    assert decoded == [message] * (2 if type(message) in BOTH_WAYS else 1)
    assert all(type(each) is type(message) for each in decoded)


def test_the_strategies_above_make_every_message() -> None:
    assert set(client_codec._FIELDS) == {
        Hello, Generate, Chat, Abort, Drop, Credit, Tokenize, Detokenize, GetStatus, Drain, Ping,
        Goodbye, Welcome, Accepted, Outputs, Failed, Tokenized, Detokenized, StatusReport, Drained,
        Pong,
    }  # fmt: skip


logprob_positions = st.lists(
    st.dictionaries(
        int32s, st.builds(Logprob, finite, st.none() | st.integers(1, 99), st.none() | texts)
    ),
    max_size=4,
)


@settings(max_examples=40)
@given(logprob_positions)
def test_logprobs_survive_as_columns(positions: list[dict[int, Logprob]]) -> None:
    found = logprobs_of(columns_of(positions))
    assert found == positions
    assert [list(each) for each in found] == [list(each) for each in positions]  # in order


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(n=3, temperature=0.0, stop=["a", "b"], stop_token_ids=[5, 6]),
        SamplingParams(max_tokens=None, logprobs=0, seed=2**64 - 1, ignore_eos=True),
        SamplingParams(output_kind=RequestOutputKind.FINAL, top_k=5, min_p=0.5),
    ],
)
def test_params_survive_the_wire(params: SamplingParams) -> None:
    message = Chat(1, "r", (), {}, params_to_plain(params), 1)
    decoded = decode_from_client(encode_client(message))
    assert isinstance(decoded, Chat)
    assert params_from_plain(decoded.params) == params


def test_default_params_cost_nothing() -> None:
    assert params_to_plain(SamplingParams()) == {}


@pytest.mark.parametrize(
    ("plain", "param"),
    [({"nonsense": 1}, "nonsense"), ({"temperature": "hot"}, "temperature"), ({"n": 0}, "n")],
)
def test_wrong_params_are_refused_by_name(plain: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params_from_plain(plain)
    assert caught.value.param == param


# --- what is refused ------------------------------------------------------------------------------

GENERATE = Generate(5, "r", None, (1, 2), True, {}, 4, (), "")
COLUMNS = columns_of([{7: Logprob(-0.5, 1, "x")}])
OUTPUTS = Outputs(0, (5, 6), (0, 0), (1, 0), (7,), ("x", ""), ((1, Finish("stop", None, 0)),),
                  ((0, COLUMNS),))  # fmt: skip
CHAT = Chat(5, "r", ({"role": "user", "content": "hi"},), {}, {}, 4)


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("message", "changes", "reason"),
    [
        (GENERATE, {"stream_id": 0}, "Generate.stream_id: 0 is not in 1.."),
        (GENERATE, {"stream_id": True}, "Generate.stream_id: True is not an integer"),
        (GENERATE, {"prompt": "x"}, "either prompt or prompt_token_ids must be given"),
        (GENERATE, {"prompt_token_ids": ()}, "either prompt or prompt_token_ids must be given"),
        (GENERATE, {"prompt_token_ids": (-1,)}, "Generate.prompt_token_ids: -1 is negative"),
        (GENERATE, {"credits": MAX_CREDITS + 1}, "Generate.credits: 65537 is not in 0..65536"),
        (GENERATE, {"request_id": "x" * 3000}, "Generate.request_id: 3000 bytes of text are over"),
        (GENERATE, {"resume_token_ids": ((),) * (MAX_CHOICES + 1)}, "Generate.resume_token_ids: "),
        (GENERATE, {"params": []}, "Generate.params: a list of 0 is not a map"),
        (GENERATE, {"params": {1: 2}}, "Generate.params: 1 is not text"),
        (GENERATE, {"params": {"a": b""}}, "a bytes of length 0 is not a plain value"),
        (GENERATE, {"params": {"a": math.nan}}, "nan is not finite"),
        (GENERATE, {"params": {"a": 2**64}}, "an integer of 65 bits is not a 64-bit integer"),
        (GENERATE, {"params": nested(9)}, "nested too deeply"),
        (GENERATE, {"params": {"a": [0] * 4096}}, "too many values"),
        (GENERATE, {"params": {"a": "\ud800"}}, "a lone surrogate"),
        (CHAT, {"messages": ("hi",)}, "Chat.messages: a str of length 2 is not a map"),
        (OUTPUTS, {"seq": -1}, "Outputs.seq: -1 is not in 0.."),
        (OUTPUTS, {"texts": ("x",)}, "Outputs: the columns differ in length"),
        (OUTPUTS, {"num_tokens": (1, 1)}, "Outputs: num_tokens and token_ids do not fit"),
        (OUTPUTS, {"finishes": ((2, Finish("stop", None, 0)),)}, "the finish of a row that is not"),
        (OUTPUTS, {"logprobs": ((1, COLUMNS),)}, "logprobs that do not fit their row"),
        (OUTPUTS, {"logprobs": ((2, COLUMNS),)}, "logprobs that do not fit their row"),
    ],
)
def test_a_wrong_field_is_refused_where_it_is_made(
    message: ClientMessage, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(WireError) as caught:
        encode_client(dataclasses.replace(message, **changes))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranks": ()}, "the columns differ in length"),
        ({"counts": (2,)}, "the columns differ in length"),
        ({"texts": "xy"}, "text_chars and texts do not fit"),
        ({"text_chars": (4,)}, "text_chars and texts do not fit"),
        ({"logprobs": (math.inf,)}, "a value is not finite"),
    ],
)
def test_wrong_columns_are_refused(changes: dict[str, Any], reason: str) -> None:
    columns = dataclasses.replace(COLUMNS, **changes)
    with pytest.raises(WireError, match=reason):
        encode_client(dataclasses.replace(OUTPUTS, logprobs=((0, columns),)))


def envelope_of(message: ClientMessage) -> list[Any]:
    unpacked = msgpack.unpackb(encode_client(message))
    assert isinstance(unpacked, list)
    return unpacked


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, True, "True is not a protocol version"),
        (0, 2**40, "1099511627776 is not a protocol version"),
        (1, 0x7F, "message code 127 is not expected here"),
        (1, Welcome.CODE, "message code 49 is not expected here"),
        (1, None, "message code None is not expected here"),
        (2, -1, "Generate.stream_id: -1 is not in 1.."),
        (5, b"\1\0\0", "Generate.prompt_token_ids: 3 bytes are not a multiple of 4"),
        (7, [], "Generate.params: a list of 0 is not a map"),
    ],
)
def test_a_wrong_field_is_refused_where_it_arrives(place: int, value: object, reason: str) -> None:
    envelope = envelope_of(GENERATE)
    envelope[place] = value
    with pytest.raises(WireError) as caught:
        decode_from_client(msgpack.packb(envelope))
    assert reason in str(caught.value)


def test_another_version_is_told_from_other_mistakes() -> None:
    envelope = envelope_of(GENERATE)
    envelope[0] = CLIENT_PROTOCOL_VERSION + 1
    with pytest.raises(VersionError) as caught:
        decode_from_client(msgpack.packb([*envelope, "a field that only it has"]))
    assert caught.value.version == CLIENT_PROTOCOL_VERSION + 1


# --- no bytes do harm -----------------------------------------------------------------------------


def decode_all(packed: bytes) -> list[ClientMessage]:
    """What the decoders make of it; any exception but WireError is the caller's."""
    decoded: list[ClientMessage] = []
    for decode in DECODERS:
        try:
            decoded.append(decode(packed))
        except WireError as error:
            assert str(error)  # noqa: PT017 - whatever was wrong, it is said
    return decoded


ONE_OF_EACH = [
    encode_client(message)
    for message in (
        GENERATE, CHAT, OUTPUTS, Abort((1, 2)), Credit(1, 2), Tokenize(1, "x", True),
        Failed(0, "overloaded", "later", None, 1.0), StatusReport(1, {"a": [1, {"b": None}]}),
    )
]  # fmt: skip


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x91" * 100_000)  # nested deeper than any stack
@example(b"\x81\xa1a" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")  # four billion entries, none there
@example(b"\xdd\x00\x00\x20\x00" * 1000)  # each within its limit, 8192 entries in 1000 levels
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdb\xff\xff\xff\xff")
@example(b"\xd6\xff\x00\x00\x00\x00")  # a timestamp
@example(b"\x93\x01\x2b\xcf\xff\xff\xff\xff\xff\xff\xff\xff")  # Ping(2**64 - 1)
def test_random_bytes_are_refused(packed: bytes) -> None:
    assert all(encode_client(message) for message in decode_all(packed))


@pytest.mark.parametrize("packed", ONE_OF_EACH)
def test_a_message_cut_short_or_followed_by_more_is_refused(packed: bytes) -> None:
    assert len(decode_all(packed)) == 1
    for length in range(len(packed)):
        assert decode_all(packed[:length]) == []
    assert decode_all(packed + b"\0") == []


@settings(max_examples=200)
@given(
    st.sampled_from(ONE_OF_EACH),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_mutated_message_is_refused_or_is_another_valid_one(
    packed: bytes, changes: list[tuple[int, int]]
) -> None:
    mutated = bytearray(packed)
    for place, value in changes:
        mutated[place % len(mutated)] = value
    for message in decode_all(bytes(mutated)):
        assert message in decode_all(encode_client(message))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.sampled_from([Generate, Chat, Outputs, Failed, Hello]), st.lists(anything, max_size=10))
def test_well_formed_messagepack_of_the_wrong_shape_is_refused(cls: Any, fields: list[Any]) -> None:
    packed = msgpack.packb([CLIENT_PROTOCOL_VERSION, cls.CODE, *fields])
    for message in decode_all(packed):
        assert message in decode_all(encode_client(message))


def test_a_message_over_the_size_limit_is_not_even_looked_at() -> None:
    with pytest.raises(WireError, match=f"bytes are over {MAX_CLIENT_MESSAGE_BYTES}"):
        decode_from_client(bytes(MAX_CLIENT_MESSAGE_BYTES + 1))
