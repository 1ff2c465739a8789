"""--api-servers: several front-end processes behind one port, over the same workers."""

import json
import os
import signal
import socket
from contextlib import ExitStack, suppress

import httpx
import pytest
from daemons import (
    NUM_TOKENS,
    has_ended,
    http,
    make_home,
    num_tokens,
    streaming,
    wait_for_line,
)
from tiny_models import tiny_artifact

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_artifact(tmp_path_factory.mktemp("model")).path)


@pytest.fixture
def home():
    with make_home() as home:
        yield home


def front_end_pids(home):
    return [each["pid"] for each in home.status()["front_ends"]]


def listeners(home):
    """The processes that listen on the daemon's port."""
    address = json.loads(home.file("address.json").read_text())
    port = int(address["http"].rpartition(":")[2])
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file][1:]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}")}
    found = set()
    for pid in [address["pid"], *front_end_pids(home)]:
        links = set()
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                links.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
            except FileNotFoundError:
                continue
        if links & inodes:
            found.add(pid)
    return found


def test_front_ends_share_port_and_workers(home, model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    home.run("start", model, "--api-servers", "3", "--api-key-file", str(keys))
    found = home.status()
    pids = {found["pid"], *front_end_pids(home)}
    assert len(pids) == 3
    assert listeners(home) == pids
    assert "front-end 1, pid " in home.run("status").stdout

    keys.write_text("new\n")  # a reload reaches all
    home.run("reload")
    body = {
        "model": found["model"], "prompt": [5, 6], "max_tokens": 8, "ignore_eos": True, "seed": 1,
    }  # fmt: skip
    texts = set()
    for _ in range(24):  # of which the kernel gives each process some
        with http(home) as client:
            answer = client.post("/v1/completions", json=body, headers={"x-api-key": "new"})
            assert answer.status_code == 200
            texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1
    (worker,) = home.status()["workers"]
    assert worker["num_output_tokens"] == 24 * 8  # one set of workers has made them all
    keys.write_text("")
    assert "holds no key" in home.run("reload", expect=1).stderr

    # They leave with a daemon that is killed.
    port = httpx.URL(found["http"]).port
    os.kill(found["pid"], signal.SIGKILL)
    while not all(map(has_ended, pids)):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_one_that_dies_is_started_again(home, model):
    with home.begin("serve", model, "--api-servers", "2") as process:
        wait_for_line(process, "ready after")
        (pid,) = front_end_pids(home)
        os.kill(pid, signal.SIGKILL)
        wait_for_line(process, f"front-end 1 .pid {pid}. was ended by signal 9")
        while not (now := home.status()["front_ends"])[0]["pid"] or now[0]["pid"] == pid:
            pass
        while len(listeners(home)) != 2:
            pass
        assert now[0]["num_restarts"] == 1
        for _ in range(8):
            with http(home) as client:
                assert client.get("/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def connect_to_all(stack, home):
    """Connections that are kept open, at least one to each of the front-ends."""
    clients = []
    while True:
        clients.append(stack.enter_context(http(home)))
        assert clients[-1].get("/livez").status_code == 200
        found = home.status()
        others = [each["num_connections"] for each in found["front_ends"]]
        if all(others) and found["num_connections"] > sum(others):
            return clients


def samples_of(client):
    """{sample with its labels, as text: value}"""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    rows = (line.rpartition(" ") for line in lines if line.startswith("furiosa_llm_"))
    return {name.removeprefix("furiosa_llm_"): float(value) for name, _, value in rows}


def value(samples, name, *labels):
    (found,) = (
        number
        for sample, number in samples.items()
        if sample.partition("{")[0] == name and all(label in sample for label in labels)
    )
    return found


def test_each_tells_of_all(home, model):
    home.run("start", model, "--api-servers", "2", FURIOSA_SERVE_MOCK_TOKENS_PER_S="50")
    found = home.status()
    body = {"model": found["model"], "prompt": [5, 6], "max_tokens": 2, "ignore_eos": True}
    received = 'endpoint="/v1/completions"'
    with ExitStack() as stack:
        clients = connect_to_all(stack, home)
        num = 3 * len(clients)
        for client in 3 * clients:  # so that each process serves some
            assert client.post("/v1/completions", json=body).status_code == 200
        for client in clients:
            # A process too busy to answer in time is counted as it was when it last did.
            while value(samples := samples_of(client), "requests_received_total", received) != num:
                pass
            assert value(samples, "generation_tokens_total") == 2 * num
            assert value(samples, "e2e_request_latency_seconds_count") == num
            assert value(samples, "queue_time_seconds_count") == num
            steps = value(samples, "worker_steps_total")
            assert value(samples, "step_seconds_count") == steps >= 2 * num
            assert value(samples, "requests_migrated_total", 'reason="death"') == 0
            status = client.get("/v1/status").json()
            assert status["state"] == "ready"
            assert status["created"] == clients[0].get("/v1/status").json()["created"]
            (other,) = status["front_ends"]
            assert (other["index"], other["pid"]) == (1, found["front_ends"][0]["pid"])
            assert status["engine"]["workers"][0]["num_output_tokens"] == 2 * num

        with ExitStack() as streams:  # what runs anywhere is in flight everywhere
            for _ in range(6):
                streams.enter_context(streaming(home))
            for client in clients:
                status = client.get("/v1/status").json()
                while status["num_in_flight"] != 6 or status["engine"]["num_requests"] != 6:
                    status = client.get("/v1/status").json()
                while value(samples_of(client), "requests_in_flight") != 6:
                    pass
            os.kill(status["engine"]["workers"][0]["pid"], signal.SIGKILL)
            migrated = ("requests_migrated_total", 'reason="death"')
            while value(samples_of(clients[0]), *migrated) < 6:  # each process moves its own
                pass
            for client in clients:
                assert value(samples_of(client), *migrated) == 6


def test_counts_outlive_the_process_that_counted(home, model):
    home.run("start", model, "--api-servers", "2")
    body = {"model": home.status()["model"], "prompt": [5], "max_tokens": 2, "ignore_eos": True}
    with ExitStack() as stack:
        clients = connect_to_all(stack, home)
        for client in clients:
            client.post("/v1/completions", json=body).raise_for_status()
        before = samples_of(clients[0])
        (pid,) = front_end_pids(home)
        os.kill(pid, signal.SIGKILL)
    while not (now := front_end_pids(home))[0] or now[0] == pid:
        with http(home) as client, suppress(httpx.TransportError):  # it may reach the dying one
            assert value(samples_of(client), "generation_tokens_total") == 2 * len(clients)
    with ExitStack() as stack:
        for client in connect_to_all(stack, home):
            samples = samples_of(client)
            for name in ("generation_tokens_total", "request_success_total", "abort_total"):
                found = {k: v for k, v in samples.items() if k.startswith(name)}
                assert found == {k: v for k, v in before.items() if k.startswith(name)}
            assert value(samples, "requests_in_flight") == 0


def test_a_stop_lets_the_requests_of_all_end(home, model):
    home.run("start", model, "--api-servers", "2", FURIOSA_SERVE_MOCK_TOKENS_PER_S="500")
    with ExitStack() as stack:
        # The kernel spreads them: all on one front-end is possible, and would show nothing.
        streams = [stack.enter_context(streaming(home)) for _ in range(6)]
        stopping = stack.enter_context(home.begin("stop"))
        assert [num_tokens(each) for each in streams] == [NUM_TOKENS] * 6
        assert stopping.wait(30) == 0
    assert home.status()["state"] == "not running"


def test_a_stop_cuts_the_requests_of_all(home, model):
    home.run("start", model, "--api-servers", "2", FURIOSA_SERVE_MOCK_TOKENS_PER_S="20")
    with ExitStack() as stack:
        streams = [stack.enter_context(streaming(home)) for _ in range(6)]
        assert home.status()["num_in_flight"] == 6
        assert "requests were cut" in home.run("stop", "--timeout", "0", expect=4).stderr
        for lines in streams:
            text = "".join(lines)
            assert '"error"' in text  # the client is told
            assert "[DONE]" not in text


def test_one_that_cannot_start_fails_the_start(home, model):
    home.patch("import os\nos._exit(9)", where="furiosa_llm.server.front_end")
    error = home.run("start", model, "--api-servers", "2", expect=1).stderr
    assert "front-end 1 (pid " in error
    assert "exited with code 9" in error


def test_a_unix_socket_is_not_shared(home, model):
    error = home.run("start", model, "--api-servers", "2", "--uds", "/tmp/x", expect=2).stderr
    assert "--api-servers: 2 processes cannot share the Unix socket /tmp/x" in error
