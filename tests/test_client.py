"""Client and AsyncClient against a daemon's real socket, whatever becomes of either side."""

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
import zmq.auth
from client_daemon import DaemonProcess, eventually, eventually_sync, serving
from engines import async_engine
from tiny_models import tiny_artifact

from furiosa_llm import RequestOutputKind, SamplingParams
from furiosa_llm.client import (
    AsyncClient,
    CannotResumeError,
    Client,
    ClientClosedError,
    CurveKeys,
    DaemonUnreachableError,
    RequestTimeoutError,
)
from furiosa_llm.engine.settings import MOCK_SPEED_VARIABLE
from furiosa_llm.errors import (
    ContextLengthError,
    DuplicateRequestError,
    FuriosaLLMError,
    InvalidRequestError,
    ServiceUnavailableError,
)
from furiosa_llm.server.client_limits import ClientLimits
from furiosa_llm.server.curve import ServerCurve

DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def engine(model):
    with async_engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def slow_engine(model):
    """About 200 tokens a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MOCK_SPEED_VARIABLE, "200")
        engine = async_engine(model)
    with engine:
        yield engine


@pytest.fixture(autouse=True)
def no_second_attempts(monkeypatch):
    """An event of a socket that is missed would be made up for by a later attempt, unseen."""
    monkeypatch.setattr("furiosa_llm.client.connection.ATTEMPT_TIMEOUT_S", 1e6)


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/s"


@pytest.fixture(scope="module")
def daemon(model, tmp_path_factory):
    with DaemonProcess(model, f"ipc://{tmp_path_factory.mktemp('d')}/s") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon):
    with Client(daemon.endpoint) as client:
        yield client


def params(**changed):
    return SamplingParams(**({"max_tokens": 12, "ignore_eos": True, "seed": 3} | changed))


async def expected(engine, prompt, sampling):
    """What the engine itself yields."""
    return [output async for output in engine.generate(prompt, sampling, "expected")]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def token_ids_of(output):
    return [choice.token_ids for choice in output.outputs]


# --- the same as the engine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"n": 3},
        {"logprobs": 2, "n": 2},
        {"temperature": 0.0},
        {"stop": ["e"], "max_tokens": 99},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_outputs_are_those_of_the_engine(engine, endpoint, changed, kind):
    sampling = params(output_kind=kind, **changed)
    whole = (await expected(engine, "the fox", params(output_kind=FINAL, **changed)))[-1]
    async with serving(engine, endpoint), AsyncClient(endpoint) as client:
        outputs = [output async for output in client.stream_generate("the fox", sampling)]
        final = await client.generate("the fox", sampling)
    assert (outputs[-1].finished, final.finished) == (True, True)
    assert final.outputs == whole.outputs
    assert (final.prompt, final.prompt_token_ids) == (whole.prompt, whole.prompt_token_ids)
    if kind is not DELTA:
        assert outputs[-1].outputs == whole.outputs
        assert kind is not FINAL or len(outputs) == 1
        return
    for choice in whole.outputs:
        parts = [p for output in outputs for p in output.outputs if p.index == choice.index]
        assert joined(p.token_ids for p in parts) == choice.token_ids
        assert "".join(p.text for p in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        assert parts[-1].stop_reason == choice.stop_reason
        if choice.logprobs is not None:
            assert joined(p.logprobs for p in parts) == choice.logprobs


def test_prompts_of_every_form(client):
    by_text = client.generate("the fox", params())
    ids = client.tokenize("the fox")
    for prompt in (ids, tuple(ids), {"prompt_token_ids": ids}, {"prompt": "the fox"}):
        assert client.generate(prompt, params()).outputs == by_text.outputs
    assert by_text.prompt == "the fox"
    assert client.generate(ids, params()).prompt is None


def test_a_chat(client):
    messages = [{"role": "user", "content": "hi"}]
    output = client.chat(messages, params())
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    pieces = [o.outputs[0].text for o in client.stream_chat(messages, params(output_kind=DELTA))]
    assert "".join(pieces) == output.outputs[0].text
    going_on = [*messages, {"role": "assistant", "content": "well"}]
    output = client.chat(going_on, params(), continue_final_message=True)
    assert output.prompt.endswith("<|im_start|>assistant\nwell")


def test_a_seed_that_was_not_given_is_drawn_anew_each_time(client):
    drawn = {tuple(client.generate("x", params(seed=None)).outputs[0].token_ids) for _ in range(3)}
    assert len(drawn) == 3


def test_calls(client):
    ids = client.tokenize("the quick fox", add_special_tokens=False)
    assert client.detokenize(ids) == "the quick fox"
    assert client.detokenize([1, *ids], skip_special_tokens=False).startswith("<|im_start|>the")
    status = client.status()
    assert (status.state, status.max_model_len, status.num_in_flight) == ("ready", 256, 0)
    assert status.workers[0]["is_up"]
    assert 0 < client.ping() < 10


@pytest.mark.parametrize(
    ("call", "error", "param"),
    [
        (lambda c: c.generate("x", params(max_tokens=999)), ContextLengthError, "max_tokens"),
        (lambda c: c.generate(""), InvalidRequestError, "prompt"),
        (lambda c: c.generate([]), InvalidRequestError, "prompt"),
        (lambda c: c.generate([10**6]), InvalidRequestError, "prompt_token_ids"),
        (lambda c: c.generate([-1]), InvalidRequestError, "prompt"),
        (lambda c: c.generate(["a", "b"]), InvalidRequestError, "prompt"),
        (lambda c: c.generate(None), InvalidRequestError, "prompt"),
        (lambda c: c.generate({"text": "x"}), InvalidRequestError, "prompt"),
        (lambda c: c.generate("\ud800"), InvalidRequestError, "prompt"),
        (lambda c: c.generate("x" * (17 << 20)), InvalidRequestError, "prompt"),
        (lambda c: c.generate("x", {"n": 2}), InvalidRequestError, "sampling_params"),
        (lambda c: c.generate("x", request_id=""), InvalidRequestError, "request_id"),
        (lambda c: c.generate("x", timeout_s=0), InvalidRequestError, "timeout_s"),
        (lambda c: c.chat("hi"), InvalidRequestError, "messages"),
        (lambda c: c.chat([]), InvalidRequestError, "messages"),
        (lambda c: c.chat([{"role": "x", "content": ""}]), InvalidRequestError, "messages[0].role"),
        (lambda c: c.tokenize(5), InvalidRequestError, "text"),
        (lambda c: c.detokenize("abc"), InvalidRequestError, "token_ids"),
        (lambda c: c.drain(timeout_s=-1), InvalidRequestError, "timeout_s"),
        (lambda c: c.embed("x"), InvalidRequestError, None),
    ],
)
def test_errors_are_those_of_the_engine(client, call, error, param):
    with pytest.raises(error) as caught:
        call(client)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert client.ping()  # and nothing else happened


# --- many at once ---------------------------------------------------------------------------------


def test_one_client_serves_many_threads(client):
    alone = {seed: token_ids_of(client.generate("x", params(seed=seed))) for seed in range(8)}

    def run(index):
        seed = index % 8
        if index % 2:
            return seed, token_ids_of(client.generate("x", params(seed=seed)))
        *_, last = client.stream_generate("x", params(seed=seed))
        return seed, token_ids_of(last)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(run, range(64)))
    assert all(found == alone[seed] for seed, found in results)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("furiosa-client") == 1


async def test_many_streams_share_one_connection(engine, endpoint):
    async with serving(engine, endpoint) as (_, server), AsyncClient(endpoint) as client:
        outputs = await asyncio.gather(
            *(client.generate("x", params(seed=i % 5, max_tokens=50)) for i in range(100))
        )
        assert server.num_clients == 1
    for i, output in enumerate(outputs):
        assert token_ids_of(output) == token_ids_of(outputs[i % 5])


# --- leaving early --------------------------------------------------------------------------------


async def test_leaving_an_iterator_early_aborts(slow_engine, endpoint):
    sampling = params(max_tokens=240)
    async with serving(slow_engine, endpoint) as (service, _), AsyncClient(endpoint) as client:
        async for output in client.stream_generate("x", sampling):
            if output.num_output_tokens > 3:
                break
        await eventually(lambda: service.num_in_flight == 0)
        async with client.stream_generate("x", sampling) as stream:
            await anext(stream)
            assert service.num_in_flight == 1
        await eventually(lambda: service.num_in_flight == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        task = asyncio.create_task(client.generate("x", sampling))
        await eventually(lambda: service.num_in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: service.num_in_flight == 0)
        with pytest.raises(RequestTimeoutError, match=r"has not ended within 0\.05 s") as caught:
            await client.generate("x", sampling, timeout_s=0.05)
        assert isinstance(caught.value, TimeoutError)
        await eventually(lambda: service.num_in_flight == 0)
        assert slow_engine.status().num_requests == 0


def test_leaving_a_blocking_iterator_early_aborts(model, tmp_path):
    sampling = params(max_tokens=240)
    with (
        DaemonProcess(model, f"ipc://{tmp_path}/s", tokens_per_s=200) as daemon,
        Client(daemon.endpoint) as client,
    ):

        def is_idle():
            return client.status().num_in_flight == 0

        for output in client.stream_generate("x", sampling):
            if output.num_output_tokens > 3:
                break
        eventually_sync(is_idle)
        with client.stream_generate("x", sampling) as stream:
            next(stream)
            assert not is_idle()
        eventually_sync(is_idle)
        assert list(stream) == []
        stream = client.stream_generate("x", sampling)
        next(stream)
        del stream
        gc.collect()
        eventually_sync(is_idle)
        with pytest.raises(RequestTimeoutError):
            client.generate("x", sampling, timeout_s=0.05)
        with pytest.raises(RequestTimeoutError):
            list(client.stream_generate("x", sampling, timeout_s=0.05))
        eventually_sync(is_idle)
        stream = client.stream_generate("x", sampling, "by its id")
        next(stream)
        with pytest.raises(DuplicateRequestError):
            client.generate("x", sampling, "by its id")
        client.abort("by its id")
        *_, last = stream
        assert last.outputs[0].finish_reason == "abort"
        assert last.num_output_tokens < 240
        stream = client.stream_generate("x", sampling)
        client.close()
        with pytest.raises(ClientClosedError):
            list(stream)
        with pytest.raises(ClientClosedError):
            client.ping()
        client.close()


async def test_a_slow_reader_costs_its_own_window_and_no_more(engine, endpoint):
    sampling = params(max_tokens=200, output_kind=DELTA)
    async with serving(engine, endpoint) as (_, server), AsyncClient(endpoint) as client:
        slow = client.stream_generate("x", sampling)
        await eventually(lambda: engine.status().num_requests == 0)  # the engine was not held up
        assert (await client.generate("x", sampling)).num_output_tokens == 200
        (session,) = server._sessions.values()
        (waiting,) = session._streams.values()
        assert len(waiting.outgoing._rows) <= 1
        counts = [output.num_output_tokens async for output in slow]
        assert sum(counts) == 200
        assert len(counts) <= 17 + 1
        assert session.num_streams == 0


# --- daemons that are not there, or go ------------------------------------------------------------


def test_a_daemon_that_is_not_there(tmp_path):
    with pytest.raises(DaemonUnreachableError, match="nothing listens there"):
        Client(f"ipc://{tmp_path}/nobody", connect_timeout_s=0.2)
    assert not [t for t in threading.enumerate() if t.name == "furiosa-client" and not t.is_alive()]


def test_a_name_that_no_daemon_has(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(FuriosaLLMError, match="no daemon named nobody is running"):
        Client("nobody")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "not a daemon's name"),
        (None, "not a daemon's name"),
        ("http://x", "neither a daemon's name nor ipc"),
        ("tcp://127.0.0.1:5", "only with keys"),
        ("../x", "not a daemon's name"),
    ],
)
def test_an_address_that_is_none(address, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        Client(address)


async def test_a_service_that_is_not_ready_says_so(engine, endpoint):
    async with serving(engine, endpoint), AsyncClient(endpoint) as client:
        assert await client.drain() == 0
        with pytest.raises(ServiceUnavailableError) as caught:
            await client.generate("x")
        assert caught.value.retry_after > 0
        assert (await client.status()).state == "draining"


@pytest.mark.slow
def test_a_daemon_killed_under_streams_loses_and_changes_no_token(model, tmp_path):
    """The seed is the daemon's own choice: only because it is told can the rest be the same."""
    whole_of = {}
    with (
        DaemonProcess(model, f"ipc://{tmp_path}/s", tokens_per_s=600) as daemon,
        Client(daemon.endpoint) as client,
        client.stream_generate("the fox", params(max_tokens=80, seed=None, logprobs=1)) as one,
        client.stream_generate(
            "the fox", params(max_tokens=80, seed=None, n=3, output_kind=DELTA)
        ) as three,
    ):
        last, parts = next(one), [next(three)]
        for num_tokens in (15, 45):
            while last.num_output_tokens < num_tokens:
                last = next(one)
            daemon.kill()
            daemon.start()
        *_, last = one
        parts += three
        assert client._connection.num_connections == 3
        for stream, changed in ((one, {"logprobs": 1}), (three, {"n": 3})):
            seed = stream._prepared.progress.accepted.seed
            whole_of[stream] = client.generate(
                "the fox", params(max_tokens=80, seed=seed, **changed)
            )
    assert last.outputs == whole_of[one].outputs
    for choice in whole_of[three].outputs:
        mine = [p for output in parts for p in output.outputs if p.index == choice.index]
        assert joined(p.token_ids for p in mine) == choice.token_ids
        assert "".join(p.text for p in mine) == choice.text
        assert [p.finish_reason for p in mine if p.finish_reason] == ["length"]


@pytest.mark.slow
async def test_an_async_stream_goes_on_over_a_restart(slow_engine, endpoint):
    sampling = params(max_tokens=100, output_kind=DELTA)
    whole = (await expected(slow_engine, "x", params(max_tokens=100)))[-1]
    token_ids = []
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        await first.enter_async_context(serving(slow_engine, endpoint))
        client = await stack.enter_async_context(AsyncClient(endpoint))
        answer = asyncio.create_task(client.generate("x", params(max_tokens=100)))
        async for output in client.stream_generate("x", sampling):
            token_ids += output.outputs[0].token_ids
            if len(token_ids) in range(10, 20) and client._connection.num_connections == 1:
                await first.aclose()
                await stack.enter_async_context(serving(slow_engine, endpoint))
        assert token_ids == whole.outputs[0].token_ids
        assert token_ids_of(await answer) == token_ids_of(whole)
        assert client._connection.num_connections == 2


async def test_a_daemon_that_comes_back_with_another_model_ends_the_stream(
    slow_engine, engine, endpoint, monkeypatch
):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        await first.enter_async_context(serving(slow_engine, endpoint))
        client = await stack.enter_async_context(AsyncClient(endpoint))
        stream = client.stream_generate("x", params(max_tokens=240))
        await anext(stream)
        await first.aclose()
        service, _ = await stack.enter_async_context(serving(engine, endpoint))
        service.artifact_id = "another"
        with pytest.raises(CannotResumeError, match="send the request anew"):
            async for _ in stream:
                pass
        assert await client.generate("x", params())  # the client goes on


async def test_a_daemon_that_stays_away_fails_what_waits_for_it(slow_engine, endpoint):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        await first.enter_async_context(serving(slow_engine, endpoint))
        client = AsyncClient(endpoint, reconnect_timeout_s=0.2, connect_timeout_s=0.1)
        await stack.enter_async_context(client)
        stream = client.stream_generate("x", params(max_tokens=240))
        await anext(stream)
        await first.aclose()
        with pytest.raises(DaemonUnreachableError):
            async for _ in stream:
                pass
        with pytest.raises(DaemonUnreachableError):
            await client.ping()
        await stack.enter_async_context(serving(slow_engine, endpoint))
        assert await client.ping()  # it is back, and so are we


@pytest.mark.slow
def test_a_daemon_that_hangs_is_noticed(daemon):
    with Client(daemon.endpoint) as client:
        client._connection._heartbeat_s = 0.1  # what a daemon says in its Welcome
        client._connection._reconnect_timeout_s = 0.3
        os.kill(daemon._process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(DaemonUnreachableError, match=r"fallen silent|does not answer"):
                client.generate("x", params())
        finally:
            os.kill(daemon._process.pid, signal.SIGCONT)
        assert client.generate("x", params())


async def test_a_client_process_that_is_killed_frees_its_blocks(slow_engine, endpoint):
    code = (
        "import sys\nfrom furiosa_llm import SamplingParams\n"
        "from furiosa_llm.client import Client\n"
        "for _ in Client(sys.argv[1]).stream_generate('x', SamplingParams(max_tokens=250)):\n"
        "    print('.', flush=True)\n"
    )
    async with serving(slow_engine, endpoint) as (service, server):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, endpoint, stdout=subprocess.PIPE
        )
        await process.stdout.readline()
        assert service.num_in_flight == 1
        process.kill()
        await process.wait()
        await eventually(lambda: service.num_in_flight == 0 and server.num_clients == 0)
        workers = slow_engine.status().workers
        await eventually(lambda: slow_engine.status().workers[0].num_free_blocks == 256)
        assert workers[0].num_blocks == 256


async def test_heartbeats_keep_a_stream_that_has_nothing_to_say(slow_engine, endpoint):
    limits = ClientLimits(heartbeat_s=0.05)
    async with serving(slow_engine, endpoint, limits=limits), AsyncClient(endpoint) as client:
        output = await client.generate("x", params(max_tokens=100))  # half a second of silence
        assert output.num_output_tokens == 100
        assert client._connection.num_connections == 1


# --- over tcp -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory with the key files of a daemon, of a client it knows and of a stranger."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("daemon", "known", "stranger"):
        zmq.auth.create_certificates(directory, name)
        (directory / f"{name}.key_secret").chmod(0o600)
    (directory / "clients").mkdir()
    (directory / "known.key").rename(directory / "clients" / "known.key")
    return directory


async def test_tcp_with_keys(engine, keys):
    curve = ServerCurve.load(keys / "daemon.key_secret", keys / "clients")
    known = CurveKeys(keys / "daemon.key", keys / "known.key_secret")
    async with serving(engine, "tcp://127.0.0.1:*", curve=curve) as (_, server):
        async with AsyncClient(server.endpoint, curve=known) as client:
            output = await client.generate("x", params(max_tokens=100))
            assert output.num_output_tokens == 100
        as_text = CurveKeys(curve.public_key.decode(), keys / "known.key_secret")
        async with AsyncClient(server.endpoint, curve=as_text) as client:
            assert await client.ping()


async def test_tcp_without_the_right_keys_is_refused(engine, keys):
    curve = ServerCurve.load(keys / "daemon.key_secret", keys / "clients")
    async with serving(engine, "tcp://127.0.0.1:*", curve=curve) as (_, server):
        stranger = CurveKeys(keys / "daemon.key", keys / "stranger.key_secret")
        client = AsyncClient(server.endpoint, curve=stranger, connect_timeout_s=5)
        with pytest.raises(DaemonUnreachableError, match="does not know this client's key"):
            await client.ping()
        await client.close()
        wrong_server = CurveKeys(keys / "stranger.key", keys / "known.key_secret")
        client = AsyncClient(server.endpoint, curve=wrong_server, connect_timeout_s=0.3)
        with pytest.raises(DaemonUnreachableError):
            await client.ping()
        await client.close()
        assert server.num_clients == 0


@pytest.mark.parametrize(
    ("key_file", "clients", "reason"),
    [
        ("nothing", "clients", "cannot be read"),
        ("daemon.key", "clients", "holds no secret key"),
        ("open.key_secret", "clients", "can be read by others"),
        ("daemon.key_secret", "empty", r"holds no \*.key file"),
        ("daemon.key_secret", "nothing", "cannot be read"),
    ],
)
def test_key_files_that_will_not_do(keys, key_file, clients, reason):
    (keys / "empty").mkdir(exist_ok=True)
    (keys / "open.key_secret").write_bytes((keys / "daemon.key_secret").read_bytes())
    (keys / "open.key_secret").chmod(0o644)
    with pytest.raises(InvalidRequestError, match=reason):
        ServerCurve.load(keys / key_file, keys / clients)


@pytest.mark.parametrize(
    ("server_key", "key_file", "reason"),
    [
        ("daemon.key", "daemon.key", "holds no secret key"),
        ("nothing", "known.key_secret", "server_key: .* cannot be read"),
        ("daemon.key", "nothing", "key_file: .* cannot be read"),
    ],
)
def test_keys_of_a_client_that_will_not_do(keys, server_key, key_file, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        Client("tcp://127.0.0.1:5", curve=CurveKeys(keys / server_key, keys / key_file))


# --- lightness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("client", ["asyncio"]), ("async_client", [])],
)
def test_importing_a_client_stays_light(module, unwanted):
    heavy = [
        "numpy", "transformers", "tokenizers", "jinja2", "click", "rich", "starlette", "msgspec",
        "furiosa_llm.engine", "furiosa_llm.text", "furiosa_llm.args", "furiosa_llm.server",
    ]  # fmt: skip
    code = (
        f"import sys, furiosa_llm.client.{module}\n"
        f"print(*[m for m in {heavy + unwanted!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_resolves_every_name():
    import furiosa_llm.client as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense
