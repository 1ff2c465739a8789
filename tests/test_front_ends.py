"""--api-servers: several front-end processes behind one port, over the same workers."""

import json
import os
import signal
import socket
from contextlib import ExitStack

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
