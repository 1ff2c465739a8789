"""LLM, offline: prompts in, finished answers out."""

import asyncio

import pytest
from tiny_models import tiny_artifact

from furiosa_llm import LLM, AsyncLLMEngine, LLMEngine, SamplingParams
from furiosa_llm.errors import ContextLengthError, InvalidRequestError

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model), backend="native", paged_attention_num_blocks=64) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        pytest.param("hello", ["hello"], id="a text"),
        pytest.param({"prompt": "hello"}, ["hello"], id="a dict"),
        pytest.param({"prompt_token_ids": IDS}, [None], id="token ids"),
        pytest.param(["b", "a", {"prompt": "c"}], ["b", "a", "c"], id="a list, in its order"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_generate_takes_one_prompt_or_a_list(llm, prompts, texts):
    outputs = llm.generate(prompts, PARAMS)
    assert isinstance(outputs, list) == isinstance(prompts, list)
    listed = outputs if isinstance(outputs, list) else [outputs]
    assert [output.prompt for output in listed] == texts
    for output in listed:
        assert output.finished
        assert len(output.outputs[0].token_ids) == 6


def test_prompt_token_ids_as_an_argument_of_its_own(llm):
    expected = llm.generate({"prompt_token_ids": IDS}, PARAMS).outputs[0].token_ids
    assert (
        llm.generate(prompt_token_ids=IDS, sampling_params=PARAMS).outputs[0].token_ids == expected
    )
    (only,) = llm.generate(prompt_token_ids=[IDS], sampling_params=PARAMS)
    assert only.outputs[0].token_ids == expected
    with pytest.raises(InvalidRequestError, match="not both"):
        llm.generate("x", PARAMS, prompt_token_ids=IDS)


def test_params_may_differ_by_prompt(llm):
    short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    outputs = llm.generate(["a", "b"], [short, PARAMS])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 6]
    with pytest.raises(InvalidRequestError, match="as many as there are prompts"):
        llm.generate(["a", "b"], [short])


def test_an_error_in_one_prompt_leaves_nothing_behind(llm):
    with pytest.raises(ContextLengthError):
        llm.generate(["a", {"prompt_token_ids": [5] * 5000}], PARAMS)
    assert not llm.engine.has_unfinished_requests()
    assert llm.generate("a", PARAMS).finished


def test_special_tokens_are_added_only_where_asked_for(llm):
    plain = llm.generate("hello", PARAMS).prompt_token_ids
    assert plain == llm.tokenizer.encode("hello", add_special_tokens=False)
    added = llm.generate("hello", PARAMS, tokenizer_kwargs={"add_special_tokens": True})
    assert added.prompt_token_ids == llm.tokenizer.encode("hello", add_special_tokens=True)
    with pytest.raises(InvalidRequestError, match="'truncation'"):
        llm.generate("hello", PARAMS, tokenizer_kwargs={"truncation": True})


def test_chat_applies_the_models_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    expected = llm.tokenizer.encode_chat(messages)
    (one,) = llm.chat(messages, PARAMS)
    two = llm.chat([messages, messages], PARAMS)
    assert [o.prompt_token_ids for o in (one, *two)] == [expected] * 3


async def test_stream_generate_adds_up_to_generate(llm):
    whole = llm.generate("hello", PARAMS).outputs[0].text
    pieces = [piece async for piece in llm.stream_generate("hello", PARAMS)]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


async def test_streams_may_run_side_by_side(llm):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5 + i, 6]} for i in range(3)]

    async def stream(prompt):
        return "".join([piece async for piece in llm.stream_generate(prompt, params)])

    whole = [output.outputs[0].text for output in llm.generate(prompts, params)]
    assert await asyncio.gather(*map(stream, prompts)) == whole


async def test_a_cancelled_stream_holds_nothing_up(model, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "100")  # far from done when cancelled
    with LLM(str(model), backend="mock", devices="cpu") as llm:
        has_begun = asyncio.Event()

        async def stream():
            params = SamplingParams(max_tokens=240, ignore_eos=True)
            async for _ in llm.stream_generate("hello", params):
                has_begun.set()

        task = asyncio.create_task(stream())
        await asyncio.wait(
            [task, asyncio.create_task(has_begun.wait())], return_when="FIRST_COMPLETED"
        )
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.to_thread(llm.generate, "a", PARAMS)).finished


@pytest.mark.parametrize(
    ("params", "message"),
    [
        pytest.param({"temperature": 0}, "sampling_params", id="of another type"),
        pytest.param(SamplingParams(n=2), "n: 2", id="two answers in one text"),
    ],
)
async def test_a_stream_refuses(llm, params, message):
    with pytest.raises(InvalidRequestError, match=message):
        await anext(llm.stream_generate("hello", params))


def test_engines_over_an_llm_share_its_workers(llm):
    expected = llm.generate({"prompt_token_ids": IDS}, PARAMS).outputs[0].token_ids
    engine = LLMEngine.from_llm(llm)
    assert engine.worker_pids == llm.engine.worker_pids
    engine.add_request("mine", {"prompt_token_ids": IDS}, PARAMS)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == expected


async def test_an_async_engine_over_an_llm_shares_its_workers(llm):
    engine = AsyncLLMEngine.from_llm(llm)
    assert engine.worker_pids == llm.engine.worker_pids
    outputs = [o async for o in engine.generate({"prompt_token_ids": IDS}, PARAMS, "mine")]
    assert outputs[-1].finished


def test_defaults_come_from_the_checkpoint(llm):
    params = llm.get_default_sampling_params()
    assert params.temperature == llm.engine.generation_defaults.get("temperature", 1.0)


def test_unknown_keyword_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"max_batch_size.*max_num_seqs"):
        LLM("nowhere", max_batch_size=4)
