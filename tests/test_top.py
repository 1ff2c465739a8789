"""furiosa-serve top: what it makes of a server's status and metrics, and the command itself."""

import asyncio
import io
import math
import signal
import subprocess

import pytest
from daemons import SERVE, make_home
from fake_openai_server import FakeServer, whole
from rich.console import Console
from tiny_models import tiny_artifact

from furiosa_llm.top.history import WINDOW_S, History
from furiosa_llm.top.metrics_text import Buckets, read_histograms
from furiosa_llm.top.reading import reading_of
from furiosa_llm.top.view import frame

PAGE = """\
# HELP furiosa_llm_time_to_first_token_seconds From a request's arrival to its first token.
# TYPE furiosa_llm_time_to_first_token_seconds histogram
furiosa_llm_time_to_first_token_seconds_bucket{engine="frontend",le="0.1",model_name="m"} 2.0
furiosa_llm_time_to_first_token_seconds_bucket{engine="frontend",le="0.2",model_name="m"} 6.0
furiosa_llm_time_to_first_token_seconds_bucket{engine="frontend",le="+Inf",model_name="m"} 8.0
furiosa_llm_time_to_first_token_seconds_bucket{engine="other",le="0.1",model_name="m"} 2.0
furiosa_llm_time_to_first_token_seconds_bucket{engine="other",le="+Inf",model_name="m"} 2.0
furiosa_llm_time_to_first_token_seconds_count{engine="frontend",model_name="m"} 8.0
furiosa_llm_bad_bucket{le="x"} 1
"""


def worker(**changed):
    return {
        "worker_id": 0,
        "devices": "npu:0:0-1",
        "phase": "ready",
        "pid": 11,
        "num_running": 3,
        "num_waiting": 2,
        "num_free_blocks": 25,
        "num_blocks": 100,
        "restarts": [["crash", 1], ["reload", 2]],
        "num_preemptions": 4,
        "num_steps": 100,
        "num_computed_tokens": 2000,
        "num_output_tokens": 1000,
    } | changed


def status(*workers, **changed):
    engine = {"num_waiting": 5, "workers": list(workers)}
    return {
        "state": "ready",
        "phase": "ready",
        "failure": None,
        "model": "SmolLM2",
        "weights": "int8",
        "isa": "avx2",
        "uptime_s": 3700.0,
        "num_in_flight": 12,
        "engine": engine,
    } | changed


def reading(at_s, *workers, page=None, **changed):
    metrics = None if page is None else read_histograms(page)
    said = status(*workers, **changed)
    return reading_of(said, at_s=at_s, where="http://h:1", metrics=metrics)


def shown(history, **keywords):
    console = Console(file=io.StringIO(), width=80)
    console.print(frame(history, **keywords))
    return console.file.getvalue()


# --- metrics -------------------------------------------------------------------------------------


def test_histograms_are_summed_over_labels():
    found = read_histograms(PAGE)
    assert found == {
        "furiosa_llm_time_to_first_token": Buckets({0.1: 4.0, 0.2: 6.0, math.inf: 10.0})
    }


@pytest.mark.parametrize(
    ("share", "value"),
    [(0.0, 0.0), (0.2, 0.05), (0.4, 0.1), (0.5, 0.15), (0.6, 0.2), (0.9, math.inf)],
)
def test_percentiles_of_buckets(share, value):
    buckets = Buckets({0.1: 4.0, 0.2: 6.0, math.inf: 10.0})
    assert buckets.percentile(share) == pytest.approx(value)


def test_an_empty_histogram_has_no_percentile():
    assert math.isnan(Buckets({0.1: 0.0, math.inf: 0.0}).percentile(0.5))


def test_buckets_since():
    before, now = Buckets({0.1: 4.0, math.inf: 4.0}), Buckets({0.1: 4.0, math.inf: 7.0})
    assert now.since(before) == Buckets({0.1: 0.0, math.inf: 3.0})
    assert now.since(None) == now
    assert before.since(now) == before  # the server was restarted, and counts anew


# --- readings ------------------------------------------------------------------------------------


def test_both_shapes_of_a_status_are_read():
    over_http = status(worker(), worker(worker_id=1))
    over_control = status() | {"workers": over_http["engine"]["workers"]}
    del over_control["engine"]["workers"]
    readings = [reading_of(said, at_s=1.0, where="x") for said in (over_http, over_control)]
    assert readings[0] == readings[1]
    assert [w.worker_id for w in readings[0].workers] == [0, 1]
    assert readings[0].workers[0].num_restarts == 3
    assert readings[0].workers[0].num_used_blocks == 75


@pytest.mark.parametrize(
    "said", [{}, {"state": "starting", "engine": None}, {"workers": [{"devices": "npu:0"}]}]
)
def test_a_server_that_says_little_is_shown_all_the_same(said):
    history = History()
    history.add(reading_of(said, at_s=1.0, where="here"))
    assert "here" in shown(history)


def test_rates_are_between_readings():
    history = History()
    history.add(reading(10.0, worker(), worker(worker_id=1)))
    assert history.rate(lambda r: r.num_in_flight) is None
    history.add(
        reading(12.0, worker(num_output_tokens=1100), worker(worker_id=1, num_output_tokens=1300))
    )
    assert history.worker_rate(1, lambda w: w.num_output_tokens) == 150.0
    assert history.rate(lambda r: sum(w.num_output_tokens for w in r.workers)) == 200.0
    history.add(reading(13.0, worker(num_output_tokens=5), worker(worker_id=1)))  # restarted
    assert history.worker_rate(0, lambda w: w.num_output_tokens) == 0.0


def test_the_window_is_bounded():
    history = History()
    for second in range(1000):
        history.add(reading(float(second), worker()))
    assert history.span_s == WINDOW_S
    assert len(history.rates(lambda r: r.num_in_flight)) == WINDOW_S


# --- a frame -------------------------------------------------------------------------------------


def test_a_frame():
    history = History()
    history.add(reading(1.0, worker(), page=PAGE))
    later = PAGE.replace('le="+Inf",model_name="m"} 8.0', 'le="+Inf",model_name="m"} 9.0').replace(
        'le="0.2",model_name="m"} 6.0', 'le="0.2",model_name="m"} 7.0'
    )
    grown = worker(num_output_tokens=1300, num_computed_tokens=2600, num_steps=110)
    history.add(reading(3.0, grown, page=later))
    lines = shown(history).splitlines()
    assert lines[0].strip() == "SmolLM2 int8 avx2  ready  up 1 h 1 min  http://h:1"
    assert "12 in flight; sequences 3 running, 7 waiting" in lines[1]
    assert "150 out, 300 computed" in lines[2]
    assert "last 2 s" in lines[3]
    assert lines[4].split() == ["time", "to", "first", "token", "150.0", "190.0", "199.0", "1"]
    assert lines[-1].split() == [
        *("0", "npu:0:0-1", "ready", "3", "2", "██████░░", "75%"),
        *("150", "300", "5.0", "4", "3"),
    ]


def test_what_is_wrong_is_shown():
    history = History()
    history.add(reading(1.0, worker(phase="down"), state="failed", failure="no memory left"))
    text = shown(history, problem="it cannot be reached")
    for words in ("failed", "no memory left", "out of date: it cannot be reached", "/metrics"):
        assert words in text


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which a daemon with two workers runs and has answered some requests."""
    model = str(tiny_artifact(tmp_path_factory.mktemp("model")).path)
    with make_home(FURIOSA_SERVE_DEVICES="npu:0:0,npu:1:0") as home:
        home.run("start", model)
        home.run(
            *("bench", "--connect", "default", "--num-requests", "3", "--vocab-size", "300"),
            *("--input-len", "6", "--output-len", "5"),
        )
        yield home


@pytest.mark.slow
@pytest.mark.parametrize("way", ["name", "url"])
def test_once(home, way):
    address = home.status()
    where = ["--name", "default"] if way == "name" else ["--base-url", address["http"]]
    out = home.run("top", "--once", "--interval", "0.05", *where).stdout
    assert address["http"] in out
    assert "0 in flight; sequences 0 running, 0 waiting" in out
    assert "time to first token" in out
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [
        ["0", "npu:0:0", "ready"],
        ["1", "npu:1:0", "ready"],
    ]


@pytest.mark.slow
def test_frames_without_a_terminal_until_ctrl_c(home):
    process = subprocess.Popen(
        [*SERVE, "top", "--interval", "0.05", "--name", "default"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=home.env,
    )
    heads = 0
    for line in process.stdout:
        heads += "  ready  up " in line
        if heads == 3:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--name", "nobody"], 1, "no daemon named nobody"),
        (["--base-url", "http://127.0.0.1:1"], 1, "cannot be reached"),
        (["--base-url", "ftp://x"], 2, "--base-url: "),
        (["--interval", "0"], 2, "--interval"),
    ],
)
def test_refusals(home, arguments, code, message):
    assert message in home.run("top", "--once", *arguments, expect=code).stderr


class StatusServer(FakeServer):
    """Answers `/v1/status` as told, and wants a key or not."""

    state = "ready"
    wants_key = False

    async def get(self, path, writer):
        if self.wants_key and self.headers[-1].get("authorization") != "bearer k":
            await whole(writer, 401, {"error": {"message": "a key is needed"}})
        elif path == "/metrics":
            await whole(writer, 200, {})
        else:
            await whole(writer, 200, status(worker(), state=self.state))


async def top(*arguments):
    process = await asyncio.create_subprocess_exec(
        *SERVE, "top", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_key_is_sent(tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("k\n")
    async with StatusServer() as server:
        server.wants_key = True
        arguments = ("--once", "--interval", "0.05", "--base-url", server.url)
        code, _, err = await top(*arguments)
        assert (code, "--api-key-file" in err) == (1, True)
        code, out, _ = await top(*arguments, "--api-key-file", str(key_file))
    assert (code, "12 in flight" in out) == (0, True)


async def test_a_server_that_is_none_of_ours():
    async with FakeServer() as server:
        code, _, err = await top("--once", "--base-url", server.url)
    assert (code, err.count("\n")) == (1, 1)
    assert "is it a server of ours?" in err
