"""The scripts on real processes, and what they say they would do with --dry-run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from daemons import SERVE, make_home
from tiny_models import make_checkpoint, tiny_artifact

from furiosa_llm.run_dir import RunDir

SCRIPTS = Path(__file__).parent.parent / "scripts"
OF_DAEMONS = (
    "serve-all", "serve-per-device", "rolling-restart", "stop-all", "build-model", "bench-ladder",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_artifact(tmp_path_factory.mktemp("model")).path)


@pytest.fixture
def home(tmp_path):
    with make_home(
        FURIOSA_SERVE_COMMAND=" ".join(SERVE), XDG_CONFIG_HOME=str(tmp_path / "config")
    ) as home:
        for variable in ("DEVICES", "PORT"):  # the scripts say them
            del home.env[f"FURIOSA_SERVE_{variable}"]
        yield home


def script(home, name, *arguments, expect=0, **env):
    """Run a script to its end; both its streams as one text."""
    done = subprocess.run(
        ["bash", SCRIPTS / f"{name}.sh", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        env=home.env | env,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def commands(text):
    """What a script printed that it runs, each without furiosa-serve's own path."""
    prefix = "+ " + " ".join(SERVE) + " "
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


def free_ports(num):
    """The first of so many ports in a row that were free a moment ago."""
    for base in range(20_000, 60_000, 50):
        try:
            for port in range(base, base + num):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


# --- saying what would be done -------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_DAEMONS)
def test_help(home, name):
    text = script(home, name, "--help")
    assert f"scripts/{name}.sh" in text
    assert "--dry-run" in text
    assert "set -euo" not in text
    assert "error: there is no option --nonsense" in script(home, name, "--nonsense", expect=2)


def test_serve_all_over_all_cards(home):
    text = script(home, "serve-all", "m", "--port", "9", "--dry-run", "--", "--weights", "int8")
    assert commands(text) == [
        "start m --name default --port 9 --devices npu:0,npu:1 --weights int8"
    ]
    text = script(home, "serve-all", "m", "--foreground", "--name", "a b", "--dry-run")
    assert commands(text) == [r"serve m --name a\ b --port 8000 --devices npu:0,npu:1"]
    assert "there is no MODEL" in script(home, "serve-all", expect=2)
    assert "not a whole number" in script(home, "serve-all", "m", "--port", "x", expect=2)


@pytest.mark.parametrize(
    ("arguments", "devices"),
    [
        ([], ["npu:0", "npu:1", "npu:2"]),
        (["--per", "pe"], [f"npu:{card}:{pe}" for card in range(3) for pe in range(2)]),
        (["--devices", "npu:0:0-1,npu:1"], ["npu:0:0-1", "npu:1"]),
    ],
)
def test_a_daemon_per_device(home, arguments, devices):
    text = script(
        home, "serve-per-device", "m", "--dry-run", *arguments, FURIOSA_SERVE_TOPOLOGY="3x2"
    )
    assert commands(text) == [
        f"start m --name set-{i} --devices {each} --port {8001 + i}"
        for i, each in enumerate(devices)
    ]
    servers = re.findall(r"server (\S+) max_fails", text)
    assert servers == [f"127.0.0.1:{8001 + i}" for i in range(len(devices))]
    assert not Path(home.env["XDG_CONFIG_HOME"]).exists()  # nothing was written


def test_nothing_is_run_for_a_set_that_is_not_there(home):
    assert "no daemon of the set x is running" in script(
        home, "rolling-restart", "--set", "x", expect=1
    )
    assert script(home, "stop-all") == "no daemon is running\n"
    assert "--set: 'a/b' is not a name" in script(home, "stop-all", "--set", "a/b", expect=2)


def test_what_the_others_would_run(home):
    text = script(home, "build-model", "dir/m.gguf", "/out", "--weights", "int8,int4", "--dry-run")
    assert commands(text) == [
        "build dir/m.gguf /out/m-int8 --weights int8",
        r"generate --model /out/m-int8 --max-tokens 16 The\ quick\ brown\ fox",
        "build dir/m.gguf /out/m-int4 --weights int4",
        r"generate --model /out/m-int4 --max-tokens 16 The\ quick\ brown\ fox",
    ]
    text = script(
        home, "bench-ladder", "--base-url", "http://h", "--concurrency", "1,3", "--out", "o",
        "--dry-run", "--", "--seed", "7",
    )  # fmt: skip
    assert commands(text) == [
        f"bench --base-url http://h --concurrency {n} --num-requests {4 * n} --input-len 128 "
        f"--output-len 128 --json o/rung-{n}.json --seed 7"
        for n in (1, 3)
    ]
    assert "--base-url or --model is needed" in script(home, "bench-ladder", expect=2)
    assert "'int3' is not one of" in script(
        home, "build-model", "m", "o", "--weights", "int3", expect=2
    )


# --- doing it ------------------------------------------------------------------------------------


def test_one_daemon_over_all_devices(home, model):
    port = str(free_ports(1))
    text = script(home, "serve-all", model, "--port", port, "--", "--served-model-name", "tiny")
    assert f"serves tiny at http://127.0.0.1:{port}" in text
    assert [worker["devices"] for worker in home.status()["workers"]] == ["npu:0:0", "npu:1:0"]
    text = script(home, "stop-all", "--timeout", "1s")
    assert commands(text) == ["stop --name default --timeout 1s"]
    assert home.status()["state"] == "not running"


def test_a_set_is_started_restarted_and_stopped(home, model, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.path))
    base = free_ports(3)
    front = ["--base-port", str(base), "--front-port", str(base + 2)]
    text = script(home, "serve-per-device", model, "--set", "s.1", *front)
    assert "2 daemons serve" in text
    with RunDir("s.1-other").lock(), RunDir("sx1-0").lock():  # none of the set
        text = script(home, "stop-all", "--set", "s.1", "--dry-run")
    assert sorted(commands(text)) == ["stop --name s.1-0", "stop --name s.1-1"]
    pids = [home.pid(f"s.1-{i}") for i in range(2)]
    for i in range(2):
        assert httpx.get(f"http://127.0.0.1:{base + i}/readyz").status_code == 200
    conf = Path(home.env["XDG_CONFIG_HOME"]) / "furiosa-serve/s.1.nginx.conf"
    assert f"server 127.0.0.1:{base + 1} max_fails" in conf.read_text()

    assert commands(script(home, "rolling-restart", "--set", "s.1")) == [
        "restart --name s.1-0",
        "restart --name s.1-1",
    ]
    assert not {home.pid(f"s.1-{i}") for i in range(2)} & set(pids)
    for i in range(2):
        assert httpx.get(f"http://127.0.0.1:{base + i}/readyz").status_code == 200

    # One that does not come back ends it: the next keeps serving as it is.
    start = json.loads(home.file("start.json", "s.1-0").read_text())
    start["arguments"].append("--max-queue=x")
    home.file("start.json", "s.1-0").write_text(json.dumps(start))
    pid = home.pid("s.1-1")
    text = script(home, "rolling-restart", "--set", "s.1", expect=2)
    assert "s.1-0 did not come back" in text
    assert home.pid("s.1-1") == pid

    script(home, "stop-all", "--set", "s.1")
    assert home.status("s.1-1")["state"] == "not running"


def test_a_set_that_cannot_start_leaves_nothing(home, model):
    base = free_ports(2)
    with socket.create_server(("127.0.0.1", base + 1)):
        text = script(home, "serve-per-device", model, "--base-port", str(base), expect=2)
    assert f"cannot listen on 127.0.0.1:{base + 1}" in text
    assert json.loads(home.run("status", "--all", "--json", expect=3).stdout) == []


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_in_front_of_unix_sockets(home, model, tmp_path):
    front = str(free_ports(1))
    script(
        home, "serve-per-device", model, "--unix", str(home.path / "http"), "--front-port", front,
        "--nginx-conf", str(tmp_path / "nginx.conf"),
    )  # fmt: skip
    command = ["nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
    with subprocess.Popen(command, env=home.env) as nginx:
        try:
            transport = httpx.HTTPTransport(retries=10)  # of connecting: it may not listen yet
            with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{front}") as client:
                body = {"model": "llama-fp32", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200
                home.run("stop", "--name", "set-0")
                home.run("drain", "--name", "set-1")
                assert client.post("/v1/completions", json=body).status_code in (502, 503)
                home.run("stop", "--name", "set-1")
                home.run("restart", "--name", "set-0")
                answers = {client.post("/v1/completions", json=body).status_code for _ in range(4)}
                assert answers == {200}  # set-1 is down, and nobody notices
        finally:
            nginx.terminate()


def test_build_model(home, tmp_path):
    make_checkpoint(tmp_path / "tiny")
    arguments = [str(tmp_path / "tiny/"), str(tmp_path / "out"), "--weights", "int8,fp32"]
    script(home, "build-model", *arguments)
    for kind in ("int8", "fp32"):
        manifest = json.loads((tmp_path / f"out/tiny-{kind}/artifact.json").read_text())
        assert manifest["weights"] == kind
    text = script(home, "build-model", *arguments, "--no-check")  # again: nothing is left to do
    assert text.count("is there already") == 2
    assert commands(text) == []


def test_bench_ladder(home, model, tmp_path):
    text = script(
        home, "bench-ladder", "--model", model, "--concurrency", "1,4", "--requests-per", "2",
        "--input-len", "8", "--output-len", "4", "--out", str(tmp_path / "out"),
        "--", "--vocab-size", "300",
    )  # fmt: skip
    for n in (1, 4):
        assert (tmp_path / f"out/rung-{n}.txt").read_text()
        assert json.loads((tmp_path / f"out/rung-{n}.json").read_text())
    assert "has ended" in text
    assert json.loads(home.run("status", "--all", "--json", expect=3).stdout) == []


def test_scripts_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    names = [str(SCRIPTS / f"{name}.sh") for name in (*OF_DAEMONS, "daemons")]
    done = subprocess.run([shellcheck, "-x", *names], cwd=SCRIPTS.parent, capture_output=True)
    assert done.stdout == b""
    for name in OF_DAEMONS:
        assert os.access(SCRIPTS / f"{name}.sh", os.X_OK)
