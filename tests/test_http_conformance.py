"""What OpenAI-style clients rely on and servers get wrong: one named test each, by raw HTTP."""

import json
import re
import uuid

import pytest
from http_cases import PacedDelivery
from http_server import running_server
from tiny_models import tiny_artifact

from furiosa_llm.errors import FuriosaLLMError, QuarantinedError, WorkerDiedError
from furiosa_llm.outputs import CompletionOutput, RequestOutput

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
REASONS = {"stop", "length"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(
        tiny_artifact(tmp_path_factory.mktemp("model")).path, names=("tiny", "tiny-alias")
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def chat(client, **fields):
    return client.post(CHAT, json={"messages": HI, "temperature": 0, "max_tokens": 8} | fields)


def events(answer):
    """The stream's data, [DONE] included."""
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("\n\n")
    parts = answer.text.split("\n\n")[:-1]
    return [part.removeprefix("data: ") for part in parts if not part.startswith(":")]


def chunks(answer):
    found = events(answer)
    assert found[-1] == "[DONE]"
    assert found.count("[DONE]") == 1
    return [json.loads(each) for each in found[:-1]]


def stream(client, **fields):
    return chunks(chat(client, stream=True, **fields))


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


class FailingEngine:
    """The server's engine, which ends requests by what `items` holds."""

    def __init__(self, engine, items):
        self._engine = engine
        self._items = items

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, request):
        for item in self._items:
            request.sink.put(item)

    def drop(self, request):
        pass


def text_output(text, reason=None):
    output = CompletionOutput(0, text, [5], reason)
    return RequestOutput("x", None, [1], [output], reason is not None)


@pytest.fixture
def failing(server, monkeypatch):
    """Let the engine answer a request with these items."""

    def use(*items):
        monkeypatch.setattr(server.service, "delivery", PacedDelivery(server.loop))
        engine = FailingEngine(server.service._engine, items)
        monkeypatch.setattr(server.service, "_engine", engine)

    return use


# --- error bodies ---------------------------------------------------------------------------------


def test_01_errors_are_nested_under_error(client):
    for path in (CHAT, TEXT, "/v1/models/none", "/tokenize", "/nowhere"):
        answer = client.get(path) if "models" in path else client.post(path, json={})
        error_of(answer, answer.status_code)
        assert answer.status_code >= 400


def test_02_parse_failures_have_the_same_shape(client):
    for body in (b"", b"{", b"[]", b"\xff"):
        headers = {"content-type": "application/json"}
        assert error_of(client.post(CHAT, content=body, headers=headers), 400)
    answer = client.post(CHAT, content=b"a=b", headers={"content-type": "text/plain"})
    assert "application/json" in error_of(answer, 415)["message"]


def test_03_code_is_a_string_or_null_and_type_is_openais(client):
    assert error_of(chat(client, max_tokens=10**6), 400)["code"] == "context_length_exceeded"
    assert error_of(chat(client, model="gpt-4"), 404) | {"message": "", "request_id": ""} == {
        "message": "", "type": "not_found_error", "param": "model", "code": "model_not_found",
        "request_id": "",
    }  # fmt: skip
    error = error_of(chat(client, top_p=5), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "x", "content": ""}]}, "messages[1].role"),
        ({"messages": 5}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [1]}, "stop[0]"),
        ({"top_k": -5}, "top_k"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_04_param_names_the_field(client, fields, param):
    assert error_of(chat(client, **fields), 400)["param"] == param


def test_05_statuses_are_openais(client, server):
    assert error_of(client.get(CHAT), 405)["code"] == "method_not_allowed"
    assert error_of(client.post("/v1/nothing"), 404)["code"] == "not_found"
    limit = server.service.limits.max_body_bytes
    with server.connect() as connection:  # refused by its announcement, before it is sent
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % (limit + 1)
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_06_a_prompt_that_is_too_long_is_400_with_both_counts(client):
    long = [{"role": "user", "content": "word " * 300}]
    for fields in ({"messages": long}, {"messages": long, "stream": True}):
        error = error_of(chat(client, **fields), 400)
        assert error["code"] == "context_length_exceeded"
        assert re.findall(r"\d+ tokens", error["message"])[:2] == ["619 tokens", "256 tokens"]
    huge = client.post(TEXT, json={"prompt": "word " * 1_600_000})  # 8 MB
    assert error_of(huge, 400)["code"] == "context_length_exceeded"


def test_07_a_5xx_tells_no_internals_and_forbids_retries_of_poison(client, failing):
    failing(QuarantinedError("request 'x' was running in 2 workers that died: pid 77, SIGSEGV"))
    answer = chat(client)
    error = error_of(answer, 500)
    assert error["type"] == "server_error"
    assert "SIGSEGV" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    failing(FuriosaLLMError("KeyError: 'secret'"))
    assert "secret" not in chat(client).text


def test_07_a_request_that_lost_its_workers_may_be_tried_again(client, failing):
    failing(WorkerDiedError("no worker is left: 6 crashes in 30 s, the last: SIGKILL of pid 77"))
    answer = chat(client)
    error = error_of(answer, 503)
    assert (error["type"], error["code"]) == ("server_error", "worker_died")
    assert "SIGKILL" not in error["message"]
    assert "pid" not in error["message"]
    assert "x-should-retry" not in answer.headers  # OpenAI's clients then do it by themselves
    assert int(answer.headers["retry-after"]) * 1000 == int(answer.headers["retry-after-ms"])


# --- streams --------------------------------------------------------------------------------------


def test_08_first_chunk_has_the_role_and_the_last_is_empty_with_the_reason(client):
    first, *middle, last = stream(client)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert middle
    assert all(set(each["choices"][0]["delta"]) == {"content"} for each in middle)


def test_09_finish_reason_is_null_until_the_end_and_one_of_openais(client):
    *before, last = stream(client)
    assert [each["choices"][0]["finish_reason"] for each in before] == [None] * len(before)
    assert last["choices"][0]["finish_reason"] in REASONS
    assert chat(client).json()["choices"][0]["finish_reason"] in REASONS


def test_10_absent_and_null_are_what_clients_expect(client):
    for chunk in stream(client):
        (choice,) = chunk["choices"]
        assert {"logprobs", "finish_reason"} <= set(choice)
        assert not {"tool_calls", "function_call"} & set(choice["delta"])
        assert choice["delta"].get("role", "assistant") is not None
    message = chat(client).json()["choices"][0]["message"]
    assert set(message) == {"role", "content", "refusal"}


def test_11_the_usage_chunk_comes_only_if_asked_for(client):
    assert all("usage" not in each for each in stream(client))
    *before, last = stream(client, stream_options={"include_usage": True})
    assert [each["usage"] for each in before] == [None] * len(before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert before[-1]["choices"][0]["finish_reason"] == "length"
    assert error_of(chat(client, stream_options={}), 400)["param"] == "stream_options"


def test_12_all_chunks_share_id_created_model_and_fingerprint(client):
    shared = {
        tuple(each[key] for key in ("id", "object", "created", "model", "system_fingerprint"))
        for each in stream(client, model="tiny-alias")
    }
    ((id, object, created, model, fingerprint),) = shared
    assert id.startswith("chatcmpl-")
    assert (object, model) == ("chat.completion.chunk", "tiny-alias")
    assert isinstance(created, int)
    assert fingerprint == chat(client).json()["system_fingerprint"]
    assert client.post(TEXT, json={"prompt": "x"}).json()["id"].startswith("cmpl-")


def test_13_an_error_before_the_first_token_is_a_real_status(client, failing):
    failing(WorkerDiedError("gone"))
    answer = chat(client, stream=True)
    error_of(answer, 503)
    assert answer.headers["content-type"] == "application/json"


def test_14_an_error_in_mid_stream_is_the_last_chunk_and_the_connection_closes(server, failing):
    failing(text_output("one"), WorkerDiedError("gone"))
    body = json.dumps({"messages": HI, "stream": True}).encode()
    wire = server.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )  # returns when the server has closed, though the request asked to keep the connection
    assert wire.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in wire
    assert wire.endswith(b"0\r\n\r\n")  # whole: the error is the stream's last word
    last = json.loads(wire[wire.rindex(b"data: ") + 6 :].split(b"\n")[0])
    assert last["error"]["type"] == "server_error"
    request_id = re.search(rb"x-request-id: (\w+)", wire)[1].decode()
    assert last["error"]["request_id"] == request_id
    assert f"chatcmpl-{request_id}".encode() in wire


def test_14_an_abort_by_the_server_is_an_error_and_no_finish_reason(server, failing):
    failing(text_output("one"), text_output("", "abort"))
    with server.client() as client:
        answer = chat(client, stream=True)
    last = json.loads(events(answer)[-1])
    assert last["error"]["code"] == "service_unavailable"
    assert "abort" not in answer.text
    failing(text_output("one", "abort"))
    with server.client() as client:
        error_of(chat(client), 503)


def test_15_done_comes_once_and_headers_let_proxies_stream(client):
    answer = chat(client, stream=True)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.text.count("[DONE]") == 1
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


def test_16_a_split_character_is_held_until_it_is_whole(client, failing):
    """The engine holds the bytes; nothing is sent for a token that has no text yet."""
    failing(text_output(""), text_output("é"), text_output("", "stop"))
    contents = [each["choices"][0]["delta"].get("content") for each in stream(client)]
    assert contents == ["", "é", None]


def test_16_logprobs_carry_the_raw_bytes(client):
    body = {"prompt": [5, 6], "max_tokens": 40, "temperature": 0, "return_token_ids": True}
    token_ids = client.post(TEXT, json=body).json()["choices"][0]["token_ids"]
    content = chat(client, logprobs=True, max_tokens=40).json()["choices"][0]
    raw = bytes(byte for token in content["logprobs"]["content"] for byte in token["bytes"])
    assert raw.decode("utf-8", "replace") == content["message"]["content"]
    assert len(token_ids) == 40


def test_17_nothing_of_a_stop_string_leaves(client):
    whole = client.post(TEXT, json={"prompt": "hello", "temperature": 0, "max_tokens": 60}).json()
    text = whole["choices"][0]["text"]
    stop = next(text[i : i + 3] for i in range(20, 40) if "\ufffd" not in text[i : i + 3])
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 60, "stop": [stop], "stream": True}
    sent = [each["choices"][0] for each in chunks(client.post(TEXT, json=body))]
    assert "".join(each["text"] for each in sent) == text[: text.index(stop)]
    assert sent[-1]["finish_reason"] == "stop"


# --- tools: refused until they are supported, and by name -----------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "high"},
    ],
)
def test_18_tools_and_what_is_not_supported_are_400_and_say_so(client, fields):
    error = error_of(chat(client, **fields), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == next(iter(fields))
    assert "not" in error["message"]


def test_19_tool_messages_are_refused_where_they_stand(client):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    answer = chat(client, messages=[*HI, call])
    assert error_of(answer, 400)["param"] == "messages[1].tool_calls"


# --- fields and values ----------------------------------------------------------------------------


def test_20_unknown_fields_are_accepted_and_named(client):
    answer = chat(client, zzz=1, aaa=None)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "aaa, zzz"
    assert "x-ignored-params" not in chat(client, user="me", metadata={}).headers
    streamed = chat(client, stream=True, zzz={"deep": [1]})
    assert streamed.headers["x-ignored-params"] == "zzz"
    assert chat(client, **{"é\n,": 1}).headers["x-ignored-params"] == r"\xe9\n\x2c"


def test_21_defaults_are_openais(client):
    text = client.post(TEXT, json={"prompt": "x", "ignore_eos": True}).json()
    assert text["usage"]["completion_tokens"] == 16
    rest = client.post(CHAT, json={"messages": HI, "ignore_eos": True}).json()
    assert rest["usage"]["total_tokens"] == 256
    both = chat(client, max_tokens=9, max_completion_tokens=3).json()
    assert both["usage"]["completion_tokens"] == 3
    error_of(chat(client, max_tokens=0), 400)
    seeded = [chat(client, temperature=1, seed=7).json()["choices"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    error_of(chat(client, logprobs=True, top_logprobs=21), 400)
    assert error_of(chat(client, top_logprobs=3), 400)["param"] == "top_logprobs"
    assert chat(client, stop=["q"] * 16).status_code == 200


def test_21_choices_of_a_stream_interleave_by_index(client):
    found = stream(client, n=3)
    assert {each["choices"][0]["index"] for each in found} == {0, 1, 2}
    roles = [
        each["choices"][0]["index"] for each in found if each["choices"][0]["delta"].get("role")
    ]
    assert roles == [0, 1, 2]
    ends = [each for each in found if each["choices"][0]["finish_reason"]]
    assert len(ends) == 3


def test_22_created_is_an_int_and_usage_has_its_details(client):
    body = chat(client).json()
    assert isinstance(body["created"], int)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert isinstance(usage["prompt_tokens_details"]["cached_tokens"], int)
    assert isinstance(usage["completion_tokens_details"]["reasoning_tokens"], int)


def test_23_the_model_is_the_name_that_was_asked_for(client):
    assert chat(client, model="tiny-alias").json()["model"] == "tiny-alias"
    assert chat(client).json()["model"] == "tiny"
    listed = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["tiny", "tiny-alias"]
    assert client.get("/v1/models/tiny-alias").json()["id"] == "tiny-alias"


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hello", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5], [6, 7], [8]], 3)],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_24_every_prompt_form_with_n_and_echo(client, prompt, count, is_stream):
    body = {"prompt": prompt, "n": 2, "echo": True, "max_tokens": 3, "seed": 1}
    answer = client.post(TEXT, json=body | {"stream": is_stream})
    if is_stream:
        texts = {}
        for chunk in chunks(answer):
            choice = chunk["choices"][0]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        texts = [texts[index] for index in sorted(texts)]
    else:
        assert [each["index"] for each in answer.json()["choices"]] == list(range(2 * count))
        texts = [each["text"] for each in answer.json()["choices"]]
    assert len(texts) == 2 * count
    prompts = prompt if isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(
        prompt[0], str)) else [prompt]  # fmt: skip
    for index, text in enumerate(texts):
        one = prompts[index // 2]
        if not isinstance(one, str):
            one = client.post("/detokenize", json={"tokens": one}).json()["prompt"]
        assert text.startswith(one)


@pytest.mark.parametrize(
    ("method", "path", "status", "right"),
    [
        ("POST", "/v1/chat/completions/", 404, "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", 404, "/v1/chat/completions"),
        ("POST", "/chat/completions", 404, "/v1/chat/completions"),
        ("GET", "/v1/tokenizer_info", 404, "/tokenizer_info"),
        ("GET", "/v1/completions", 405, "POST"),
        ("OPTIONS", "/v1/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
    ],
)
def test_25_wrong_routes_name_the_right_one(client, method, path, status, right):
    error = error_of(client.request(method, path), status)
    assert error["message"].endswith(right) or right in error["message"].split(": ")[1]


def test_25_head_is_get_without_a_body(client):
    got, head = client.get("/v1/models"), client.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


# --- ids ------------------------------------------------------------------------------------------


def test_a_request_id_comes_back_and_a_harmful_one_is_replaced(client):
    answer = client.get("/livez", headers={"x-request-id": "mine-1.2:3_4"})
    assert answer.headers["x-request-id"] == "mine-1.2:3_4"
    for harmful in ("a b", "x" * 129, "é".encode(), "<script>"):
        answer = client.get("/livez", headers={"x-request-id": harmful})
        uuid.UUID(hex=answer.headers["x-request-id"])
    body = {"prompt": "x"}
    answer = client.post(TEXT, json=body, headers={"x-request-id": "mine"})
    assert answer.json()["id"] == "cmpl-mine"


def test_one_request_id_may_be_used_twice_at_a_time(client, server):
    headers = {"x-request-id": "same"}
    body = {"prompt": "x", "stream": True, "max_tokens": 200, "ignore_eos": True}
    with client.stream("POST", TEXT, json=body, headers=headers) as first:
        lines = first.iter_lines()
        next(lines)
        assert client.post(TEXT, json={"prompt": "x"}, headers=headers).status_code == 200
