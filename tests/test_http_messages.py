"""Anthropic's /v1/messages: its events in their order, its errors, and its own client on it."""

import json

import anthropic
import pytest
from conftest import SMOLLM2
from http_server import running_server
from tiny_models import tiny_artifact

from furiosa_llm.server.anthropic_request import UNSUPPORTED

ASKED = {
    "model": SMOLLM2,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "In which city is the Eiffel Tower?"}],
    "extra_body": {"temperature": 0},  # newer clients have no argument for it
}
HELLO = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
EVENT_ORDER = [
    "message_start",
    "content_block_start",
    "ping",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny_artifact(tmp_path_factory.mktemp("model")).path
    with running_server(model) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def smollm2(smollm2_artifact):
    path = smollm2_artifact("int8").path
    with (
        running_server(path, names=(SMOLLM2,), backend="native", max_model_len=512) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        yield client


def request(**changed):
    return HELLO | {"temperature": 0} | changed


def create(http, **changed):
    answer = http.post("/v1/messages", json=request(**changed))
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return answer.json()


def error_of(answer):
    """The error of an answer in Anthropic's shape."""
    body = answer.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]
    return body["error"]


def events_in(text):
    """[(event, data)] of a stream's text."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    return events


def without_repeats(names):
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def chat(http, messages, **body):
    """The text that /v1/chat/completions answers, and its prompt's length."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0} | body
    answer = http.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


# --- whole ----------------------------------------------------------------------------------------


def test_anthropics_client_gets_a_message(smollm2):
    message = smollm2.messages.create(**ASKED, max_tokens=60)
    assert "Paris" in message.content[0].text
    assert (message.type, message.role, message.model) == ("message", "assistant", SMOLLM2)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    assert message._request_id == message.id.removeprefix("msg_")
    count = smollm2.messages.count_tokens(
        **{name: ASKED[name] for name in ("model", "system", "messages")}
    )
    assert message.usage.input_tokens == count.input_tokens
    assert 0 < message.usage.output_tokens < 60
    assert message.usage.cache_read_input_tokens == message.usage.cache_creation_input_tokens == 0


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        pytest.param({}, [("user", "Hello")], id="a string"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
            [("user", "Hello")],
            id="a block",
        ),
        pytest.param(
            {
                "system": [
                    {"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "kind."},
                ]
            },
            [("system", "Be kind."), ("user", "Hello")],
            id="a system prompt of blocks",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": "One"},
                    {"role": "user", "content": "Two"},
                    {"role": "assistant", "content": "Three"},
                    {"role": "user", "content": "Four"},
                ]
            },
            [("user", "One\nTwo"), ("assistant", "Three"), ("user", "Four")],
            id="turns of one role are joined",
        ),
    ],
)
def test_it_is_the_chat_that_it_stands_for(http, changed, messages):
    text, num_tokens = chat(http, [{"role": role, "content": text} for role, text in messages])
    message = create(http, **changed)
    assert message["content"] == [{"type": "text", "text": text}]
    assert message["usage"]["input_tokens"] == num_tokens


def test_the_answer_goes_on_with_a_last_turn_of_the_assistant(http):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The sea"}]
    text, num_tokens = chat(http, turns, continue_final_message=True)
    message = create(http, messages=turns)
    assert message["content"][0]["text"] == text
    assert message["usage"]["input_tokens"] == num_tokens


def test_why_it_stopped(smollm2):
    whole = smollm2.messages.create(**ASKED, max_tokens=60).content[0].text
    word = whole.split()[2]
    cut = smollm2.messages.create(**ASKED, max_tokens=60, stop_sequences=["§", word])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word)
    assert cut.content[0].text == whole[: whole.index(word)]
    short = smollm2.messages.create(**ASKED, max_tokens=3)
    assert (short.stop_reason, short.stop_sequence) == ("max_tokens", None)
    assert short.usage.output_tokens == 3


def test_an_answer_may_take_what_the_context_has_room_for(http):
    message = create(http, max_tokens=100_000)
    assert message["stop_reason"] == "model_context_window_exceeded"
    usage = message["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == 256


def test_headers_and_hints_of_clients_are_no_errors(http):
    answer = http.post(
        "/v1/messages?beta=true",
        headers={"anthropic-version": "2023-06-01", "anthropic-beta": "some-beta"},
        json=request(metadata={"user_id": "u"}, service_tier="auto", thinking={"type": "disabled"},
                     tools=[], colour="red"),
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-params"] == "colour"


# --- streams --------------------------------------------------------------------------------------


def test_events_come_in_their_order(http):
    whole = create(http)
    answer = http.post("/v1/messages", json=request(stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    events = events_in(answer.text)
    assert without_repeats([name for name, _ in events]) == EVENT_ORDER
    by_name = dict(events)
    started = by_name["message_start"]["message"]
    assert started["content"] == []
    assert started["stop_reason"] is started["stop_sequence"] is None
    assert started["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert by_name["content_block_start"] == {
        "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}
    }  # fmt: skip
    deltas = [data for name, data in events if name == "content_block_delta"]
    assert {data["delta"]["type"] for data in deltas} == {"text_delta"}
    assert "".join(data["delta"]["text"] for data in deltas) == whole["content"][0]["text"]
    assert by_name["message_delta"]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert by_name["message_delta"]["usage"] == whole["usage"]


def test_anthropics_client_reads_the_stream(smollm2):
    whole = smollm2.messages.create(**ASKED, max_tokens=60)
    with smollm2.messages.stream(**ASKED, max_tokens=60) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == "end_turn"
    assert final.usage == whole.usage

    word = text.split()[2]
    with smollm2.messages.stream(**ASKED, max_tokens=60, stop_sequences=[word]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", word)
    assert final.content[0].text == text[: text.index(word)]


def test_a_stream_that_breaks_ends_by_an_error_that_its_client_raises(tmp_path):
    model = tiny_artifact(tmp_path, max_position_embeddings=16384).path
    with (
        running_server(model, paged_attention_num_blocks=2048) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        stream = client.messages.create(**HELLO | {"max_tokens": 16000}, stream=True)
        events = [next(stream)]
        server.run(lambda: server.service.engine_or_none.shutdown())
        with pytest.raises(anthropic.APIStatusError) as raised:
            events += stream
    assert raised.value.body["error"]["type"] == "overloaded_error"
    assert raised.value.body["request_id"] == raised.value.response.headers["request-id"]
    assert "message_stop" not in [event.type for event in events]


# --- what is refused ------------------------------------------------------------------------------

MEANT = {
    "tools": [{"name": "t", "input_schema": {}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "container": "c",
    "mcp_servers": [{"type": "url"}],
    "context_management": {"edits": []},
    "output_config": {"effort": "high"},
    "output_format": {"type": "json_schema"},
    "speed": "fast",
    "service_tier": "priority",
    "stop": ["x"],
    "n": 2,
    "max_completion_tokens": 5,
}


def test_every_unsupported_field_has_a_case():
    assert MEANT.keys() == UNSUPPORTED.keys()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("field", "value"), MEANT.items())
def test_what_is_known_and_unsupported_is_refused_by_name(http, path, field, value):
    answer = http.post(path, json=request(**{field: value}))
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["message"].startswith(f"{field}: ")


def block(**fields):
    return [{"role": "user", "content": [fields]}]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        pytest.param({"max_tokens": None}, "max_tokens", id="no bound of tokens"),
        pytest.param({"max_tokens": 0}, "max_tokens", id="no tokens"),
        pytest.param({"messages": []}, "messages", id="no message"),
        pytest.param(
            {"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", id="a role"
        ),
        pytest.param({"messages": [{"role": "user"}]}, "messages[0].content", id="no content"),
        pytest.param(
            {"messages": block(type="image", source={})}, "messages[0].content[0].type", id="image"
        ),
        pytest.param(
            {"messages": block(type="tool_result", tool_use_id="t")},
            "messages[0].content[0].type",
            id="a tool's result",
        ),
        pytest.param(
            {"messages": block(type="thinking", thinking="")},
            "messages[0].content[0].type",
            id="thinking",
        ),
        pytest.param({"messages": block(type="text")}, "messages[0].content[0].text", id="no text"),
        pytest.param({"system": [{"type": "image"}]}, "system[0].type", id="system image"),
        pytest.param({"stop_sequences": ["x"] * 99}, "stop_sequences", id="too many stops"),
        pytest.param({"temperature": -1}, "temperature", id="below the range"),
        pytest.param(
            {"messages": [{"role": "user", "content": "x " * 999}]}, "messages", id="too long"
        ),
    ],
)
def test_what_is_wrong_is_named(http, changed, param):
    answer = http.post("/v1/messages", json=request(**changed))
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_without_max_tokens_it_is_missing(http):
    body = request()
    del body["max_tokens"]
    error = error_of(http.post("/v1/messages", json=body))
    assert error["message"] == "max_tokens: it is required"
    assert http.post("/v1/messages/count_tokens", json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        pytest.param("GET", "/v1/messages", b"", 405, "invalid_request_error", id="method"),
        pytest.param("POST", "/v1/messages/x", b"{}", 404, "not_found_error", id="path"),
        pytest.param("POST", "/v1/messages", b"{", 400, "invalid_request_error", id="JSON"),
        pytest.param(
            "POST",
            "/v1/messages",
            json.dumps(request(model="claude")).encode(),
            404,
            "not_found_error",
            id="model",
        ),
    ],
)
def test_every_error_has_anthropics_shape(http, method, path, body, status, kind):
    answer = http.request(method, path, content=body)
    assert answer.status_code == status
    assert error_of(answer)["type"] == kind


def test_its_client_shows_its_key_and_is_refused_without(server, tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("right\n")
    path = server.service._args.model
    with running_server(path, key_file=key_file) as server:
        for key, is_right in (("right", True), ("wrong", False)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as client:
                if is_right:
                    assert client.messages.create(**HELLO).content
                    continue
                with pytest.raises(anthropic.AuthenticationError) as raised:
                    client.messages.create(**HELLO)
                assert raised.value.body["error"]["type"] == "authentication_error"


def test_a_server_that_starts_is_overloaded(server):
    with running_server(server.service._args.model, is_started=False) as starting:
        with starting.client() as client:
            answer = client.post("/v1/messages", json=request())
        assert answer.status_code == 503
        assert error_of(answer)["type"] == "overloaded_error"
        assert int(answer.headers["retry-after"]) > 0
