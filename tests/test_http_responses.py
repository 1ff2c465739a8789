"""POST /v1/responses: its events in their order, its statelessness, and OpenAI's client on it."""

import json

import openai
import pytest
from conftest import SMOLLM2
from http_server import running_server
from tiny_models import tiny_artifact

from furiosa_llm.server.responses_request import UNSUPPORTED
from furiosa_llm.server.truncation import prompt_within

QUESTION = "In which city is the Eiffel Tower?"
ASKED = {"model": SMOLLM2, "instructions": "Be brief.", "input": QUESTION, "temperature": 0}
EVENT_ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
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
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def create(http, **body):
    answer = http.post("/v1/responses", json={"max_output_tokens": 8, "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http, **body):
    """The error that a request with these fields is answered by."""
    answer = http.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 4} | body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def events_in(text):
    """[(event, data)] of a stream's text."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert name.startswith("event: ")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def stream(http, **body):
    answer = http.post(
        "/v1/responses", json={"max_output_tokens": 8, "temperature": 0, "stream": True} | body
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_in(answer.text)


def without_repeats(names):
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


# --- whole ----------------------------------------------------------------------------------------


def test_the_answer_is_that_of_a_chat(smollm2):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = smollm2.chat.completions.create(
        model=SMOLLM2, messages=messages, temperature=0, max_tokens=60
    )
    response = smollm2.responses.create(**ASKED, max_output_tokens=60)
    assert response.output_text == chat.choices[0].message.content
    assert "Paris" in response.output_text
    assert response.status == "completed"
    assert response.error is response.incomplete_details is None
    assert response.id.startswith("resp_")
    assert response.model == SMOLLM2
    assert response.instructions == "Be brief."
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    [item] = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")


def test_an_answer_that_is_cut_is_incomplete(http):
    response = create(http, input="Hello", max_output_tokens=3)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 3
    assert response["completed_at"] is None


def test_the_reply_says_what_held_for_it(http):
    response = create(
        http, input="Hello", metadata={"a": "b"}, user="u", temperature=0.5, top_p=0.9,
        safety_identifier="s", prompt_cache_key="k", parallel_tool_calls=False,
        text={"format": {"type": "text"}},
    )  # fmt: skip
    expected = {
        "object": "response",
        "background": False,
        "metadata": {"a": "b"},
        "user": "u",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 8,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        "service_tier": "default",
    }
    assert {name: response[name] for name in expected} == expected


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([{"role": "user", "content": "Hello"}], id="an easy message"),
        pytest.param(
            [{"type": "message", "role": "user", "content": "Hello"}], id="a message with its type"
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}], id="a part"
        ),
        pytest.param(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Hel"},
                        {"type": "input_text", "text": "lo"},
                    ],
                }
            ],
            id="two parts",
        ),
    ],
)
def test_forms_of_one_input_give_one_answer(http, given):
    text = create(http, input="Hello")["output"][0]["content"][0]["text"]
    assert create(http, input=given)["output"][0]["content"][0]["text"] == text


def test_the_last_output_can_be_part_of_the_next_input(http):
    first = create(http, input="Hello")
    conversation = [
        {"role": "user", "content": "Hello"},
        *first["output"],
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Go on"},
    ]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first["output"][0]["content"][0]["text"]},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Go on"},
    ]
    chat = http.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 8, "temperature": 0}
    ).json()
    second = create(http, input=conversation)
    assert second["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert second["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_logprobs_come_where_they_are_included(http):
    response = create(
        http, input="Hello", include=["message.output_text.logprobs"], top_logprobs=1,
        max_output_tokens=4,
    )  # fmt: skip
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 4
    assert set(logprobs[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert create(http, input="Hello")["output"][0]["content"][0]["logprobs"] == []


def test_an_unknown_field_is_named(http):
    answer = http.post(
        "/v1/responses", json={"input": "Hello", "max_output_tokens": 2, "colour": "red"}
    )
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "colour"


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{}, {"include": ["message.output_text.logprobs"]}])
def test_events_come_in_their_order(http, body):
    whole = create(http, input="Hello", **body)
    events = stream(http, input="Hello", **body)
    names = [name for name, _ in events]
    assert without_repeats(names) == [*EVENT_ORDER, "response.incomplete"]
    assert [data["type"] for _, data in events] == names
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    by_name = dict(events)
    item_id = whole["output"][0]["id"]
    text = whole["output"][0]["content"][0]["text"]
    logprobs = whole["output"][0]["content"][0]["logprobs"]

    created = by_name["response.created"]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert by_name["response.output_item.added"]["item"]["content"] == []
    assert by_name["response.output_item.added"]["item"]["status"] == "in_progress"
    assert by_name["response.content_part.added"]["part"]["text"] == ""
    deltas = [data for name, data in events if name == "response.output_text.delta"]
    assert "".join(data["delta"] for data in deltas) == text
    assert [each for data in deltas for each in data["logprobs"]] == logprobs
    for name in EVENT_ORDER[3:7]:
        place = {key: by_name[name][key] for key in ("output_index", "content_index")}
        assert place == {"output_index": 0, "content_index": 0}
        assert by_name[name]["item_id"].startswith("msg_")
    assert by_name["response.output_text.done"]["text"] == text
    assert by_name["response.content_part.done"]["part"]["text"] == text
    last = by_name["response.incomplete"]["response"]
    assert by_name["response.output_item.done"]["item"] == last["output"][0]
    assert last["output"][0] == whole["output"][0] | {"id": last["output"][0]["id"]}
    assert last["usage"] == whole["usage"]
    assert item_id != last["output"][0]["id"]


def test_openais_client_reads_the_stream(smollm2):
    asked = {**ASKED, "max_output_tokens": 60}
    whole = smollm2.responses.create(**asked)
    events = list(smollm2.responses.create(**asked, stream=True))
    assert without_repeats([event.type for event in events]) == [*EVENT_ORDER, "response.completed"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage

    with smollm2.responses.stream(**asked) as accumulated:
        assert accumulated.get_final_response().output_text == whole.output_text


def test_a_stop_string_completes_a_response(smollm2):
    cut = smollm2.responses.create(**ASKED, max_output_tokens=20, extra_body={"stop": " Paris"})
    assert cut.status == "completed"
    whole = smollm2.responses.create(**ASKED, max_output_tokens=20)
    assert whole.output_text.startswith(cut.output_text + " Paris")


def test_a_stream_that_breaks_ends_by_response_failed_and_a_closed_connection(tmp_path):
    model = tiny_artifact(tmp_path, max_position_embeddings=16384).path
    body = {"input": "Hello", "stream": True, "ignore_eos": True}
    with (
        running_server(model, paged_attention_num_blocks=2048) as server,
        server.client() as http,
        http.stream("POST", "/v1/responses", json=body) as answer,
    ):
        pieces = answer.iter_text()
        text = next(pieces)
        server.run(lambda: server.service.engine_or_none.shutdown())
        text += "".join(pieces)
        request_id = answer.headers["x-request-id"]
    events = events_in(text)
    assert "response.output_text.done" not in dict(events)
    name, data = events[-1]
    assert name == "response.failed"
    assert data["sequence_number"] == len(events) - 1
    response = data["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert request_id in response["error"]["message"]
    assert response["output"][0]["content"][0]["text"] == "".join(
        data["delta"] for name, data in events if name == "response.output_text.delta"
    )


# --- what is refused ------------------------------------------------------------------------------

MEANT = {
    "store": True,
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "prompt": {"id": "p"},
    "background": True,
    "reasoning": {"effort": "high"},
    "max_tool_calls": 2,
    "context_management": [{"type": "compaction"}],
    "moderation": {"model": "m"},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "messages": [{"role": "user", "content": "Hello"}],
    "response_format": {"type": "json_object"},
    "n": 2,
    "best_of": 2,
}


def test_every_unsupported_field_has_a_case():
    assert MEANT.keys() == UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *MEANT.items(),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", "required"),
        ("service_tier", "flex"),
    ],
)
def test_what_is_known_and_unsupported_is_refused_by_name(http, field, value):
    error = refused(http, **{field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert error["message"].startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "value"), [(name, each) for name, row in UNSUPPORTED.items() for each in row[0]]
)
def test_a_value_that_asks_for_nothing_is_no_error(http, field, value):
    answer = create(http, input="Hello", **{field: value})
    assert answer["store"] is False


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        pytest.param({"input": []}, "input", id="no message"),
        pytest.param({"input": 5}, "input", id="input of another type"),
        pytest.param({"input": None}, "input", id="no input"),
        pytest.param({"input": [{"content": "x"}]}, "input[0].role", id="no role"),
        pytest.param(
            {"input": [{"role": "robot", "content": "x"}]}, "input[0].role", id="unknown role"
        ),
        pytest.param({"input": [{"role": "user"}]}, "input[0].content", id="no content"),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            id="a part without text",
        ),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_image", "text": ""}]}]},
            "input[0].content[0].type",
            id="an image",
        ),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "output_text", "text": ""}]}]},
            "input[0].content[0].type",
            id="a user's output",
        ),
        pytest.param(
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "5"}]},
            "input[0].type",
            id="a tool's output",
        ),
        pytest.param(
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input[0].type",
            id="a stored item",
        ),
        pytest.param({"max_output_tokens": 0}, "max_output_tokens", id="no tokens"),
        pytest.param({"max_output_tokens": 9999}, "max_output_tokens", id="too many tokens"),
        pytest.param({"input": "x " * 999}, "input", id="too long an input"),
        pytest.param({"temperature": -1}, "temperature", id="below the range"),
        pytest.param({"top_logprobs": 2}, "top_logprobs", id="top without logprobs"),
        pytest.param({"include": ["file_search_call.results"]}, "include[0]", id="not to include"),
        pytest.param({"stream_options": {}}, "stream_options", id="options without a stream"),
        pytest.param({"truncation": "middle"}, "truncation", id="unknown truncation"),
        pytest.param(
            {"text": {"format": {"type": "json_schema"}}}, "text.format", id="structured output"
        ),
        pytest.param({"text": {"verbosity": "high"}}, "text.verbosity", id="verbosity"),
        pytest.param(
            {"metadata": {str(i): "" for i in range(17)}}, "metadata", id="too much metadata"
        ),
        pytest.param({"metadata": {"k" * 65: ""}}, "metadata", id="too long a key"),
        pytest.param({"metadata": {"k": "v" * 513}}, "metadata.k", id="too long a value"),
    ],
)
def test_what_is_wrong_is_named(http, changed, param):
    error = refused(http, **changed)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_openais_client_raises_what_it_should(smollm2):
    with pytest.raises(openai.NotFoundError) as raised:
        smollm2.responses.create(model="gpt-6", input=QUESTION)
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        smollm2.responses.create(model=SMOLLM2, input=QUESTION, store=True)
    assert raised.value.param == "store"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ],
)
def test_no_response_can_be_asked_for_later(http, method, path):
    answer = http.request(method, path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("response_not_found", "response_id")
    assert "'resp_1'" in error["message"]


# --- truncation -----------------------------------------------------------------------------------


def conversation(num_turns):
    turns = [{"role": "developer", "content": "Be kind."}]
    for index in range(num_turns):
        turns.append({"role": "user", "content": f"Say {index}"})
        turns.append({"role": "assistant", "content": str(index)})
    return [*turns, {"role": "user", "content": "And now?"}]


def test_a_conversation_that_is_too_long_loses_its_beginning_if_asked(http):
    long = conversation(30)
    assert refused(http, input=long)["code"] == "context_length_exceeded"
    response = create(http, input=long, truncation="auto", max_output_tokens=20)
    assert response["truncation"] == "auto"
    assert response["usage"]["output_tokens"] == 20
    assert response["usage"]["input_tokens"] <= 256 - 20
    short = create(http, input=conversation(1), truncation="auto")
    assert short == create(http, input=conversation(1)) | {
        key: short[key] for key in ("id", "created_at", "completed_at", "output", "truncation")
    }


def test_truncation_drops_as_little_as_it_can(server):
    messages = conversation(30)
    tokenizer = server.service.engine_or_none.tokenizer
    prompt = server.run(lambda: prompt_within(server.service, messages, 20))
    fitting = [
        tokenizer.encode_chat([{"role": "system", "content": "Be kind."}, *messages[1 + dropped :]])
        for dropped in range(len(messages) - 1)
    ]
    assert prompt.value == next(ids for ids in fitting if len(ids) <= 256 - 20)


def test_a_last_message_that_is_too_long_by_itself_is_refused(http):
    error = refused(
        http, truncation="auto", input=[*conversation(2), {"role": "user", "content": "x " * 999}]
    )
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
