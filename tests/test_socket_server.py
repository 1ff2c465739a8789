"""The daemon's socket, seen by bare ZeroMQ: what it answers, what it bounds, whom it forgets."""

import asyncio
import itertools
import os
import random
import socket
import stat

import pytest
import zmq
import zmq.asyncio
from client_daemon import eventually, serving
from engines import async_engine
from tiny_models import tiny_artifact

from furiosa_llm.engine.settings import MOCK_SPEED_VARIABLE
from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.server.client_limits import ClientLimits
from furiosa_llm.server.service import ServiceState
from furiosa_llm.server.socket_server import SocketServer
from furiosa_llm.wire.client_codec import decode_from_daemon, encode_client
from furiosa_llm.wire.client_messages import (
    Abort,
    Accepted,
    Chat,
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
    Outputs,
    Ping,
    Pong,
    StatusReport,
    Tokenize,
    Tokenized,
    Welcome,
)

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def engine(model):
    with async_engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def slow_engine(model):
    """About 200 tokens a second, so that a request of 200 is still running when looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MOCK_SPEED_VARIABLE, "200")
        engine = async_engine(model)
    with engine:
        yield engine


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/s"


class Peer:
    """A client that is only a socket."""

    def __init__(self, context, endpoint):
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self.later = []  # messages that came while another kind was waited for

    async def say(self, message):
        await self._socket.send(message if isinstance(message, bytes) else encode_client(message))

    async def hear(self, cls=None):
        """The next message, or the next one of a class."""
        for index, message in enumerate(self.later):
            if cls is None or isinstance(message, cls):
                return self.later.pop(index)
        async with asyncio.timeout(10):
            while True:
                message = decode_from_daemon(await self._socket.recv())
                if cls is None or isinstance(message, cls):
                    return message
                self.later.append(message)

    async def ask(self, message, cls=None):
        await self.say(message)
        return await self.hear(cls)

    async def hello(self, client_id="c"):
        return await self.ask(Hello(f"{client_id}{next(_numbers)}", "test"), Welcome)

    async def outputs_until_finish(self, stream_id):
        """(all its token ids, its finish) of a single-choice stream."""
        token_ids = []
        while True:
            outputs = await self.hear(Outputs)
            assert set(outputs.stream_ids) == {stream_id}
            token_ids += outputs.token_ids
            if outputs.finishes:
                return token_ids, outputs.finishes[0][1]

    def close(self):
        self._socket.close()


@pytest.fixture
def peers(endpoint):
    """Makes peers of the endpoint, and closes them."""
    context = zmq.asyncio.Context()
    made = []

    def make(at=endpoint):
        made.append(Peer(context, at))
        return made[-1]

    yield make
    for peer in made:
        peer.close()
    context.term()


def generate(stream_id=1, max_tokens=8, credits=1000, **changed):
    params = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}
    fields = {
        "stream_id": stream_id, "request_id": f"r-{next(_numbers)}", "prompt": None,
        "prompt_token_ids": (5, 6, 7), "add_special_tokens": False, "credits": credits,
        "resume_token_ids": (), "model_id": "",
    }  # fmt: skip
    params |= changed.pop("params", {})
    return Generate(**(fields | {"params": params} | changed))


def is_at_rest(engine):
    """Nothing runs, and every block is free."""
    status = engine.status()
    blocks = [(worker.num_free_blocks, worker.num_blocks) for worker in status.workers]
    return status.num_requests == 0 and all(free == total for free, total in blocks)


# --- greetings ------------------------------------------------------------------------------------


async def test_the_socket_is_this_users_alone(engine, endpoint):
    async with serving(engine, endpoint):
        mode = os.stat(endpoint.removeprefix("ipc://")).st_mode
        assert stat.S_IMODE(mode) == 0o600
    assert not os.path.exists(endpoint.removeprefix("ipc://"))


async def test_an_endpoint_in_use_is_not_taken_away(engine, endpoint, peers):
    async with serving(engine, endpoint) as (service, _):
        with pytest.raises(FuriosaLLMError, match="is in use by another process"):
            await SocketServer(service, endpoint).start()
        assert await peers().hello()


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("tcp://127.0.0.1:0", "needs keys"),
        ("inproc://x", "neither ipc://PATH nor tcp://HOST:PORT"),
        ("/tmp/x", "neither ipc://PATH nor tcp://HOST:PORT"),
        ("ipc://", "neither ipc://PATH nor tcp://HOST:PORT"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(endpoint, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        SocketServer(None, endpoint)


async def test_an_endpoint_that_cannot_be_bound(engine, tmp_path):
    with pytest.raises(FuriosaLLMError, match="cannot be bound"):
        async with serving(engine, f"ipc://{tmp_path}/not/there"):
            pass


async def test_a_leftover_socket_file_is_no_obstacle(engine, tmp_path, endpoint, peers):
    left = socket.socket(socket.AF_UNIX)
    left.bind(f"{tmp_path}/s")
    left.close()
    async with serving(engine, endpoint):
        assert await peers().hello()


async def test_what_comes_before_a_hello_is_told_to_connect_anew(engine, endpoint, peers):
    async with serving(engine, endpoint) as (_, server):
        peer = peers()
        assert await peer.ask(Ping(1)) == Goodbye("this connection is unknown")
        welcome = await peer.hello()
        assert welcome.server_id == server.server_id
        assert await peer.ask(Ping(1)) == Pong(1)


async def test_another_version_is_told_so(engine, endpoint, peers):
    async with serving(engine, endpoint) as (_, server):
        failed = await peers().ask(b"\x93\x07\x21\x01", Failed)
        assert failed.id == 0
        assert "speaks version 7 of the protocol and the daemon version 1" in failed.message
        assert server.num_malformed == 1


async def test_more_clients_than_allowed_are_refused(engine, endpoint, peers):
    async with serving(engine, endpoint, limits=ClientLimits(max_clients=1)) as (_, server):
        await peers().hello()
        failed = await peers().ask(Hello("another", "test"), Failed)
        assert (failed.id, failed.error_code) == (0, "overloaded")
        assert failed.retry_after > 0
        assert server.num_clients == 1


# --- requests -------------------------------------------------------------------------------------


async def test_a_request_is_accepted_and_answered(engine, endpoint, peers):
    async with serving(engine, endpoint) as (service, _):
        peer = peers()
        await peer.hello()
        accepted = await peer.ask(generate(7, params={"temperature": 1.0}), Accepted)
        assert (accepted.stream_id, accepted.prompt_token_ids, accepted.max_tokens) == (
            7, (5, 6, 7), 8,
        )  # fmt: skip
        token_ids, finish = await peer.outputs_until_finish(7)
        assert len(token_ids) == 8
        assert finish == Finish("length", None, 0)
        again = generate(8, params={"temperature": 1.0, "seed": accepted.seed})
        await peer.say(again)  # the seed that was drawn gives the same again
        assert await peer.outputs_until_finish(8) == (token_ids, finish)
        assert service.num_in_flight == 0
        await eventually(lambda: is_at_rest(engine))


@pytest.mark.parametrize("at", [0, 1, 3, 7])
async def test_a_request_goes_on_from_the_tokens_it_has(engine, endpoint, peers, at):
    async with serving(engine, endpoint):
        peer = peers()
        await peer.hello()
        accepted = await peer.ask(generate(1), Accepted)
        whole, finish = await peer.outputs_until_finish(1)
        resumed = generate(2, resume_token_ids=(tuple(whole[:at]),), model_id=accepted.model_id)
        await peer.say(resumed)
        rest, rest_finish = await peer.outputs_until_finish(2)
        assert (whole[:at] + rest, rest_finish) == (whole, finish)


async def test_only_the_choices_that_have_not_ended_go_on(engine, endpoint, peers):
    params = {"n": 3, "temperature": 1.0, "seed": 5}
    async with serving(engine, endpoint):
        peer = peers()
        await peer.hello()
        accepted = await peer.ask(generate(1, params=params), Accepted)
        whole, ended = {0: [], 1: [], 2: []}, 0
        while ended < 3:
            outputs = await peer.hear(Outputs)
            ended += len(outputs.finishes)
            gather(outputs, whole)
        resumed = generate(
            2, params=params, model_id=accepted.model_id,
            resume_token_ids=(tuple(whole[0][:2]), None, ()),
        )  # fmt: skip
        await peer.say(resumed)
        rest, ended = {0: [], 2: []}, 0
        while ended < 2:
            outputs = await peer.hear(Outputs)
            ended += len(outputs.finishes)
            gather(outputs, rest)
        assert rest == {0: whole[0][2:], 2: whole[2]}


def gather(outputs, into):
    first = 0
    for choice, num_tokens in zip(outputs.choice_indices, outputs.num_tokens, strict=True):
        into[choice] += outputs.token_ids[first : first + num_tokens]
        first += num_tokens


@pytest.mark.parametrize(
    ("changed", "code", "param"),
    [
        ({"resume_token_ids": ((1,) * 8,)}, "invalid_request", "resume_token_ids"),
        ({"resume_token_ids": ((1,), (2,))}, "invalid_request", "resume_token_ids"),
        ({"resume_token_ids": (None,)}, "invalid_request", "resume_token_ids"),
        ({"resume_token_ids": ((1_000_000,),)}, "invalid_request", "resume_token_ids"),
        ({"resume_token_ids": ((1,),), "model_id": "another"}, "cannot_resume", None),
        ({"prompt_token_ids": (1_000_000,)}, "invalid_request", "prompt_token_ids"),
        ({"request_id": ""}, "invalid_request", "request_id"),
        ({"params": {"temperature": -1}}, "invalid_request", "temperature"),
        ({"params": {"nonsense": -1}}, "invalid_request", "nonsense"),
        ({"params": {"max_tokens": 10_000}}, "context_length_exceeded", "max_tokens"),
    ],
)
async def test_a_wrong_request_is_refused_by_name(engine, endpoint, peers, changed, code, param):
    async with serving(engine, endpoint) as (service, _):
        peer = peers()
        await peer.hello()
        if "model_id" not in changed:
            accepted = await peer.ask(generate(1, max_tokens=1), Accepted)
            await peer.outputs_until_finish(1)
            changed = changed | {"model_id": accepted.model_id}
        failed = await peer.ask(generate(5, **changed), Failed)
        assert (failed.id, failed.error_code, failed.param) == (5, code, param)
        assert service.num_in_flight == 0
        assert await peer.ask(Ping(9), Pong) == Pong(9)


async def test_resumed_tokens_that_hold_a_stop_string_are_refused(engine, endpoint, peers):
    async with serving(engine, endpoint):
        peer = peers()
        await peer.hello()
        accepted = await peer.ask(generate(1), Accepted)
        tokenized = await peer.ask(Tokenize(2, "the fox", False), Tokenized)
        resumed = generate(
            3, params={"stop": ["fox"], "max_tokens": 99}, model_id=accepted.model_id,
            resume_token_ids=(tokenized.token_ids,),
        )  # fmt: skip
        failed = await peer.ask(resumed, Failed)
        assert failed.param == "resume_token_ids"
        assert "stop strings" in failed.message


async def test_a_chat_is_put_by_the_template(engine, endpoint, peers):
    messages = ({"role": "user", "content": "hi"},)
    async with serving(engine, endpoint):
        peer = peers()
        await peer.hello()
        accepted = await peer.ask(Chat(1, "chat", messages, {}, {"max_tokens": 2}, 9), Accepted)
        text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert accepted.prompt == text
        assert list(accepted.prompt_token_ids) == engine.tokenizer.encode(text, False)
        assert len((await peer.outputs_until_finish(1))[0]) == 2


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ((), {}, "messages"),
        (({"role": "alien", "content": "x"},), {}, "messages[0].role"),
        (({"role": "user", "content": 5},), {}, "messages[0].content"),
        (({"role": "user", "content": "x"},), {"chat_template": "{{ 7 }}"}, "chat_template"),
        (({"role": "user", "content": "x"},), {"continue_final_message": 1},
         "continue_final_message"),
        (({"role": "user", "content": "x"},), {"chat_template_kwargs": 5}, "chat_template_kwargs"),
        (({"role": "user", "content": "x"},), {"chat_template_kwargs": {"messages": []}},
         "chat_template_kwargs.messages"),
    ],
)  # fmt: skip
async def test_a_wrong_chat_is_refused(engine, endpoint, peers, messages, options, param):
    async with serving(engine, endpoint):
        peer = peers()
        await peer.hello()
        failed = await peer.ask(Chat(1, "chat", messages, options, {}, 9), Failed)
        assert (failed.error_code, failed.param) == ("invalid_request", param)


async def test_two_clients_may_not_have_one_request_id(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint):
        one, other = peers(), peers()
        await one.hello()
        await other.hello()
        await one.ask(generate(1, 100, request_id="same"), Accepted)
        failed = await other.ask(generate(1, request_id="same"), Failed)
        assert failed.error_code == "duplicate_request"


async def test_abort_ends_a_request_as_it_stands_and_drop_without_a_word(
    slow_engine, endpoint, peers
):
    async with serving(slow_engine, endpoint):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 200), Accepted)
        await peer.hear(Outputs)
        await peer.say(Abort((1, 99)))
        _, finish = await peer.outputs_until_finish(1)
        assert finish.reason == "abort"
        await peer.ask(generate(2, 200), Accepted)
        await peer.say(Drop((2, 99)))
        await eventually(lambda: is_at_rest(slow_engine))


async def test_an_abort_or_drop_that_follows_at_once_is_not_lost(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint) as (service, _):
        peer = peers()
        await peer.hello()
        await peer.say(generate(1, 200))
        await peer.say(Abort((1,)))
        assert (await peer.outputs_until_finish(1))[1].reason == "abort"
        await peer.say(generate(2, 200))
        await peer.say(Drop((2,)))
        await peer.ask(Ping(3), Pong)
        await eventually(lambda: is_at_rest(slow_engine) and service.num_in_flight == 0)


# --- credits --------------------------------------------------------------------------------------


async def test_no_more_rows_come_than_were_granted_and_the_rest_joins_the_next(
    engine, endpoint, peers
):
    async with serving(engine, endpoint) as (service, _):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 200, credits=2), Accepted)
        rows = [await peer.hear(Outputs), await peer.hear(Outputs)]
        await eventually(lambda: is_at_rest(engine))  # it was not held up
        assert service.num_in_flight == 0
        assert await peer.ask(Ping(2)) == Pong(2)  # nothing else came in between
        last = await peer.ask(Credit(1, 1), Outputs)
        rows.append(last)
        assert [len(row.stream_ids) for row in rows] == [1, 1, 1]
        assert sum(row.num_tokens[0] for row in rows) == 200
        assert last.finishes[0][1].reason == "length"
        assert last.num_tokens[0] > 150


async def test_without_a_credit_nothing_comes_but_errors(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 3, credits=0), Accepted)
        await eventually(lambda: is_at_rest(slow_engine))
        assert await peer.ask(Ping(2)) == Pong(2)
        failed = await peer.ask(generate(3, credits=0, prompt_token_ids=(10**6,)))
        assert isinstance(failed, Failed)
        assert (await peer.ask(Credit(1, 1), Outputs)).num_tokens == (3,)


async def test_limits_of_one_client_are_no_limits_of_another(slow_engine, endpoint, peers):
    limits = ClientLimits(max_streams=2, max_request_bytes=4000)
    async with serving(slow_engine, endpoint, limits=limits):
        greedy, modest = peers(), peers()
        await greedy.hello()
        await modest.hello()
        for stream_id in (1, 2):
            await greedy.ask(generate(stream_id, 200), Accepted)
        failed = await greedy.ask(generate(3), Failed)
        assert (failed.id, failed.error_code) == (3, "overloaded")
        assert "2 requests running, which is the limit" in failed.message
        large = generate(3, prompt_token_ids=(5,) * 1000)
        failed = await modest.ask(large, Failed)
        assert "the limit is 4000" in failed.message
        assert await modest.ask(generate(4), Accepted)
        await greedy.say(Drop((1,)))
        assert await greedy.ask(generate(5), Accepted)


async def test_calls_are_answered_and_bounded(engine, endpoint, peers):
    limits = ClientLimits(max_calls=1)
    async with serving(engine, endpoint, limits=limits) as (service, _):
        peer = peers()
        await peer.hello()
        tokenized = await peer.ask(Tokenize(1, "the fox", False), Tokenized)
        detokenized = await peer.ask(Detokenize(2, tokenized.token_ids, True), Detokenized)
        assert detokenized.text == "the fox"
        status = (await peer.ask(GetStatus(3), StatusReport)).status
        assert (status["state"], status["max_model_len"]) == ("ready", 256)
        assert status["engine"]["workers"][0]["num_blocks"] == 256
        with service.admit("held"):  # so that the drain has to wait
            await peer.say(Drain(4, 5.0))
            failed = await peer.ask(GetStatus(5), Failed)
            assert (failed.id, failed.error_code) == (5, "overloaded")
            refused = await peer.ask(generate(6), Failed)
            assert refused.error_code == "service_unavailable"
        assert await peer.hear(Drained) == Drained(4, 0)
        assert service.state is ServiceState.DRAINING


# --- clients that are no good, or go --------------------------------------------------------------


async def test_malformed_messages_are_counted_told_and_harm_nobody(engine, endpoint, peers):
    rng = random.Random(8)
    frames = [b"", b"\xc1", encode_client(Welcome("a", "b", 1.0))]
    whole = encode_client(generate())
    frames += [whole[: rng.randrange(1, len(whole))] for _ in range(50)]
    frames += [rng.randbytes(rng.randrange(1, 60)) for _ in range(50)]
    async with serving(engine, endpoint) as (_, server):
        good, bad = peers(), peers()
        await good.hello()
        await bad.hello()
        for frame in frames:
            assert (await bad.ask(frame, Failed)).id == 0
        assert server.num_malformed == len(frames)
        await bad._socket.send_multipart([b"one", b"more"])
        assert "3 frames" in (await bad.hear(Failed)).message
        await good.ask(generate(1), Accepted)
        assert len((await good.outputs_until_finish(1))[0]) == 8


async def test_a_stream_id_that_is_in_use_begins_nothing(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint) as (service, _):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 200), Accepted)
        await peer.say(generate(1, 200))
        await peer.ask(Ping(2), Pong)
        assert service.num_in_flight == 1


@pytest.mark.parametrize("has_credits", [True, False])
async def test_a_client_that_vanishes_frees_its_blocks(slow_engine, endpoint, peers, has_credits):
    async with serving(slow_engine, endpoint) as (service, server):
        stays, goes = peers(), peers()
        before = slow_engine.status().workers[0].num_output_tokens
        await stays.hello()
        await goes.hello()
        await goes.ask(generate(1, 240, credits=1000 if has_credits else 0), Accepted)
        assert not is_at_rest(slow_engine)
        goes.close()
        # Sooner than the 1.2 s that the request would take if it ran on.
        await eventually(lambda: server.num_clients == 1, timeout_s=1.0)
        await eventually(lambda: is_at_rest(slow_engine) and service.num_in_flight == 0)
        assert slow_engine.status().workers[0].num_output_tokens - before < 200
        assert await stays.ask(Ping(1)) in (Pong(1), Pong(0))


async def test_a_client_that_says_goodbye_is_forgotten(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint) as (_, server):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 240), Accepted)
        await peer.say(Goodbye("done"))
        await eventually(lambda: is_at_rest(slow_engine) and server.num_clients == 0)


async def test_a_client_that_is_silent_while_it_has_requests_is_forgotten(
    slow_engine, endpoint, peers
):
    limits = ClientLimits(heartbeat_s=0.05)
    async with serving(slow_engine, endpoint, limits=limits) as (_, server):
        silent, idle = peers(), peers()
        await idle.hello()
        await silent.hello()
        await silent.ask(generate(1, 240), Accepted)
        await eventually(lambda: is_at_rest(slow_engine) and server.num_clients == 1)
        assert await silent.ask(Ping(2), Goodbye)
        assert await idle.ask(Ping(2), Pong)  # nothing was asked of it


async def test_a_client_that_connects_again_replaces_itself(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint) as (service, server):
        before, after = peers(), peers()
        await before.ask(Hello("the same", "test"), Welcome)
        first = await before.ask(generate(1, 200, request_id="mine"), Accepted)
        await before.hear(Outputs)
        await after.ask(Hello("the same", "test"), Welcome)
        resumed = generate(
            2, 200, request_id="mine", resume_token_ids=((),), model_id=first.model_id
        )
        assert await after.ask(resumed, Accepted)  # its id is free
        assert (server.num_clients, service.num_in_flight) == (1, 1)


async def test_a_client_that_reads_nothing_is_cut_and_costs_a_bounded_amount(
    engine, endpoint, peers
):
    limits = ClientLimits(max_unread_messages=10)
    async with serving(engine, endpoint, limits=limits) as (_, server):
        stuck, reads = peers(), peers()
        stuck._socket.setsockopt(zmq.RCVHWM, 1)  # of connections from here on
        await stuck.hello()
        await reads.hello()
        answer_bytes = 100_000
        text = "x" * answer_bytes
        for call_id in range(1, 4000):
            if server.num_clients == 1:
                break
            await stuck.say(Detokenize(call_id, (5,) * 100, True))
            if call_id % 50 == 0:
                await asyncio.sleep(0)
                await stuck.say(Tokenize(call_id + 100_000, text, False))
        await eventually(lambda: server.num_clients == 1, timeout_s=30)
        assert await reads.ask(Ping(1), Pong)


async def test_stopping_says_goodbye(slow_engine, endpoint, peers):
    async with serving(slow_engine, endpoint):
        peer = peers()
        await peer.hello()
        await peer.ask(generate(1, 240), Accepted)
    assert await peer.hear(Goodbye) == Goodbye("the daemon stops")
    await eventually(lambda: is_at_rest(slow_engine))
