"""The client's connection as a state machine: by hand, and at random against a fake daemon."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from furiosa_llm import SamplingParams
from furiosa_llm.client.connection import (
    ATTEMPT_TIMEOUT_S,
    MAX_INTERRUPTIONS,
    Connection,
    Deliver,
    Dial,
    HangUp,
    Send,
)
from furiosa_llm.client.errors import (
    CannotResumeError,
    ClientClosedError,
    DaemonUnreachableError,
)
from furiosa_llm.client.prepared import PreparedStream
from furiosa_llm.client.progress import News
from furiosa_llm.errors import (
    ContextLengthError,
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    ServiceUnavailableError,
)
from furiosa_llm.wire.client_codec import decode_from_client, encode_client
from furiosa_llm.wire.client_messages import (
    Abort,
    Accepted,
    Chat,
    Credit,
    Drop,
    Failed,
    Finish,
    Generate,
    Goodbye,
    Hello,
    Outputs,
    Ping,
    Pong,
    Welcome,
)

HEARTBEAT_S = 5.0
CONNECT_S, RECONNECT_S = 10.0, 60.0


def new_connection(connect_timeout_s=CONNECT_S, reconnect_timeout_s=RECONNECT_S):
    return Connection(
        "client", software="test", address="ipc:///x", connect_timeout_s=connect_timeout_s,
        reconnect_timeout_s=reconnect_timeout_s, jitter=itertools.repeat(1.0),
    )  # fmt: skip


def stream(n=1, max_tokens=4, **params):
    sampling = SamplingParams(n=n, max_tokens=max_tokens, **params)
    return PreparedStream.generate(
        [1, 2], sampling, "r", add_special_tokens=True, is_final=False
    ).progress


def sent(effects):
    return [decode_from_client(e.packed) for e in effects if isinstance(e, Send)]


def delivered(effects):
    return [(e.to, e.item) for e in effects if isinstance(e, Deliver)]


def kinds(effects):
    return [type(e) for e in effects]


WELCOME = Welcome("server", "test", HEARTBEAT_S)


class Driven:
    """A connection and a clock."""

    def __init__(self):
        self.now_s = 100.0
        self.connection = new_connection()

    def do(self, name, *arguments):
        return getattr(self.connection, name)(*arguments, self.now_s)

    def hear(self, message):
        return self.do("received", encode_client(message))

    def wait(self, seconds):
        self.now_s += seconds
        return self.do("tick")

    def up(self):
        """Connected, with a ping that is answered."""
        self.do("call", "first", Ping(1))
        (ping,) = sent(self.hear(WELCOME))
        self.hear(Pong(ping.call_id))
        return self

    def begin(self, to="s", progress=None):
        """A stream that was accepted; returns its id."""
        (message,) = sent(self.do("begin", to, progress or stream()))
        self.hear(accepted(message.stream_id))
        return message.stream_id


def accepted(stream_id, model_id="m"):
    return Accepted(stream_id, model_id, None, (1, 2), 77, 4)


def outputs(seq, *rows):
    """rows: (stream id, choice, token ids, finish reason or None)"""
    return Outputs(
        seq,
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        tuple(len(row[2]) for row in rows),
        tuple(token for row in rows for token in row[2]),
        tuple("x" * len(row[2]) for row in rows),
        tuple((i, Finish(row[3], None, 0)) for i, row in enumerate(rows) if row[3]),
        (),
    )


# --- connecting -----------------------------------------------------------------------------------


def test_nothing_is_dialled_before_somebody_asks():
    driven = Driven()
    assert driven.do("tick") == []
    assert driven.connection.deadline_s == math.inf
    effects = driven.do("call", "a", Ping(1))
    assert kinds(effects) == [Dial, Send]
    assert isinstance(sent(effects)[0], Hello)
    assert sent(driven.do("call", "b", Ping(1))) == []  # it waits for the same connection
    pings = sent(driven.hear(WELCOME))
    assert [type(each) for each in pings] == [Ping, Ping]
    assert driven.connection.is_up


def test_attempts_are_repeated_with_growing_pauses_until_the_time_is_up():
    driven = Driven()
    driven.do("call", "a", Ping(1))
    pauses, dialled_s = [], driven.now_s
    for _ in range(8):
        assert kinds(driven.do("lost", "nothing listens there")) == [HangUp]
        assert driven.wait(0) == []
        pauses.append(driven.connection.deadline_s - driven.now_s)
        driven.now_s = driven.connection.deadline_s
        assert kinds(driven.do("tick")) == [Dial, Send]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    driven.do("lost", "nothing listens there")
    driven.now_s = dialled_s + CONNECT_S
    ((to, error),) = delivered(driven.do("tick"))
    assert to == "a"
    assert isinstance(error, DaemonUnreachableError)
    assert isinstance(error, ConnectionError)
    assert "ipc:///x cannot be reached: nothing listens there" in str(error)


def test_an_attempt_that_is_not_answered_is_given_up():
    driven = Driven()
    driven.do("call", "a", Ping(1))
    assert driven.wait(ATTEMPT_TIMEOUT_S - 0.1) == []
    assert kinds(driven.wait(0.1)) == [HangUp]
    assert kinds(driven.wait(0.1)) == [Dial, Send]


def test_a_client_whose_daemon_is_gone_can_be_used_again_later():
    driven = Driven().up()
    driven.do("lost", "the connection ended")
    assert driven.connection.deadline_s == math.inf  # nothing was asked: nothing is done
    driven.now_s += 1000
    assert kinds(driven.do("call", "b", Ping(1))) == [Dial, Send]


def test_a_daemon_of_another_version_is_final():
    driven = Driven()
    driven.do("call", "a", Ping(1))
    effects = driven.do("received", b"\x92\x02\x31")
    assert kinds(effects) == [HangUp, Deliver]
    assert "speaks version 2" in str(delivered(effects)[0][1])
    assert driven.wait(10) == []


def test_a_daemon_that_is_full_is_tried_again_and_one_that_refuses_is_not():
    driven = Driven()
    driven.do("call", "a", Ping(1))
    assert kinds(driven.hear(Failed(0, "overloaded", "full", None, 1.0))) == [HangUp]
    assert kinds(driven.wait(0.05)) == [Dial, Send]
    effects = driven.hear(Failed(0, "invalid_request", "malformed", None, 0.0))
    assert kinds(effects) == [HangUp, Deliver]


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_from_its_beginning_to_its_end():
    driven = Driven().up()
    effects = driven.do("begin", "s", stream(n=2, max_tokens=2))
    (message,) = sent(effects)
    assert isinstance(message, Generate)
    assert (message.prompt_token_ids, message.credits) == ((1, 2), 32)
    sid = message.stream_id
    assert delivered(driven.hear(accepted(sid))) == [("s", accepted(sid))]
    ((_, news),) = delivered(
        driven.hear(outputs(0, (sid, 0, (5,), None), (sid, 1, (6, 7), "stop")))
    )
    assert [(n.choice_index, n.token_ids, n.finish) for n in news] == [
        (0, (5,), None),
        (1, (6, 7), Finish("stop", None, 0)),
    ]
    driven.hear(outputs(1, (sid, 0, (8,), "length")))
    assert driven.connection.deadline_s == math.inf
    assert driven.hear(outputs(2, (sid, 0, (9,), None))) == []  # nobody waits for it any more


def test_a_stream_resumes_with_its_tokens_and_what_it_came_to():
    driven = Driven().up()
    sid = driven.begin(progress=stream(n=3, temperature=0.5))
    driven.hear(outputs(0, (sid, 0, (5, 6), None), (sid, 1, (7,), "stop")))
    assert kinds(driven.do("lost", "the connection ended")) == [HangUp]
    driven.wait(0.05)
    (message,) = sent(driven.hear(WELCOME))
    assert message == Generate(
        stream_id=message.stream_id,
        request_id="r",
        prompt=None,
        prompt_token_ids=(1, 2),
        add_special_tokens=False,
        params={"n": 3, "max_tokens": 4, "temperature": 0.5, "seed": 77},
        credits=48 - 2,
        resume_token_ids=((5, 6), None, ()),
        model_id="m",
    )
    assert message.stream_id > sid
    assert driven.hear(accepted(message.stream_id)) == []  # its reader has been told
    ((_, news),) = delivered(driven.hear(outputs(0, (message.stream_id, 0, (8,), None))))
    assert news[0].token_ids == (8,)


def test_a_stream_that_was_not_accepted_is_sent_again_as_it_was():
    driven = Driven().up()
    (first,) = sent(driven.do("begin", "s", stream()))
    driven.do("lost", "the connection ended")
    driven.wait(0.05)
    (again,) = sent(driven.hear(WELCOME))
    assert again == replace(first, stream_id=again.stream_id)


def test_what_comes_of_a_connection_that_is_lost_counts_no_more():
    driven = Driven().up()
    sid = driven.begin()
    driven.do("lost", "the connection ended")
    assert driven.hear(outputs(0, (sid, 0, (5,), None))) == []


@pytest.mark.parametrize("seq", [1, 5])
def test_a_gap_in_the_outputs_begins_the_streams_again(seq):
    driven = Driven().up()
    sid = driven.begin()
    assert kinds(driven.hear(outputs(seq, (sid, 0, (5,), None)))) == [HangUp]
    driven.wait(0.05)
    (again,) = sent(driven.hear(WELCOME))
    assert again.resume_token_ids == ((),)


def test_a_malformed_message_begins_the_streams_again():
    driven = Driven().up()
    driven.begin()
    assert kinds(driven.do("received", b"\xff\xff")) == [HangUp]
    assert driven.connection.num_malformed == 1
    assert kinds(driven.wait(0.05)) == [Dial, Send]


def test_tokens_of_a_choice_that_cannot_have_any_are_a_broken_connection():
    driven = Driven().up()
    sid = driven.begin()
    assert kinds(driven.hear(outputs(0, (sid, 1, (5,), None)))) == [HangUp]


def test_a_restarting_daemon_that_is_not_ready_is_asked_again():
    driven = Driven().up()
    driven.begin()
    driven.do("lost", "the connection ended")
    driven.wait(0.05)
    (again,) = sent(driven.hear(WELCOME))
    busy = Failed(again.stream_id, "service_unavailable", "starting", None, 0.5)
    assert driven.hear(busy) == []
    assert sent(driven.wait(0.4)) == []
    (third,) = sent(driven.wait(0.1))
    assert third.resume_token_ids == ((),)
    driven.hear(replace(busy, id=third.stream_id))
    for _ in range(200):  # and so on, for as long as it was told to wait
        effects = driven.wait(0.5)
        for message in sent(effects):
            if isinstance(message, Generate):
                driven.hear(replace(busy, id=message.stream_id))
            else:
                driven.hear(Pong(message.call_id))
        if delivered(effects):
            break
    assert driven.now_s == pytest.approx(100.0 + RECONNECT_S, abs=1.0)
    assert "starting" in str(delivered(effects)[0][1])


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("service_unavailable", ServiceUnavailableError),
        ("overloaded", OverloadedError),
        ("context_length_exceeded", ContextLengthError),
        ("invalid_request", InvalidRequestError),
        ("something new", FuriosaLLMError),
    ],
)
def test_a_new_request_that_is_refused_fails_with_the_daemons_error(code, cls):
    driven = Driven().up()
    (message,) = sent(driven.do("begin", "s", stream()))
    ((to, error),) = delivered(driven.hear(Failed(message.stream_id, code, "why", "n", 3.0)))
    assert (to, type(error), str(error)) == ("s", cls, "why")
    assert getattr(error, "param", "n") == "n"
    assert getattr(error, "retry_after", 3.0) == 3.0


def test_a_daemon_with_another_model_does_not_go_on_with_a_stream():
    driven = Driven().up()
    driven.begin()
    driven.do("lost", "the connection ended")
    driven.wait(0.05)
    (again,) = sent(driven.hear(WELCOME))
    ((_, error),) = delivered(driven.hear(Failed(again.stream_id, "cannot_resume", "no", None, 0)))
    assert isinstance(error, CannotResumeError)


def test_a_stream_that_ends_every_daemon_fails_at_last():
    driven = Driven().up()
    driven.begin()
    for _ in range(MAX_INTERRUPTIONS):
        assert delivered(driven.do("lost", "the connection ended")) == []
        driven.now_s = driven.connection.deadline_s
        driven.do("tick")
        (again,) = sent(driven.hear(WELCOME))
        driven.hear(accepted(again.stream_id))
    ((_, error),) = delivered(driven.do("lost", "the connection ended"))
    assert isinstance(error, DaemonUnreachableError)


def test_credits_are_given_back_by_half_a_window():
    driven = Driven().up()
    sid = driven.begin(progress=stream(max_tokens=100))  # its window is 16 rows
    driven.hear(outputs(0, *[(sid, 0, (5,), None)] * 16))
    assert driven.do("read", "s", 7) == []
    (credit,) = sent(driven.do("read", "s", 1))
    assert credit == Credit(sid, 8)
    assert sent(driven.do("read", "s", 8)) == [Credit(sid, 8)]


def test_an_unread_window_grants_nothing_after_a_resume():
    driven = Driven().up()
    sid = driven.begin(progress=stream(max_tokens=100))
    driven.hear(outputs(0, *[(sid, 0, (5,), None)] * 16))
    driven.do("lost", "the connection ended")
    driven.wait(0.05)
    (again,) = sent(driven.hear(WELCOME))
    assert again.credits == 0
    assert sent(driven.do("read", "s", 16)) == [Credit(again.stream_id, 16)]


def test_abort_and_drop():
    driven = Driven().up()
    sid = driven.begin()
    assert sent(driven.do("abort", "r")) == [Abort((sid,))]
    assert driven.do("abort", "another") == []
    driven.hear(outputs(0, (sid, 0, (), "abort")))
    sid = driven.begin("t")
    assert sent(driven.do("drop", "t")) == [Drop((sid,))]
    assert driven.do("drop", "t") == []
    assert driven.hear(outputs(1, (sid, 0, (5,), None))) == []


def test_an_abort_holds_when_the_connection_is_lost_before_or_after_it():
    for is_before in (True, False):
        driven = Driven().up()
        sid = driven.begin(progress=stream(n=2))
        driven.hear(outputs(0, (sid, 1, (5,), "stop")))
        effects = [] if is_before else driven.do("abort", "r")
        effects = driven.do("lost", "the connection ended")
        if is_before:
            effects = driven.do("abort", "r")
        ((_, news),) = delivered(effects)
        assert news == [News(0, finish=Finish("abort", None, 0))]
        driven.now_s += 1
        assert driven.do("tick") == []


# --- time, and the end ----------------------------------------------------------------------------


def test_an_idle_connection_says_nothing_and_a_busy_one_beats():
    driven = Driven().up()
    assert driven.connection.deadline_s == math.inf
    driven.begin()
    assert driven.wait(HEARTBEAT_S - 0.1) == []
    (ping,) = sent(driven.wait(0.1))
    assert isinstance(ping, Ping)
    assert driven.hear(Pong(ping.call_id)) == []
    assert driven.hear(Pong(0)) == []


def test_a_daemon_that_falls_silent_is_lost():
    driven = Driven().up()
    driven.now_s += 1000  # idle: no reason to hear anything
    driven.begin()
    for _ in range(2):
        assert kinds(driven.wait(HEARTBEAT_S)) == [Send]
    assert kinds(driven.wait(HEARTBEAT_S)) == [HangUp]
    assert kinds(driven.wait(0.05)) == [Dial, Send]


def test_closing_tells_everybody():
    driven = Driven().up()
    driven.begin()
    driven.do("call", "c", Ping(1))
    effects = driven.do("close")
    assert kinds(effects) == [Send, HangUp, Deliver, Deliver]
    assert isinstance(sent(effects)[0], Goodbye)
    errors = dict(delivered(effects))
    assert {type(error) for error in errors.values()} == {ClientClosedError}
    assert errors["s"] is not errors["c"]
    ((_, error),) = delivered(driven.do("call", "d", Ping(1)))
    assert isinstance(error, ClientClosedError)


def test_a_goodbye_of_the_daemon_is_a_lost_connection():
    driven = Driven().up()
    driven.begin()
    assert kinds(driven.hear(Goodbye("the daemon stops"))) == [HangUp]
    assert kinds(driven.wait(0.05)) == [Dial, Send]


# --- at random ------------------------------------------------------------------------------------


def token_of(seed, choice, position):
    return (seed * 1000 + choice * 100 + position) % 50_000


class FakeDaemon:
    """Runs streams whose tokens are a function of (seed, choice, position), and honours credits."""

    def __init__(self, seeds):
        self.streams = {}
        self.seq = 0
        self.seeds = seeds

    def hear(self, message):
        """Returns: what it answers at once."""
        match message:
            case Hello():
                return [Welcome("s", "fake", HEARTBEAT_S)]
            case Ping():
                return [Pong(message.call_id)]
            case Credit():
                if message.stream_id in self.streams:
                    self.streams[message.stream_id]["credits"] += message.num_rows
            case Generate() | Chat():
                n = message.params.get("n", 1)
                seed = message.params.get("seed")
                seed = next(self.seeds) if seed is None else seed
                resumed = message.resume_token_ids or ((),) * n
                self.streams[message.stream_id] = {
                    "seed": seed,
                    "credits": message.credits,
                    "max": message.params.get("max_tokens", 16),
                    "at": {i: len(ids) for i, ids in enumerate(resumed) if ids is not None},
                    "rows": {},
                }
                return [replace(accepted(message.stream_id), seed=seed,
                                max_tokens=message.params.get("max_tokens", 16))]  # fmt: skip
            case Drop() | Abort():
                for stream_id in message.stream_ids:
                    self.streams.pop(stream_id, None)
        return []

    def step(self):
        """One token of every choice, joined to what waits."""
        for run in self.streams.values():
            for choice, position in list(run["at"].items()):
                row = run["rows"].setdefault(choice, [[], None])
                row[0].append(token_of(run["seed"], choice, position))
                run["at"][choice] += 1
                if run["at"][choice] == run["max"]:
                    row[1] = "length"
                    del run["at"][choice]

    def flush(self):
        rows = []
        for stream_id, run in self.streams.items():
            while run["rows"] and run["credits"]:
                run["credits"] -= 1
                choice = next(iter(run["rows"]))
                token_ids, reason = run["rows"].pop(choice)
                rows.append((stream_id, choice, tuple(token_ids), reason))
        if not rows:
            return []
        self.seq += 1
        return [outputs(self.seq - 1, *rows)]


class ConnectionMachine(RuleBasedStateMachine):
    """Streams over a daemon that may be lost, or restart, between any two messages."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.connection = new_connection(1e9, 1e9)
        self.seeds = itertools.count(1)
        self.daemon = FakeDaemon(self.seeds)
        self.is_connected = False
        self.to_daemon, self.to_client = deque(), deque()
        self.names = itertools.count()
        self.open = {}  # name -> (n, max_tokens)
        self.heard = {}  # name -> [tokens of each choice]
        self.seed_of, self.unread, self.ended = {}, {}, {}

    def perform(self, effects):
        for effect in effects:
            match effect:
                case Dial():
                    assert not self.is_connected
                    self.is_connected = True
                    self.daemon = FakeDaemon(self.seeds)
                    self.to_daemon.clear()
                    self.to_client.clear()
                case HangUp():
                    self.is_connected = False
                    self.to_daemon.clear()
                    self.to_client.clear()
                case Send():
                    assert self.is_connected
                    self.to_daemon.append(effect.packed)
                case Deliver(to, Accepted() as item):
                    self.seed_of[to] = item.seed
                case Deliver(to, list() as news):
                    for each in news:
                        self.heard[to][each.choice_index] += each.token_ids
                        if each.finish is not None:
                            self.ended[to].add(each.choice_index)
                    self.unread[to] += len(news)
                case Deliver(to, error):  # it was interrupted too often without a token in between
                    assert isinstance(error, DaemonUnreachableError)
                    del self.open[to]

    @rule(n=st.integers(1, 3), max_tokens=st.integers(1, 40))
    def begin(self, n, max_tokens):
        name = next(self.names)
        self.open[name] = (n, max_tokens)
        self.heard[name] = [[] for _ in range(n)]
        self.unread[name], self.ended[name] = 0, set()
        self.perform(self.connection.begin(name, stream(n, max_tokens), self.now_s))

    @rule(num=st.integers(1, 20))
    def step(self, num):
        for _ in range(num):
            self.daemon.step()
            if self.is_connected:
                self.to_client += [encode_client(m) for m in self.daemon.flush()]

    @precondition(lambda self: self.to_daemon)
    @rule()
    def one_to_daemon(self):
        answers = self.daemon.hear(decode_from_client(self.to_daemon.popleft()))
        self.to_client += [encode_client(message) for message in answers]

    @precondition(lambda self: self.to_client)
    @rule()
    def one_to_client(self):
        self.perform(self.connection.received(self.to_client.popleft(), self.now_s))

    @precondition(lambda self: self.to_client or self.to_daemon)
    @rule()
    def everything_arrives(self):
        while self.to_client or self.to_daemon:
            if self.to_daemon:
                self.one_to_daemon()
            if self.to_client:
                self.one_to_client()

    @precondition(lambda self: self.is_connected)
    @rule()
    def lose(self):
        self.perform(self.connection.lost("the connection ended", self.now_s))

    @rule(data=st.data())
    def read(self, data):
        waiting = [name for name in self.open if self.unread[name]]
        if waiting:
            name = data.draw(st.sampled_from(waiting))
            num = data.draw(st.integers(1, self.unread[name]))
            self.unread[name] -= num
            self.perform(self.connection.read(name, num, self.now_s))

    @rule(data=st.data())
    def drop(self, data):
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            del self.open[name]
            self.perform(self.connection.drop(name, self.now_s))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 1.0, 3.0]))
    def wait(self, seconds):
        self.now_s += seconds
        self.perform(self.connection.tick(self.now_s))

    @invariant()
    def every_stream_has_a_beginning_of_its_tokens(self):
        for name, choices in self.heard.items():
            for choice, token_ids in enumerate(choices):
                seed = self.seed_of.get(name, 0)
                assert token_ids == [token_of(seed, choice, i) for i in range(len(token_ids))]

    @invariant()
    def a_reader_has_no_more_unread_than_its_window(self):
        for name, (n, _) in self.open.items():
            assert self.unread[name] <= 16 * n

    def teardown(self):
        """Left alone, everything that is still wanted ends, complete."""
        for _ in range(400):
            if all(len(self.ended[name]) == n for name, (n, _) in self.open.items()):
                break
            self.wait(0.05)
            self.everything_arrives()
            self.step(5)
            self.everything_arrives()
            for name in self.open:
                num, self.unread[name] = self.unread[name], 0
                self.perform(self.connection.read(name, num, self.now_s))
        for name, (n, max_tokens) in self.open.items():
            assert [len(ids) for ids in self.heard[name]] == [max_tokens] * n
        self.every_stream_has_a_beginning_of_its_tokens()


TestConnectionMachine = ConnectionMachine.TestCase
TestConnectionMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
