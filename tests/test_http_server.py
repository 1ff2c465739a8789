"""The HTTP server on its sockets: slow, large, broken and leaving clients; keys, TLS, CORS, uds."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import stat
import subprocess
import threading

import httpx
import pytest
from http_server import running_server
from tiny_models import tiny_artifact

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.http_server import HttpServer
from furiosa_llm.server.limits import Limits
from furiosa_llm.server.metrics_hooks import MetricsHooks

TEXT = "/v1/completions"
ENDLESS = {"prompt": "x", "stream": True, "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


class Recorder(MetricsHooks):
    """Keeps what it is told, and lets a test wait for it."""

    def __init__(self):
        self.calls = []
        self.has_aborted = threading.Event()

    def request_started(self, **facts):
        self.calls.append(("started", facts))

    def finished(self, **facts):
        self.calls.append(("finished", facts))

    def refused(self, **facts):
        self.calls.append(("refused", facts))

    def aborted(self, **facts):
        self.calls.append(("aborted", facts))
        self.has_aborted.set()


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


@pytest.fixture(scope="module")
def server(model, recorder):
    config = HttpConfig(
        port=0,
        header_timeout_s=0.3,
        body_timeout_s=0.3,
        max_header_bytes=8192,
        max_connections=20,
        keep_alive_interval_s=0.05,
    )
    limits = Limits(max_body_bytes=10_000)
    with running_server(model, config=config, limits=limits, metrics=recorder) as server:
        yield server


def request(body, path="/v1/completions", *headers):
    raw = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(raw)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + raw


def read_all(connection):
    received = b""
    while data := connection.recv(1 << 16):
        received += data
    return received


def post(server, path, **options):
    with server.client() as client:
        return client.post(path, **options)


# --- slow clients ---------------------------------------------------------------------------------


def test_a_request_may_come_byte_by_byte(server):
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request({"prompt": "x", "max_tokens": 2}, TEXT, "connection: close"):
            connection.send(bytes([byte]))
        assert read_all(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        pytest.param(b"", b"headers", id="nothing at all"),
        pytest.param(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", b"headers", id="headers"),
        pytest.param(request({"prompt": "x"})[:-3], b"body", id="body"),
    ],
)
def test_what_does_not_come_in_time_ends_that_connection_alone(server, sent, what):
    with server.connect() as slow:
        slow.sendall(sent)
        assert post(server, TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200
        answer = read_all(slow)  # until the server has closed it
    assert answer.startswith(b"HTTP/1.1 408")
    assert what in answer
    assert b"connection: close" in answer


def test_a_dribbler_does_not_move_its_deadline(server):
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        connection.settimeout(0.02)
        for _ in range(200):  # a byte each 20 ms, for at most 4 s
            try:
                if connection.recv(1 << 16):
                    break
            except TimeoutError:
                connection.send(b"x")
        else:
            pytest.fail("the connection is still open")


def test_an_idle_connection_is_kept_between_requests(server):
    with server.client() as client:
        for _ in range(3):
            assert client.get("/livez").status_code == 200
    assert server.http.num_connections <= 2


def test_empty_lines_do_not_keep_a_connection(server):
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.recv(1 << 16)
        connection.sendall(b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_waits_behind_an_earlier_answer_is_not_late(model, monkeypatch):
    """Reading is paused by us then, for longer than the body's own time."""
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "100")
    config = HttpConfig(port=0, body_timeout_s=0.05)
    body = ENDLESS | {"max_tokens": 30}
    with running_server(model, config=config) as server, server.connect() as connection:
        last = request({"prompt": "x", "max_tokens": 1}, TEXT, "connection: close")
        connection.sendall(request(body) + last[:-5])
        connection.recv(1)
        connection.sendall(last[-5:])
        wire = read_all(connection)
    assert wire.count(b"data: [DONE]") == 1
    assert b"HTTP/1.1 408" not in wire
    assert wire.count(b"HTTP/1.1 200") == 1  # the first one's begins with the byte read above


@contextlib.contextmanager
def unread_stream(server):
    """A large stream that is begun and then not read; both sides' buffers are small."""
    server.http._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect(("127.0.0.1", server.port))
        body = ENDLESS | {"logprobs": 20, "n": 8}
        slow.sendall(request(body, TEXT, "connection: close"))
        slow.recv(1)
        yield slow


def test_a_slow_reader_gets_everything_and_holds_only_its_text(model):
    with running_server(model) as server, unread_stream(server) as slow:
        while server.service.engine.status().num_requests:  # the engine goes on without it
            assert post(server, TEXT, json={"prompt": "x", "max_tokens": 5}).status_code == 200
        assert server.service.num_in_flight == 1
        wire = read_all(slow)
    events = [line for line in wire.split(b"\n") if line.startswith(b"data: {")]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    logprobs = [choice["logprobs"]["tokens"] for choice in choices if choice["logprobs"]]
    assert sum(map(len, logprobs)) == 8 * 250
    assert b"data: [DONE]" in wire


def test_a_reader_that_takes_nothing_at_all_is_cut_off(model):
    config = HttpConfig(port=0, write_timeout_s=0.05)
    with running_server(model, config=config) as server, unread_stream(server):
        assert server.run(lambda: server.service.drained(30))


def test_silence_is_broken_by_comments(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "10")
    config = HttpConfig(port=0, keep_alive_interval_s=0.02)
    body = {"prompt": "hello", "temperature": 0, "stream": True, "max_tokens": 3}
    with running_server(model, config=config) as server:
        answer = post(server, TEXT, json=body)
    assert b": ping\n\n" in answer.content
    assert answer.text.startswith("data: ")  # none before the first output
    assert answer.text.endswith("data: [DONE]\n\n")


# --- clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_what_it_held(model, monkeypatch, is_stream):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "100")
    recorder = Recorder()
    with running_server(model, metrics=recorder) as server:
        with server.connect() as connection:
            connection.sendall(request(ENDLESS | {"stream": is_stream}))
            if is_stream:
                connection.recv(1)
            else:
                while not recorder.calls:
                    post(server, "/livez")
        assert recorder.has_aborted.wait(30)
        assert server.run(lambda: server.service.drained(10))
        worker = server.service.engine.status().workers[0]
        while worker.num_free_blocks != worker.num_blocks or worker.num_dispatched:
            post(server, TEXT, json={"prompt": "x", "max_tokens": 1})  # its last step says it
            worker = server.service.engine.status().workers[0]
    assert "finished" not in [name for name, facts in recorder.calls[:2]]


def test_a_client_may_leave_at_any_byte_of_its_request(server):
    whole = request(ENDLESS)
    for end in range(0, len(whole), 7):
        with server.connect() as connection:
            connection.sendall(whole[:end])
    assert post(server, TEXT, json={"prompt": "x"}).status_code == 200
    assert server.run(lambda: server.service.drained(10))


def test_a_client_may_reset_in_mid_stream(server):
    for _ in range(5):
        with server.connect() as connection:
            connection.sendall(request(ENDLESS))
            connection.recv(1)
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert post(server, TEXT, json={"prompt": "x"}).status_code == 200
    assert server.run(lambda: server.service.drained(10))


# --- large and broken requests --------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_whether_announced_or_not(server):
    answer = post(server, TEXT, json={"prompt": "x" * 10_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    pieces = (b"x" * 1000 for _ in range(20))
    headers = {"content-type": "application/json"}
    assert post(server, TEXT, content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"GARBAGE\r\n\r\n", 400, id="no HTTP"),
        pytest.param(
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, id="TLS to a plain port"
        ),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2 preface"),
        pytest.param(b"GET /livez HTTP/1.1\r\nx: " + b"y" * 9000, 431, id="a header too long"),
        pytest.param(b"GET /" + b"y" * 9000, 431, id="a path too long"),
        pytest.param(
            b"POST /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
            b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            id="two lengths",
        ),
        pytest.param(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            400,
            id="a bad chunk",
        ),
        pytest.param(b"GET /livez HTTP/1.1\r\nhost: x\r\nbad header: y\r\n\r\n", 400, id="a name"),
    ],
)
def test_broken_http_is_refused_in_json_and_closed(server, sent, status):
    answer = server.raw(sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert b"content-type: application/json" in head


def test_trailers_are_dropped(server):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    trailers = b"x-request-id: late\r\n" + b"x: y\r\n" * 5000
    wire = server.raw(head + b"connection: close\r\n\r\n" + chunk + trailers + b"\r\n")
    assert wire.startswith(b"HTTP/1.1 200")
    assert b"late" not in wire


def test_pipelined_requests_are_answered_in_order(server):
    first = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    second = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = server.raw(first + second)
    assert answer.index(b"version") < answer.index(b"alive")


def test_more_connections_than_allowed_are_told_so(server):
    open_ones = [server.connect() for _ in range(20)]
    try:
        for connection in open_ones:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        with server.connect() as one_more:
            answer = read_all(one_more)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in answer
    finally:
        for connection in open_ones:
            connection.close()


def test_the_loop_stays_free_while_a_long_prompt_is_tokenised(model):
    """The text thread is held: probes and other requests are answered all the same."""
    gate, is_held = threading.Event(), threading.Event()
    with running_server(model) as server:
        for _ in range(2):  # both text threads

            def hold():
                is_held.set()
                gate.wait(60)

            server.loop.call_soon_threadsafe(
                lambda: asyncio.ensure_future(server.service.in_text_thread(hold))
            )
        assert is_held.wait(30)
        long = threading.Thread(target=post, args=(server, TEXT), kwargs={
            "json": {"prompt": "word " * 1000}})  # fmt: skip
        long.start()
        assert post(server, TEXT, json={"prompt": "x"}).status_code == 200
        with server.client() as client:
            assert client.get("/readyz").status_code == 200
        gate.set()
        long.join()


# --- keys -----------------------------------------------------------------------------------------


def test_keys_guard_all_but_the_probes_and_are_reloaded(model, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst\n second \n")
    environ = {"FURIOSA_SERVE_API_KEY": "third", "FURIOSA_SERVE_API_KEYS": "fourth, fifth"}
    with running_server(model, key_file=file, environ=environ) as server, server.client() as client:
        for path in ("/livez", "/readyz", "/startupz", "/health"):
            assert client.get(path).status_code == 200
        for path in (
            "/v1/models",
            "/tokenizer_info",
            "/version",
            "/metrics",
            "/nothing",
            "//livez",
        ):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second", "third", "fourth", "fifth"):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert client.get("/v1/models", headers=headers).status_code == 200
        for header in (
            "Bearer",
            "Bearer firs",
            "Bearer first2",
            "Basic first",
            "first",
            "Bearer é",
        ):
            headers = {"authorization": header.encode("latin-1")}
            assert client.get("/v1/models", headers=headers).status_code == 401
        file.write_text("sixth\n")
        server.auth.reload()
        assert client.get("/version", headers={"x-api-key": "first"}).status_code == 401
        assert client.get("/version", headers={"x-api-key": "sixth"}).status_code == 200
        file.write_text("# none\n")
        with pytest.raises(InvalidRequestError, match="holds no key"):
            server.auth.reload()
        assert client.get("/version", headers={"x-api-key": "sixth"}).status_code == 200


def test_a_key_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        ApiKeys(tmp_path / "none", {})
    assert not ApiKeys(None, {}).is_required


# --- where it listens -----------------------------------------------------------------------------


def make_certificate(directory, name):
    key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "3650", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def peer_name(port):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as tls:
        certificate = tls.getpeercert(binary_form=True)
        tls.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert tls.recv(12) == b"HTTP/1.1 200"
        return certificate


def test_tls_and_a_certificate_that_is_replaced(model, tmp_path):
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(pair):
        certificate.write_bytes(pair[0].read_bytes())
        key.write_bytes(pair[1].read_bytes())

    def der(pair):
        return ssl.PEM_cert_to_DER_cert(pair[0].read_text())

    install(old)
    config = HttpConfig(port=0, ssl_certfile=str(certificate), ssl_keyfile=str(key))
    with running_server(model, config=config) as server:
        assert server.url.startswith("https://")
        assert peer_name(server.port) == der(old)
        with httpx.Client(verify=ssl.create_default_context(cafile=str(certificate))) as client:
            body = {"prompt": "x", "stream": True, "max_tokens": 3}
            assert client.post(server.url + TEXT, json=body).text.endswith("[DONE]\n\n")
        install(new)
        server.http.reload_certificates()
        assert peer_name(server.port) == der(new)
        key.write_bytes(old[1].read_bytes())  # no pair: the new ones stay
        with pytest.raises(InvalidRequestError, match="cannot be used"):
            server.http.reload_certificates()
        assert peer_name(server.port) == der(new)


def test_a_unix_socket_is_the_owners_alone_and_a_stale_one_is_replaced(model, tmp_path):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    config = HttpConfig(uds=str(path))
    with running_server(model, config=config) as server:
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.post(f"http://x{TEXT}", json={"prompt": "x"}).status_code == 200
        with pytest.raises(InvalidRequestError, match="cannot listen"):
            server.run(HttpServer(lambda *_: None, config).start)
    assert not path.exists()


async def test_a_port_that_is_taken_or_a_host_that_is_not_ours_is_refused_with_advice():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = HttpConfig(port=taken.getsockname()[1])
        with pytest.raises(InvalidRequestError, match="another with --port") as error:
            await HttpServer(lambda *_: None, config).start()
    assert error.value.param == "port"
    with pytest.raises(InvalidRequestError) as error:
        await HttpServer(lambda *_: None, HttpConfig(host="no.such.host.invalid")).start()
    assert error.value.param == "host"


def test_cors_is_off_unless_origins_are_named(server, model):
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with server.client() as client:
        answer = client.options(TEXT, headers=headers)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
    config = HttpConfig(port=0, cors_origins=("https://page.example",))
    with running_server(model, config=config) as open_server, open_server.client() as client:
        allowed = client.options(TEXT, headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other = client.get("/version", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_stopping_cuts_what_does_not_end(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "50")
    with running_server(model) as server, server.connect() as connection:
        connection.sendall(request(ENDLESS))
        connection.recv(1)
        server.run(lambda: server.http.stop(timeout_s=0))
        assert b"[DONE]" not in read_all(connection)
        assert server.run(lambda: server.service.drained(10))
        server.run(server.http.stop)  # once more: nothing
