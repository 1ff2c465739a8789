"""The daemon in processes of its own: start, life, every way it ends, and the commands for that."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
from daemons import (
    NUM_TOKENS,
    SERVE,
    SLOW,
    VERY_SLOW,
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


@contextmanager
def foreground(home, model, *arguments, **env):
    with home.begin("serve", model, *arguments, **env) as process:
        wait_for_line(process, "ready after")
        yield process


# --- background daemons --------------------------------------------------------------------------


def test_a_life(home, model):
    done = home.run("start", model, "--served-model-name", "tiny")
    assert re.fullmatch(
        rf"default \(pid {home.pid()}\) serves tiny at http://127.0.0.1:\d+ and "
        rf"ipc://{home.path}/furiosa-serve/default/socket\n",
        done.stdout,
    )
    assert done.stderr.startswith("listening on http://127.0.0.1:")
    with http(home) as client:
        assert client.get("/readyz").status_code == 200
    pid = home.pid()

    refused = home.run("start", model, expect=3)
    assert f"error: a daemon named default is running already, with pid {pid}" in refused.stderr
    assert home.run("serve", model, expect=3).stderr == refused.stderr

    status = home.run_process("status").stdout
    assert status.startswith("default: ready\n")
    for text in (f"pid       {pid}, up ", "model     tiny", "worker 0  npu:0:0  ready, pid "):
        assert text in status
    found = home.status()
    assert (found["state"], found["pid"], found["model"]) == ("ready", pid, "tiny")
    assert [worker["is_up"] for worker in found["workers"]] == [True]

    log = home.run_process("logs", "-n", "1").stdout
    assert re.fullmatch(r"\S+ \S+ INFO server\.daemon: ready after .+\n", log)

    done = home.run_process("stop")
    assert done.returncode == 0
    assert f"default (pid {pid}) has ended" in done.stderr
    assert has_ended(pid)
    assert home.run("status", expect=3).stdout == "default: not running\n"
    assert home.run("stop").stderr == "default is not running\n"
    assert "stopped" in home.run("logs").stdout
    for command in ("drain", "reload"):
        refused = home.run(command, expect=1).stderr
        assert "error: no daemon named default is running (running: none)" in refused


def test_two_names_live_beside_each_other(home, model):
    home.run("start", model, "--name", "a")
    home.run("start", model, FURIOSA_SERVE_NAME="b")
    assert [home.status(name)["state"] for name in "ab"] == ["ready", "ready"]
    assert home.run("status", "--all").stdout.count(": ready") == 2
    error = home.run("drain", "--name", "c", expect=1).stderr
    assert "no daemon named c is running (running: a, b)" in error
    home.run("stop", "--all")
    assert home.run("status", "--all", expect=3).stdout == "no daemon is running\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "reason"),
    [
        pytest.param(["/nowhere/at/all"], 2, "model '/nowhere/at/all' cannot be used", id="model"),
        pytest.param(["MODEL", "--devices", "npu:7"], 2, "npu:7", id="device"),
        pytest.param(["MODEL", "--port", "PORT"], 2, "--port: cannot listen", id="port"),
        pytest.param(["MODEL", "--host", "192.0.2.1"], 2, "192.0.2.1", id="host"),
        pytest.param(["MODEL", "--api-key-file", "/no/keys"], 2, "/no/keys", id="keys"),
        pytest.param(["MODEL", "--chat-template", "/no/file"], 2, "/no/file", id="template"),
        pytest.param(["MODEL", "--ssl-certfile", "/no/pem"], 2, "/no/pem", id="tls"),
        pytest.param(["MODEL", "--port", "http"], 2, "--port: 'http'", id="option"),
        pytest.param(["MODEL", "--prot", "1"], 2, "--port", id="flag"),
        pytest.param([], 2, "MODEL: there is none", id="nothing"),
    ],
)
def test_a_start_that_fails_gives_the_root_cause(home, model, arguments, exit_code, reason):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        arguments = [{"MODEL": model, "PORT": port}.get(each, each) for each in arguments]
        done = home.run("start", *arguments, expect=exit_code)
    assert reason in done.stderr
    assert done.stdout == ""
    pid = home.file("pid")
    assert not pid.exists() or pid.read_text() == ""


def test_a_daemon_that_is_killed_while_it_starts(home, model):
    """The pipe's end tells, and the log's end says what it can."""
    home.patch(
        "import os, signal\nprint('last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = home.run("start", model, expect=1)
    assert "was ended by signal 9 before it was ready; its last words: last words" in done.stderr


def test_restart_does_the_same_again(home, model, tmp_path):
    """Options, directory and variables are those of the start, not of the restart."""
    os.symlink(model, tmp_path / "linked")
    subprocess.run(
        [*SERVE, "start", "linked", "--max-queue", "5"],
        cwd=tmp_path, env=home.env | {"FURIOSA_SERVE_SERVED_MODEL_NAME": "first"}, check=True,
        capture_output=True,
    )  # fmt: skip
    pid = home.pid()
    done = home.run("restart", FURIOSA_SERVE_SERVED_MODEL_NAME="second")
    assert home.pid() != pid
    assert "serves first at" in done.stdout

    pid = home.pid()
    os.kill(pid, signal.SIGKILL)
    while not has_ended(pid):
        pass
    # Its file says that it runs, its lock says that it does not, and the lock is right.
    assert home.pid() == pid
    assert home.run("status", expect=3).stdout == "default: not running\n"
    assert home.run("stop").stderr == "default is not running\n"
    assert "serves first at" in home.run("restart").stdout  # also when it does not run
    assert home.pid() != pid
    assert home.status()["state"] == "ready"


def test_restart_needs_to_know_how(home, model):
    assert "nobody has started default" in home.run("restart", expect=1).stderr
    home.run("start", model, FURIOSA_SERVE_API_KEY="secret")
    pid = home.pid()
    assert "secret" not in home.file("start.json").read_text()
    error = home.run("restart", expect=2).stderr
    assert "FURIOSA_SERVE_API_KEY held the API keys of default" in error
    assert home.pid() == pid  # one that could not come back as it was is left alone
    home.run("restart", FURIOSA_SERVE_API_KEY="another")
    with http(home) as client:
        assert client.get("/v1/models").status_code == 401
        keys = {"authorization": "Bearer another"}
        assert client.get("/v1/models", headers=keys).status_code == 200


# --- the end of requests --------------------------------------------------------------------------


def test_stop_lets_requests_end_and_refuses_new_ones(home, model):
    home.run("start", model, **SLOW)
    with ExitStack() as stack, streaming(home) as lines:
        stopping = stack.enter_context(home.begin("stop"))
        wait_for_line(stopping, r"1 in flight, at most 30 s")
        with http(home) as client:
            answer = client.post("/v1/completions", json={"model": "x", "prompt": "x"})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert client.get("/readyz").status_code == 503
            assert client.get("/livez").status_code == 200
        assert home.status()["state"] == "draining"
        assert num_tokens(lines) == NUM_TOKENS
        assert (stopping.wait(30), "cut" in stopping.stdout.read()) == (0, False)


def test_stop_cuts_when_the_time_is_over(home, model):
    home.run("start", model, **VERY_SLOW)
    with streaming(home) as lines:
        done = home.run("stop", "--timeout", "100ms", expect=4)
        assert done.stderr.endswith("has ended, requests were cut\n")
        rest = "".join(lines)
    assert "[DONE]" not in rest
    assert '"error"' in rest  # the client is told


def test_drain_stays(home, model):
    home.run("start", model, **SLOW)
    with streaming(home) as lines:
        done = home.run("drain", "--timeout", "1ms", expect=4)
        assert "1 still in flight" in done.stderr
        assert home.status()["state"] == "draining"
        assert num_tokens(lines) == NUM_TOKENS
    assert "default is drained" in home.run("drain").stderr
    assert home.run("status", expect=1).stdout.startswith("default: draining")
    home.run("stop")


def test_a_second_signal_cuts(home, model):
    with foreground(home, model, **VERY_SLOW) as process, streaming(home) as lines:
        process.send_signal(signal.SIGTERM)
        wait_for_line(process, "stopping: draining 1 request, for at most 30 s")
        process.send_signal(signal.SIGTERM)
        rest = "".join(lines)
        wait_for_line(process, "stopped")
        assert process.wait(30) == 4
    assert "[DONE]" not in rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon(home, model, number):
    with foreground(home, model) as process:
        pid = process.pid
        assert home.pid() == pid
        process.send_signal(number)
        wait_for_line(process, "stopped")
        assert process.wait(30) == 0
    assert home.file("pid").read_text() == ""
    assert {path.name for path in home.file("pid").parent.iterdir()} == {"pid"}


def test_the_foreground_is_not_restarted_from_elsewhere(home, model):
    with foreground(home, model):
        start = {"arguments": [], "directory": "/", "environment": {}, "needs_keys": []}
        home.file("start.json").write_text(json.dumps(start))  # of an earlier one
        assert "runs in the foreground" in home.run("restart", expect=1).stderr
        assert home.status()["state"] == "ready"


def test_a_daemon_that_hangs_is_killed(home, model):
    home.run("start", model)
    pid = home.pid()
    os.kill(pid, signal.SIGSTOP)
    # Nothing answers, nothing reacts; the command's patience is shortened, not its steps.
    code = (
        "import sys\n"
        "from furiosa_llm.cli import background\n"
        "from furiosa_llm.server import control_client\n"
        "from furiosa_llm.cli.main import main\n"
        "background.GRACE_S = 0.1\n"
        "control_client.ControlClient.receive.__defaults__ = (0.1,)\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(
        [*command, "status"], env=home.env, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 1
    assert shown.stdout.startswith("default: silent\n")
    done = subprocess.run(
        [*command, "stop", "--timeout", "0"], env=home.env, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "sending SIGKILL" in done.stderr
    assert has_ended(pid)


# --- reload ---------------------------------------------------------------------------------------


def test_reload_reads_keys_again_and_keeps_streams(home, model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    home.run("start", model, "--api-key-file", str(keys))
    with http(home) as client:

        def status_with(key):
            return client.get("/v1/models", headers={"x-api-key": key}).status_code

        assert (status_with("old"), status_with("new")) == (200, 401)
        keys.write_text("new\n")
        done = home.run("reload")
        assert done.stderr.endswith("default is reloaded\n")
        assert (status_with("old"), status_with("new")) == (401, 200)

        keys.write_text("")  # a reload that fails leaves what was in force
        assert "holds no key" in home.run("reload", expect=1).stderr
        assert status_with("new") == 200

        keys.write_text("newer\n")
        os.kill(home.pid(), signal.SIGHUP)
        for line in iter(lambda: home.run("logs", "-n", "1").stdout, ""):
            if "reloaded" in line:
                break
        while status_with("newer") != 200:
            pass


# --- what else a daemon owes ----------------------------------------------------------------------


def test_it_tells_the_service_manager(home, model):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(home.path / "notify"))
        manager.settimeout(30)
        env = {"NOTIFY_SOCKET": str(home.path / "notify"), "WATCHDOG_USEC": "600000"}
        with foreground(home, model, **env) as process:
            messages = []

            def until(text):
                while not messages or text not in messages[-1]:
                    messages.append(manager.recv(4096).decode())

            until("READY=1")
            assert messages[-1] == f"READY=1\nSTATUS=serving {os.path.basename(model)}"
            assert any("EXTEND_TIMEOUT_USEC=" in message for message in messages)
            assert not any("WATCHDOG" in message for message in messages)  # not ready: not watched
            for _ in range(2):
                messages.clear()
                until("WATCHDOG=1")

            # The loop turns, but the workers do not: that is not being alive.
            (worker,) = home.status()["workers"]
            os.kill(worker["pid"], signal.SIGSTOP)
            wait_for_line(process, "the workers do not answer")
            os.kill(worker["pid"], signal.SIGCONT)
            messages.clear()
            until("WATCHDOG=1")

            process.send_signal(signal.SIGTERM)
            until("STOPPING=1")
            assert process.wait(30) == 0


def test_it_ends_when_its_engine_has(home, model):
    """Every worker crashes until it is given up: a service that cannot serve says so and leaves."""
    home.patch(
        "from furiosa_llm.engine.supervisor import RestartPolicy\n"
        "RestartPolicy.__init__.__kwdefaults__['max_crashes'] = 1\n"
    )
    with foreground(home, model) as process:
        killed = set()
        while process.poll() is None:
            found = home.status()
            for worker in found.get("workers", ()):
                pid = worker.get("pid")
                if pid is not None and pid not in killed:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)
        assert process.wait() == 1
        assert "the engine has ended: no worker is left" in process.stdout.read()
    assert len(killed) > 1


def test_a_stop_while_it_starts(home, model):
    """Ctrl-C of a start that takes long: nothing is left."""
    gate = home.path / "gate"
    os.mkfifo(gate)
    home.patch(  # the first word of progress waits at the gate
        "import furiosa_llm.engine.settings as settings\n"
        "resolve = settings.resolve_settings\n"
        "def gated(args, progress, *rest):\n"
        f"    open({str(gate)!r}).read()\n"
        "    progress('passing the gate', 0, 0)\n"
        "    return resolve(args, progress, *rest)\n"
        "settings.resolve_settings = gated\n"
    )
    with home.begin("serve", model) as process:
        wait_for_line(process, "listening on")
        with http(home) as client:
            answer = client.get("/startupz")
            assert (answer.status_code, answer.json()["phase"]) == (503, "loading the model")
        shown = home.run("status", expect=1).stdout
        assert shown.startswith("default: starting (loading the model)\n")
        process.send_signal(signal.SIGTERM)
        wait_for_line(process, "stopping")
        gate.write_text("")
        assert process.wait(30) == 0


def test_logs_follow(home, model):
    log = home.path / "furiosa-serve/default/log"
    assert "there is no log of default" in home.run("logs", expect=1).stderr
    log.write_text("".join(f"line {i}\n" for i in range(200)))
    assert home.run("logs", "-n", "2").stdout == "line 198\nline 199\n"
    assert home.run("logs", "-n", "0").stdout == ""
    assert home.run("logs", "-n", "999").stdout == log.read_text()
    with home.begin("logs", "-f", "-n", "1") as process:
        assert process.stdout.readline() == "line 199\n"
        with log.open("a") as file:
            file.write("more\n")
        assert process.stdout.readline() == "more\n"
        log.rename(log.with_name("log.1"))
        log.write_text("rotated\n")
        assert process.stdout.readline() == "rotated\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
