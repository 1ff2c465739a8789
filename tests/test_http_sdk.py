"""The openai package against the server with the real default model."""

import asyncio

import openai
import pytest
from conftest import SMOLLM2
from http_server import running_server

from furiosa_llm import AsyncLLMEngine, SamplingParams

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(smollm2_gguf):
    with running_server(SMOLLM2, names=(SMOLLM2,), backend=None) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_answers_and_streams_the_same(client):
    whole = client.chat.completions.create(model=SMOLLM2, messages=CAPITAL, **GREEDY)
    (choice,) = whole.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert whole.model == SMOLLM2
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=SMOLLM2, messages=CAPITAL, stream=True, stream_options=options, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_helper_assembles_a_completion(client):
    with client.chat.completions.stream(model=SMOLLM2, messages=CAPITAL, **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Paris" in final.choices[0].message.content


def test_logprobs_are_typed_and_agree_with_the_text(client):
    found = client.chat.completions.create(
        model=SMOLLM2, messages=CAPITAL, logprobs=True, top_logprobs=3, temperature=0, max_tokens=3
    ).choices[0]
    assert "".join(t.token for t in found.logprobs.content) == found.message.content
    for token in found.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy: the likeliest
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode() == token.token


def test_completions_of_several_prompts(client):
    prompts = ["The capital of France is", "One, two, three,"]
    found = client.completions.create(model=SMOLLM2, prompt=prompts, n=2, logprobs=1, **GREEDY)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text  # greedy
    assert "Paris" in found.choices[0].text
    assert "four" in found.choices[2].text
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)


def test_many_at_once_are_each_what_they_are_alone(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def ask(i):
                stream = await client.completions.create(
                    model=SMOLLM2, prompt=f"Number {i} is", stream=True, max_tokens=6, seed=i
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            together = await asyncio.gather(*map(ask, range(12)))
            return together, [await ask(i) for i in (0, 5, 11)]

    together, alone = asyncio.run(run())
    assert [together[i] for i in (0, 5, 11)] == alone


def test_http_gives_the_tokens_that_the_engine_gives(server, client):
    async def direct():
        engine: AsyncLLMEngine = server.service.engine
        params = SamplingParams(max_tokens=10, seed=3, temperature=0.8)
        async for output in engine.generate("Once upon a time", params, "direct"):
            last = output
        return last.outputs[0].text

    found = client.completions.create(
        model=SMOLLM2, prompt="Once upon a time", max_tokens=10, seed=3, temperature=0.8
    )
    assert found.choices[0].text == server.run(direct)


def test_errors_are_the_packages_own(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=SMOLLM2, messages=CAPITAL, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=SMOLLM2, prompt="word " * 20_000, stream=True)
    assert long.value.code == "context_length_exceeded"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model=SMOLLM2, messages=CAPITAL, tools=[tool])
    assert tools.value.code == "unsupported_parameter"


def test_a_stream_that_is_closed_early_is_aborted(server, client):
    stream = client.chat.completions.create(
        model=SMOLLM2,
        messages=CAPITAL,
        stream=True,
        max_tokens=1000,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert server.run(lambda: server.service.drained(30))


def test_models_and_extra_parameters(client):
    (model,) = client.models.list()
    assert model.id == SMOLLM2
    assert client.models.retrieve(SMOLLM2).max_model_len == model.max_model_len > 0
    raw = client.chat.completions.with_raw_response.create(
        model=SMOLLM2, messages=CAPITAL, max_tokens=1, extra_body={"top_k": 5, "nonsense": 1}
    )
    assert raw.headers["x-ignored-params"] == "nonsense"


def test_a_key_is_asked_for(smollm2_gguf):
    with running_server(SMOLLM2, environ={"FURIOSA_SERVE_API_KEY": "right"}) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=server.url + "/v1", api_key="right") as client:
            assert len(client.models.list().data) == 1
