"""The load generator: what it sends, what it counts, and `furiosa-serve bench` as a whole."""

import asyncio
import itertools
import json
import math
import signal
import subprocess

import pytest
from daemons import SERVE, make_home
from fake_openai_server import (
    DONE,
    FakeServer,
    begin_stream,
    chunk,
    end_stream,
    event,
    text_event,
    usage_event,
    whole,
)
from tiny_models import tiny_artifact

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.loadgen.arrivals import due_times
from furiosa_llm.loadgen.event_stream import EventStream
from furiosa_llm.loadgen.http_target import HttpRequests, HttpTarget
from furiosa_llm.loadgen.http_url import HttpUrl
from furiosa_llm.loadgen.prompts import text_prompts, token_id_prompts
from furiosa_llm.loadgen.record import Record
from furiosa_llm.loadgen.run import Extent, Run
from furiosa_llm.loadgen.summary import Latency, Summary
from furiosa_llm.loadgen.table import doubts


def target_of(server, **changed):
    names = ("keep_alive", "timeout_s", "headers")
    of_target = {name: changed.pop(name) for name in names if name in changed}
    requests = {"endpoint": "completions", "model": "m", "max_tokens": 3} | changed
    return HttpTarget(
        HttpUrl.parse("--base-url", server.url), HttpRequests(**requests), **of_target
    )


async def records_of(server, num_requests=1, *, concurrency=1, **changed):
    """Records of a closed loop."""
    target, run = target_of(server, **changed), Run()
    prompts = itertools.repeat([5, 6, 7])
    await run.closed(target, prompts, Extent(num_requests), concurrency=concurrency)
    await target.close()
    return run.records


# --- pure parts ----------------------------------------------------------------------------------


def test_constant_arrivals():
    assert list(itertools.islice(due_times(4, process="constant", seed=0), 4)) == [
        0,
        0.25,
        0.5,
        0.75,
    ]


def test_poisson_arrivals_have_the_rate_and_the_spread():
    times = list(itertools.islice(due_times(50, process="poisson", seed=1), 5001))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1)  # an exponential's own
    assert times == list(itertools.islice(due_times(50, process="poisson", seed=1), 5001))


@pytest.mark.parametrize("make", [token_id_prompts, text_prompts])
def test_prompts_repeat_by_seed_and_by_nothing_else(make):
    def some(seed):
        return list(itertools.islice(make(20, seed=seed), 30))

    assert some(1) == some(1)
    assert not set(map(str, some(1))) & set(map(str, some(2)))
    assert len(set(map(str, some(1)))) == 30
    assert {len(p if isinstance(p, list) else p.split()) for p in some(3)} == {20}


CHAT_ROLE = event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
STREAM = (
    b": keep-alive\n\n"
    + CHAT_ROLE
    + event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    + event({"choices": [{"delta": {"content": 'say "text":"x" and "usage":{}'}}]})
    + text_event('an "error":{"message":"no"} in words\n\n')
    + event({"choices": [{"delta": {"reasoning": "hm"}}]})
    + event({"choices": [{"delta": {}, "finish_reason": "length"}]})
    + usage_event(11, 7)
    + DONE
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, len(STREAM)])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_event_stream_counts_text_however_it_is_cut(size, line_end):
    content = STREAM.replace(b"\n", line_end)
    record = Record(due_s=0.0)
    events = EventStream(record)
    for index, begin in enumerate(range(0, len(content), size)):
        assert not events.is_done
        events.feed(content[begin : begin + size], float(index))
    assert events.is_done
    assert len(record.token_s) == 3
    assert record.token_s == sorted(record.token_s)
    assert (record.num_prompt_tokens, record.num_counted_tokens) == (11, 7)
    assert record.error is None


def test_event_stream_notes_an_error():
    record = Record(due_s=0.0)
    events = EventStream(record)
    events.feed(text_event("a") + event({"error": {"message": "worker died", "code": 500}}), 1.0)
    assert (record.error, record.detail) == ("stream error", "worker died")


def test_event_stream_is_bounded():
    record = Record(due_s=0.0)
    events = EventStream(record)
    for _ in range(6):
        events.feed(b"x" * 2**20, 1.0)
    assert record.error == "bad stream"


def test_latency_percentiles():
    latency = Latency.of([0.4, 0.1, 0.2, 0.3])
    assert (latency.num, latency.p50, latency.max) == (4, pytest.approx(0.25), 0.4)
    assert latency.p90 == pytest.approx(0.37)
    assert math.isnan(Latency.of([]).p99)


def record(due_s, *token_s, end_s=None, **fields):
    return Record(due_s, due_s, list(token_s), end_s or token_s[-1], **fields)


def test_summary_counts_from_the_due_time_and_leaves_failures_out():
    late = record(0.0, 3.0, 4.0, num_prompt_tokens=5, num_counted_tokens=3)
    late.sent_s = 2.0  # the client was late: the caller waited all the same
    quick = record(1.0, 1.5, 2.0, 2.5, num_prompt_tokens=5)
    failed = record(2.0, 2.5, end_s=9.0, error="http 500", detail="no")
    unfinished = Record(3.0)
    summary = Summary.of([late, quick, failed, unfinished], wanted_tokens=3)
    assert (summary.num_requests, summary.num_ok, summary.num_short) == (3, 2, 0)
    assert summary.errors == {"http 500": 1}
    assert summary.error_details == {"http 500": "no"}
    assert (summary.ttft.max, summary.ttft.num) == (3.0, 2)
    assert (summary.itl.num, summary.itl.mean) == (3, pytest.approx(2 / 3))
    assert summary.tpot.mean == pytest.approx(0.5)
    assert (summary.e2e.max, summary.send_lag.max) == (4.0, 2.0)
    assert (summary.num_output_tokens, summary.num_prompt_tokens) == (6, 10)
    assert summary.elapsed_s == 9.0
    assert sum(w.requests_per_s for w in summary.windows) * 0.9 == pytest.approx(2)
    assert ["late" in doubt for doubt in doubts(summary)] == [True]


def test_summary_of_nothing():
    summary = Summary.of([], wanted_tokens=1)
    assert (summary.num_requests, summary.requests_per_s, summary.windows) == (0, 0.0, [])


@pytest.mark.parametrize(
    ("text", "shown", "is_tls"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", False),
        ("localhost:9", "http://localhost:9", False),
        ("http://h/v1", "http://h:80", False),
        ("https://h/a/v1/", "https://h:443/a", True),
        ("http://[::1]:8000", "http://[::1]:8000", False),
    ],
)
def test_url(text, shown, is_tls):
    url = HttpUrl.parse("--base-url", text)
    assert (str(url), url.is_tls) == (shown, is_tls)


@pytest.mark.parametrize("text", ["ftp://h", "http://", "http://h:99999", "http://h?x=1", ""])
def test_bad_url_is_refused(text):
    with pytest.raises(InvalidRequestError, match="--base-url: "):
        HttpUrl.parse("--base-url", text)


@pytest.mark.parametrize("vocab_size", [2, 300, 50_000])
def test_token_ids_stay_in_the_vocabulary(vocab_size):
    prompts = itertools.islice(token_id_prompts(200, seed=0, vocab_size=vocab_size), 5)
    assert all(0 <= token_id < vocab_size for prompt in prompts for token_id in prompt)


# --- over HTTP -----------------------------------------------------------------------------------


async def test_a_streamed_request_and_what_it_asks_for():
    async with FakeServer() as server:
        [ended] = await records_of(server, headers={"Authorization": "Bearer k"})
    assert ended.is_ok
    assert (ended.num_prompt_tokens, ended.num_output_tokens, len(ended.token_s)) == (3, 3, 3)
    assert ended.due_s <= ended.sent_s <= ended.token_s[0] <= ended.token_s[-1] <= ended.end_s
    assert server.bodies == [
        {
            "model": "m",
            "prompt": [5, 6, 7],
            "max_tokens": 3,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert server.paths == ["/v1/completions"]
    assert server.headers[0]["authorization"] == "bearer k"


async def test_chat_and_extra_fields():
    async def answer(body, writer):
        await begin_stream(writer)
        await chunk(writer, CHAT_ROLE + event({"choices": [{"delta": {"content": "hi"}}]}) + DONE)
        await end_stream(writer)

    async with FakeServer(answer) as server:
        target = target_of(server, endpoint="chat", ignore_eos=False, extra={"top_k": 1})
        ended = Record(due_s=0.0)
        await target.send("some words", ended)
        await target.close()
    assert (ended.error, len(ended.token_s)) == (None, 1)
    [body] = server.bodies
    assert body["messages"] == [{"role": "user", "content": "some words"}]
    assert body["top_k"] == 1
    assert "ignore_eos" not in body
    assert server.paths == ["/v1/chat/completions"]


async def test_whole_answers():
    async def answer(body, writer):
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        await whole(writer, 200, {"choices": [{"text": "a b"}], "usage": usage})

    async with FakeServer(answer) as server:
        records = await records_of(server, 3, stream=False)
    assert [(r.is_ok, r.num_output_tokens, len(r.token_s)) for r in records] == [(True, 2, 1)] * 3
    assert server.num_connections == 1
    assert "stream_options" not in server.bodies[0]


async def test_connections_are_used_again_or_not_as_asked():
    async with FakeServer() as server:
        assert all(r.is_ok for r in await records_of(server, 6, concurrency=2))
        assert server.num_connections == 2
        assert all(r.is_ok for r in await records_of(server, 6, concurrency=2, keep_alive=False))
        assert server.num_connections == 2 + 6


async def test_a_server_that_closes_after_each_answer_is_no_error():
    async with FakeServer(closes=True) as server:
        records = await records_of(server, 20, concurrency=2)
    assert [r.error for r in records] == [None] * 20
    assert len(server.bodies) == 20


async def test_closed_loop_holds_its_concurrency():
    gate = asyncio.Event()

    async def answer(body, writer):
        if server.num_open == 5:
            gate.set()
        await gate.wait()
        await server.stream_of_asked_length(body, writer)

    async with FakeServer(answer) as server:
        records = await records_of(server, 12, concurrency=5)
    assert server.max_open == 5
    assert [r.is_ok for r in records] == [True] * 12


async def test_open_loop_sends_whatever_the_server_does():
    """All requests are out before the first one is answered, and their waits are counted."""
    gate = asyncio.Event()

    async def answer(body, writer):
        if server.num_open == 8:
            gate.set()
        await gate.wait()
        await server.stream_of_asked_length(body, writer)

    run = Run()
    async with FakeServer(answer) as server:
        target = target_of(server)
        due = due_times(1000, process="constant", seed=0)
        await run.open(target, itertools.repeat([1]), Extent(8), due)
        await target.close()
    assert server.max_open == 8
    assert [r.due_s - run.begin_s for r in run.records] == pytest.approx(
        [i / 1000 for i in range(8)]
    )
    assert all(r.is_ok and r.sent_s >= r.due_s for r in run.records)


async def test_a_duration_ends_a_run():
    run = Run()
    async with FakeServer() as server:
        target = target_of(server)
        due = due_times(1000, process="constant", seed=0)
        await run.open(target, itertools.repeat([1]), Extent(None, 0.02), due)
        assert len(run.records) == 20
        run = Run()
        await run.closed(target, itertools.repeat([1]), Extent(None, 0.02), concurrency=2)
        assert all(r.due_s < run.begin_s + 0.02 for r in run.records)
        await target.close()
    assert all(r.is_ok for r in run.records)


async def _refuse(body, writer):
    await whole(writer, 429, {"error": {"message": "the queue\nis full"}})


async def _refuse_in_text(body, writer):
    writer.write(b"HTTP/1.1 502 X\r\ncontent-length: 11\r\n\r\nbad gateway")


async def _cut(body, writer):
    await begin_stream(writer)
    await chunk(writer, text_event("a"))
    writer.transport.abort()


async def _end_early(body, writer):
    await begin_stream(writer)
    await chunk(writer, text_event("a"))
    await end_stream(writer)


async def _fail_late(body, writer):
    await begin_stream(writer)
    await chunk(writer, text_event("a") + event({"error": {"message": "it broke"}}))
    writer.close()


async def _garbage(body, writer):
    writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
    await writer.drain()


async def _no_json(body, writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")


async def _hang(body, writer):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (_refuse, "http 429", "the queue is full"),
        (_refuse_in_text, "http 502", "bad gateway"),
        (_cut, "connection lost", ""),
        (_end_early, "stream cut", "[DONE]"),
        (_fail_late, "stream error", "it broke"),
        (_garbage, "bad answer", ""),
        (_no_json, "bad answer", "not a JSON object"),
        (_hang, "timeout", "0.2 s"),
    ],
)
async def test_errors_are_told_apart(answer, error, detail):
    async with FakeServer(answer) as server:
        records = await records_of(
            server, 3, concurrency=3, timeout_s=0.2 if answer is _hang else 9
        )
    assert [r.error for r in records] == [error] * 3
    assert all(detail in r.detail and r.end_s > 0 and not r.is_ok for r in records)


async def test_nobody_listens():
    async with FakeServer() as server:
        pass
    [ended] = await records_of(server)
    assert ended.error == "connect"


# --- the command ---------------------------------------------------------------------------------


async def bench(*arguments):
    """(exit code, standard output, standard error) of the command in its own process."""
    process = await asyncio.create_subprocess_exec(
        *SERVE, "bench", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_command_shows_a_table_and_writes_json(tmp_path):
    file = tmp_path / "out.json"
    async with FakeServer() as server:
        code, out, err = await bench(
            *("--base-url", server.url, "--concurrency", "3", "--num-requests", "9"),
            *("--input-len", "10", "--output-len", "4", "--warm-up", "2", "--json", str(file)),
        )
    assert (code, err) == (0, "")
    assert "the-model at http://127.0.0.1:" in out
    assert "9 answered, 0 failed" in out
    assert "time to first token" in out
    report = json.loads(file.read_text())
    assert report["settings"]["model"] == "the-model"
    results = report["results"]
    assert (results["num_ok"], results["num_output_tokens"], results["num_prompt_tokens"]) == (
        9,
        36,
        90,
    )
    assert results["ttft"]["num"] == 9
    assert results["itl"]["num"] == 27
    assert len(server.bodies) == 11
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 11


async def test_command_shows_failures_and_exits_with_1():
    count = itertools.count()

    async def answer(body, writer):
        if next(count) % 2:
            await _refuse(body, writer)
        else:
            await server.stream_of_asked_length(body, writer)

    async with FakeServer(answer) as server:
        code, out, _ = await bench("--base-url", server.url, "--num-requests", "4", "--json", "-")
    assert code == 1
    results = json.loads(out)["results"]
    assert (results["num_ok"], results["errors"]) == (2, {"http 429": 2})
    assert results["error_details"] == {"http 429": "the queue is full"}


async def test_ctrl_c_shows_the_figures_so_far():
    begun = asyncio.Event()

    async def answer(body, writer):
        if len(server.bodies) == 3:
            begun.set()
            await asyncio.Event().wait()
        await server.stream_of_asked_length(body, writer)

    async with FakeServer(answer) as server:
        process = await asyncio.create_subprocess_exec(
            *SERVE, "bench", "--base-url", server.url, "--warm-up", "0", stdout=subprocess.PIPE
        )
        await begun.wait()
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    assert "2 answered, 0 failed" in out.decode()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base-url", "http://127.0.0.1:1"], 1, "cannot be reached"),
        (["--base-url", "http://127.0.0.1:1", "--model", "m"], 1, "warm it up: connect"),
        (["--base-url", "ftp://x"], 2, "--base-url: "),
        (["--rate", "1", "--concurrency", "2"], 2, "--rate: "),
        (["--connect", "a", "--base-url", "http://x"], 2, "--connect: "),
        (["--endpoint", "chat", "--prompt-form", "ids"], 2, "--prompt-form: "),
        (["--extra-body", "[1]"], 2, "--extra-body: "),
        (["--extra-body", "{"], 2, "--extra-body: "),
    ],
)
async def test_command_says_what_is_wrong(arguments, code, message):
    done = await bench(*arguments)
    assert (done[0], done[1]) == (code, "")
    assert message in done[2]
    assert len(done[2].strip().splitlines()) == 1


# --- against servers of ours ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which a daemon with the mock backend runs."""
    model = str(tiny_artifact(tmp_path_factory.mktemp("model")).path)
    with make_home() as home:
        home.run("start", model)
        yield home


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--endpoint chat", "--no-stream", "--no-keep-alive"])
@pytest.mark.parametrize("way", ["http", "socket"])
def test_a_real_daemon(home, way, options):
    address = home.status()
    where = ["--base-url", address["http"]] if way == "http" else ["--connect", "default"]
    done = home.run(
        *("bench", *where, *options.split(), "--concurrency", "4", "--num-requests", "12"),
        *("--input-len", "6", "--output-len", "5", "--vocab-size", "300", "--json", "-"),
    )
    results = json.loads(done.stdout)["results"]
    assert (results["num_ok"], results["errors"], results["num_short"]) == (12, {}, 0)
    assert results["num_output_tokens"] == 60
    if "chat" not in options:
        assert results["num_prompt_tokens"] == 72
    assert results["ttft"]["num"] == 12
    assert home.status()["num_in_flight"] == 0


@pytest.mark.slow
def test_what_a_real_daemon_refuses_is_counted(home):
    done = home.run(
        *("bench", "--base-url", home.status()["http"], "--warm-up", "0", "--num-requests", "2"),
        *("--input-len", "6", "--output-len", "100000", "--vocab-size", "300"),
        expect=1,
    )
    assert "0 answered, 2 failed" in done.stdout
    assert "http 400" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--connect", "nobody"], 1, "no daemon named nobody"),
        (["--connect", "x://y"], 2, "neither a daemon's name"),
        (["--connect", "default", "--extra-body", '{"nonsense": 1}'], 2, "'nonsense' is no"),
    ],
)
def test_socket_refusals(home, arguments, code, message):
    assert message in home.run("bench", *arguments, expect=code).stderr
