"""AsyncLLMEngine and LLMEngine on real worker processes with the mock backend."""

import asyncio
import dataclasses
import os
import subprocess
import sys
import tempfile

import pytest
from engines import async_engine, collect, ids_of, llm_engine
from tiny_models import make_checkpoint, tiny_artifact

from furiosa_llm import RequestOutputKind, SamplingParams
from furiosa_llm.errors import (
    ArtifactError,
    ContextLengthError,
    DuplicateRequestError,
    EngineShutDownError,
    InvalidRequestError,
)

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture
async def engine(model):
    async with async_engine(model) as engine:
        yield engine


def params(**changed):
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | changed))


async def test_cumulative_outputs_grow_by_what_came(engine):
    outputs = await collect(engine, PROMPT, params())
    lengths = [output.num_output_tokens for output in outputs]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 12
    final = outputs[-1]
    assert final.outputs[0].finish_reason == "length"
    assert final.prompt_token_ids == [5, 6, 7, 8]
    for output in outputs:  # snapshots: an early one is a beginning of the last
        choice = output.outputs[0]
        assert final.outputs[0].token_ids[: len(choice.token_ids)] == choice.token_ids
        assert final.outputs[0].text.startswith(choice.text)
    assert final.outputs[0].text == engine.tokenizer.decode(final.outputs[0].token_ids)


async def test_a_reader_that_was_away_gets_the_newest_cumulative_output_and_every_delta(engine):
    for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA):
        stream = engine.generate(PROMPT, params(output_kind=kind, max_tokens=40), kind.name)
        outputs = [await anext(stream)]
        # Another request that begins later and makes as many tokens: the first has ended then.
        await collect(engine, PROMPT, params(max_tokens=60))
        outputs += [output async for output in stream]
        assert outputs[-1].finished
        if kind is RequestOutputKind.CUMULATIVE:
            assert len(outputs) <= 3
            assert outputs[-1].num_output_tokens == 40
        else:
            assert sum(output.num_output_tokens for output in outputs) == 40


async def test_delta_outputs_add_up_to_the_final_one(engine):
    deltas = await collect(engine, PROMPT, params(output_kind=RequestOutputKind.DELTA))
    finals = await collect(engine, PROMPT, params(output_kind=RequestOutputKind.FINAL))
    assert len(finals) == 1
    whole = finals[0].outputs[0]
    parts = [output.outputs[0] for output in deltas]
    assert [i for part in parts for i in part.token_ids] == whole.token_ids
    assert "".join(part.text for part in parts) == whole.text
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]


async def test_the_order_of_arguments_of_add_request(engine):
    outputs = [o async for o in engine.add_request("id-1", PROMPT, params())]
    assert outputs[-1].request_id == "id-1"
    assert ids_of(outputs) == ids_of(await collect(engine, PROMPT, params()))


async def test_choices_are_sequences_of_their_own(engine):
    request = params(n=3, temperature=1.0, seed=5, output_kind=RequestOutputKind.FINAL)
    (output,) = await collect(engine, PROMPT, request)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    (alone,) = await collect(engine, PROMPT, dataclasses.replace(request, n=1))
    assert alone.outputs[0].token_ids == output.outputs[0].token_ids


async def test_as_many_choices_as_may_be_asked_for(engine):
    request = params(n=128, temperature=1.0, max_tokens=2, output_kind=RequestOutputKind.FINAL)
    (output,) = await collect(engine, PROMPT, request)
    assert [choice.index for choice in output.outputs] == list(range(128))
    assert len({choice.text for choice in output.outputs}) > 50


async def test_penalties_and_biases_steer_what_is_sampled(model):
    async with async_engine(model, backend="native") as engine:
        plain = ids_of(await collect(engine, PROMPT, params(max_tokens=40)))
        favoured = next(i for i in range(20, 300) if i not in plain)
        biased = params(max_tokens=40, logit_bias={favoured: 100.0})
        assert ids_of(await collect(engine, PROMPT, biased)) == [favoured] * 40
        banned = params(max_tokens=40, logit_bias=dict.fromkeys(plain, -100.0))
        assert not set(plain) & set(ids_of(await collect(engine, PROMPT, banned)))
        # A bias that a frequency penalty of 2 eats up token by token: the token leaves, and returns
        # no sooner than others have been penalised as much.
        tired = params(max_tokens=40, logit_bias={favoured: 20.0}, frequency_penalty=2.0)
        assert 5 <= ids_of(await collect(engine, PROMPT, tired)).count(favoured) <= 12


async def test_a_bias_on_a_token_that_is_not_there_is_refused(engine):
    with pytest.raises(InvalidRequestError, match="logit_bias names token id 99999") as caught:
        await collect(engine, PROMPT, params(logit_bias={99999: 1.0}))
    assert caught.value.param == "logit_bias"


async def test_a_stop_token_ends_the_answer_and_stays_out_of_its_text(engine):
    tokens = ids_of(await collect(engine, PROMPT, params()))
    index = tokens.index(tokens[4])
    outputs = await collect(engine, PROMPT, params(stop_token_ids=[tokens[4]]))
    choice = outputs[-1].outputs[0]
    assert choice.token_ids == tokens[: index + 1]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason is None
    assert choice.text == engine.tokenizer.decode(tokens[:index])


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_answer_across_tokens(engine, include):
    text = (await collect(engine, PROMPT, params(max_tokens=40)))[-1].outputs[0].text
    stop = text[5:9]
    end = text.index(stop) + (len(stop) if include else 0)
    outputs = await collect(
        engine, PROMPT, params(max_tokens=40, stop=stop, include_stop_str_in_output=include)
    )
    choice = outputs[-1].outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.text == text[:end]


async def test_closing_the_generator_frees_what_the_request_held(model):
    # The pool holds one long request: the second can run only once the first is gone.
    async with async_engine(model, paged_attention_num_blocks=8, max_model_len=128) as engine:
        stream = engine.generate(PROMPT, params(max_tokens=120), "long")
        await anext(stream)
        await stream.aclose()
        assert len(ids_of(await collect(engine, PROMPT, params(max_tokens=120), "long"))) == 120


async def test_abort_gives_the_reader_a_last_output(monkeypatch, model):
    monkeypatch.setenv("FURIOSA_SERVE_MOCK_TOKENS_PER_S", "200")
    async with async_engine(model) as engine:
        stream = engine.generate(PROMPT, params(max_tokens=240), "doomed")
        outputs = [await anext(stream)]
        await engine.abort("doomed")
        await engine.abort("nobody")
        outputs += [output async for output in stream]
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) < 240


async def test_aborting_choices_that_run_and_choices_that_wait(model):
    # There is room for one: when it is freed, the others must not be sent into it.
    async with async_engine(model, max_processing_samples=1) as engine:
        stream = engine.generate(PROMPT, params(max_tokens=240, n=3), "doomed")
        await anext(stream)
        await engine.abort("doomed")
        outputs = [output async for output in stream]
        assert {choice.finish_reason for choice in outputs[-1].outputs} == {"abort"}
        assert len(ids_of(await collect(engine, PROMPT, params()))) == 12


async def test_a_live_id_is_refused_and_a_finished_one_is_free(engine):
    stream = engine.generate(PROMPT, params(max_tokens=240), "same")
    await anext(stream)
    with pytest.raises(DuplicateRequestError, match="'same'"):
        await collect(engine, PROMPT, params(), "same")
    await stream.aclose()
    assert ids_of(await collect(engine, PROMPT, params(), "same"))


@pytest.mark.parametrize(
    ("prompt", "request_id", "message"),
    [
        pytest.param(7, "a", "Unsupported prompt type int", id="a number"),
        pytest.param({"text": "x"}, "a", "exactly one of", id="unknown key"),
        pytest.param({"prompt": "x", "prompt_token_ids": [1]}, "a", "exactly one of", id="both"),
        pytest.param("", "a", "empty", id="empty text"),
        pytest.param({"prompt_token_ids": []}, "a", "empty", id="no ids"),
        pytest.param({"prompt_token_ids": [10**6]}, "a", "1000000", id="id out of vocabulary"),
        pytest.param({"prompt_token_ids": [-1]}, "a", "-1", id="negative id"),
        pytest.param({"prompt_token_ids": ["x"]}, "a", "'x'", id="not an id"),
        pytest.param({"prompt_token_ids": [True]}, "a", "True", id="a bool"),
        pytest.param({"prompt_token_ids": b"ab"}, "a", "b'ab'", id="bytes"),
        pytest.param({"prompt_token_ids": 5}, "a", "list of integers", id="not a list"),
        pytest.param("x", 5, "request_id", id="id of another type"),
        pytest.param("x", "", "request_id", id="empty id"),
        pytest.param("x", ["a"], "request_id", id="unhashable id"),
    ],
)
async def test_bad_input_is_refused_and_changes_nothing(engine, prompt, request_id, message):
    with pytest.raises(InvalidRequestError, match=message):
        await collect(engine, prompt, params(), request_id)
    assert ids_of(await collect(engine, PROMPT, params(), "a"))


async def test_params_of_another_type_are_refused(engine):
    with pytest.raises(InvalidRequestError, match="SamplingParams"):
        await collect(engine, PROMPT, {"temperature": 0})


async def test_what_does_not_fit_the_context_is_refused_with_both_counts(model):
    async with async_engine(model, max_model_len=64) as engine:
        with pytest.raises(ContextLengthError, match=r"4 tokens and max_tokens is 61.*64"):
            await collect(engine, PROMPT, params(max_tokens=61))
        with pytest.raises(ContextLengthError, match=r"70 tokens.*64"):
            await collect(engine, {"prompt_token_ids": [5] * 70}, params())
        unbounded = params(max_tokens=None)
        assert len(ids_of(await collect(engine, PROMPT, unbounded))) == 60
        assert unbounded.max_tokens is None


async def test_logprobs_come_one_per_token(engine):
    outputs = await collect(engine, PROMPT, params(logprobs=0))
    choice = outputs[-1].outputs[0]
    assert [list(entry) for entry in choice.logprobs] == [[i] for i in choice.token_ids]


async def test_many_streams_at_once(engine):
    alone = ids_of(await collect(engine, PROMPT, params(max_tokens=50)))
    together = await asyncio.gather(
        *(collect(engine, PROMPT, params(max_tokens=50)) for _ in range(64))
    )
    assert [ids_of(outputs) for outputs in together] == [alone] * 64


async def test_health_and_the_end(model):
    engine = async_engine(model)
    (pid,) = engine.worker_pids
    await engine.check_health()
    stream = engine.generate(PROMPT, params(max_tokens=240), "cut")
    await anext(stream)
    await engine.shutdown()
    with pytest.raises(EngineShutDownError):
        async for _ in stream:
            pass
    with pytest.raises(EngineShutDownError):
        await collect(engine, PROMPT, params())
    with pytest.raises(EngineShutDownError):
        await engine.check_health()
    await engine.shutdown()
    assert not os.path.exists(f"/proc/{pid}")


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        async_engine(tmp_path / "nowhere")


def test_a_worker_that_cannot_start_says_why(model, monkeypatch):
    # Only the worker loads the kernel: the front-end learns of this from its StartFailed.
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "nonsense")
    with pytest.raises(InvalidRequestError, match="nonsense"):
        async_engine(model, backend="native")


def test_a_failed_start_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "nonsense")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "tmp").mkdir()
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(InvalidRequestError, match="nonsense"):
        async_engine(checkpoint, backend="native", cache_dir=None)
    assert [path for path in (tmp_path / "tmp").rglob("*") if not path.is_dir()] == []
    assert list((tmp_path / "tmp").glob("furiosa-serve-*/*")) == []


PROGRAM = """
import sys
from furiosa_llm import LLM, SamplingParams
llm = LLM(sys.argv[1], backend="mock", devices="cpu", cache_dir=None)
print(len(llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True)).outputs), flush=True)
print(*llm.engine.worker_pids)
"""


def test_a_program_that_never_shuts_down_leaves_nothing_behind(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "tmp").mkdir()
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(checkpoint)],
        env=os.environ
        | {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    # The build shows its progress; nothing else is said, no warning about what is left behind.
    assert {line.split(":")[0] for line in done.stderr.splitlines()} == {"packing"}
    num_outputs, pid = done.stdout.split()
    assert num_outputs == "1"
    assert not os.path.exists(f"/proc/{pid}")
    assert list((tmp_path / "run" / "furiosa-serve").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_llm_engine_steps_until_nothing_is_unfinished(model):
    with llm_engine(model) as engine:
        assert engine.step() == []
        for name in "abc":
            engine.add_request(name, PROMPT, params())
        final = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            assert outputs
            final |= {output.request_id: output for output in outputs}
        assert sorted(final) == ["a", "b", "c"]
        assert len({tuple(o.outputs[0].token_ids) for o in final.values()}) == 1
        assert engine.step() == []


def test_llm_engine_abort_takes_one_id_or_several(model):
    with llm_engine(model) as engine:
        for name in "abc":
            engine.add_request(name, PROMPT, params(max_tokens=240, output_kind=2))
        engine.abort_request("a")
        engine.abort_request(["b", "c", "nobody"])
        reasons = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                reasons[output.request_id] = output.outputs[0].finish_reason
        assert set(reasons) == {"a", "b", "c"}
        assert set(reasons.values()) <= {"abort", "length"}


async def test_an_engine_tells_of_its_end(model):
    engine = async_engine(model)
    waiting = asyncio.create_task(engine.ended())
    await collect(engine, PROMPT, params())
    assert not waiting.done()
    await engine.shutdown()
    assert "was shut down" in await waiting
    assert "was shut down" in await engine.ended()  # one that comes late is told at once
