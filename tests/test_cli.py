"""furiosa-serve: what it prints, what it exits with, and how little it loads for it."""

import argparse
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from tiny_models import make_checkpoint

from furiosa_llm import SamplingParams, __version__
from furiosa_llm.cli import main as cli
from furiosa_llm.cli.live import Figures, show_answers
from furiosa_llm.cli.sampling_options import add_sampling_args, sampling_params
from furiosa_llm.errors import (
    ArtifactError,
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    WorkerDiedError,
    WorkerStartError,
)
from furiosa_llm.progress import ProgressLines, console_progress
from furiosa_llm.workers.artifact.build import build_artifact

SERVE = [sys.executable, "-m", "furiosa_llm"]


def serve(*arguments, **keywords):
    """Run the command in a process of its own."""
    return subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=100, **keywords
    )


# --- the group -----------------------------------------------------------------------------------


def test_help_names_every_command():
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    for name in ("build", "devices", "generate", "version"):
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert (result.exit_code, result.stdout) == (0, f"furiosa-serve {__version__}\n")


def test_full_version_names_the_packages():
    result = CliRunner().invoke(cli.main, ["version", "--full"])
    assert result.exit_code == 0
    assert "tokenizers " in result.stdout


@pytest.mark.parametrize("arguments", ["--help", "version", "--version", "version --help"])
def test_light_commands_load_nothing_heavy(arguments):
    code = (
        "import sys, json\n"
        "from furiosa_llm.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert "click" in loaded
    assert not loaded & {"numpy", "transformers", "tokenizers", "jinja2", "rich", "zmq", "asyncio"}


@pytest.mark.parametrize("arguments", [["nothing"], ["version", "--nothing"], ["build"]])
def test_wrong_usage_exits_with_2(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (InvalidRequestError("top_p: 2 is\nnot  allowed"), 2),
        (DeviceError("npu:9 is no card"), 2),
        (ContextLengthError("too long"), 2),
        (ArtifactError("not a model"), 2),
        (WorkerStartError("no memory"), 1),
        (WorkerDiedError("killed"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(monkeypatch, error, exit_code):
    @click.command()
    def failing():
        raise error

    monkeypatch.setattr(cli, "failing", failing, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "failing", (cli.__name__, ""))
    result = CliRunner().invoke(cli.main, ["failing"])
    assert result.exit_code == exit_code
    text = " ".join(str(error).split())
    assert result.stderr == (f"error: {text}\n" if text else "")


def test_a_defect_is_not_hidden(monkeypatch):
    """Only errors raised on purpose lose their traceback."""

    @click.command()
    def failing():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "failing", failing, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "failing", (cli.__name__, ""))
    assert isinstance(CliRunner().invoke(cli.main, ["failing"]).exception, ZeroDivisionError)


# --- build ---------------------------------------------------------------------------------------


def test_build(tmp_path):
    make_checkpoint(tmp_path / "model")
    arguments = ["build", str(tmp_path / "model"), str(tmp_path / "out"), "--weights", "int8"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "packing: 100 %" in result.stderr
    assert json.loads((tmp_path / "out" / "artifact.json").read_text())["weights"] == "int8"

    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["/nowhere/model.gguf", "OUT"], ["/nowhere", "OUT", "--weights", "int3"]]
)
def test_build_refuses(tmp_path, arguments):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    result = CliRunner().invoke(cli.main, ["build", *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


# --- progress ------------------------------------------------------------------------------------


def test_progress_lines_come_every_few_seconds():
    stream, now_s = io.StringIO(), 0.0
    progress = ProgressLines(stream, clock=lambda: now_s)
    for done in range(101):
        progress("packing", done, 100)
        now_s += 0.125
    progress("packing", 100, 100)
    assert stream.getvalue().split("\n") == [
        "packing: 0 %", "packing: 24 %", "packing: 48 %", "packing: 72 %", "packing: 96 %",
        "packing: 100 %", "",
    ]  # fmt: skip


def test_progress_of_several_stages_and_of_nothing():
    stream = io.StringIO()
    with console_progress(stream) as progress:
        progress("fetching", 0, 3)
        progress("packing", 0, 0)
    assert stream.getvalue() == "fetching: 0 %\npacking: 100 %\n"


def test_progress_bars_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    with console_progress(stream) as progress:
        progress("packing", 1, 2)
        progress("packing", 2, 2)
    assert "packing" in stream.getvalue()
    assert "100%" in stream.getvalue()


# --- sampling flags ------------------------------------------------------------------------------


def parsed(text):
    parser = argparse.ArgumentParser()
    add_sampling_args(parser)
    return sampling_params(parser.parse_args(text.split()))


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {"temperature": 0.0, "max_tokens": 256, "seed": None, "stop": ()}),
        ("--temperature 0.7 --top-p 0.9", {"temperature": 0.7, "top_p": 0.9}),
        ("--top-k 40 --min-p 0.1", {"top_k": 40, "min_p": 0.1}),
        ("--repetition-penalty 1.2", {"repetition_penalty": 1.2}),
        ("--max-tokens 5 --min-tokens 2", {"max_tokens": 5, "min_tokens": 2}),
        ("--stop a --stop b --ignore-eos", {"stop": ("a", "b"), "ignore_eos": True}),
        ("--sampling-seed 7", {"seed": 7}),
    ],
)
def test_sampling_flags(text, fields):
    params = parsed(text)
    assert {name: getattr(params, name) for name in fields} == fields


def test_sampling_flags_out_of_range_are_refused():
    with pytest.raises(InvalidRequestError, match="top_p"):
        parsed("--top-p 2")


# --- several answers on one terminal -------------------------------------------------------------


class FakeEngine:
    """Yields what the test says, when the test says: (request, text) or (request, error)."""

    def __init__(self):
        self.open = set()
        self._queues = {}

    def say(self, request, text):
        self._queue(request).put_nowait(text)

    def _queue(self, request):
        return self._queues.setdefault(request, asyncio.Queue())

    async def generate(self, prompt, params, request_id):
        self.open.add(prompt)
        try:
            while (text := await self._queue(prompt).get()) is not None:
                if isinstance(text, Exception):
                    raise text
                yield SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[1, 2])])
        finally:
            self.open.discard(prompt)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_answer_is_live_and_the_others_wait_their_turn():
    engine, shown = FakeEngine(), []
    task = asyncio.create_task(
        show_answers(
            engine, ["a", "b"], SamplingParams(), begin=shown.append, write=shown.append,
            clock=lambda: 1.0,
        )
    )  # fmt: skip
    await settle()
    assert engine.open == {"a", "b"}
    engine.say("b", "B1")
    engine.say("a", "A1")
    await settle()
    assert shown == [0, "A1"]
    for request, text in (("b", None), ("a", "A2"), ("a", None)):
        engine.say(request, text)
    figures = await task
    assert shown == [0, "A1", "A2", 1, "B1"]
    assert (figures.num_requests, figures.num_tokens) == (2, 6)
    assert figures.first_token_s == [0.0, 0.0]


async def test_an_error_ends_the_others():
    engine, shown = FakeEngine(), []
    engine.say("b", "B1")
    engine.say("a", WorkerDiedError("gone"))
    with pytest.raises(WorkerDiedError, match="gone"):
        await show_answers(
            engine, ["a", "b"], SamplingParams(), begin=shown.append, write=shown.append
        )
    assert engine.open == set()
    assert shown == [0]


def test_figures():
    figures = Figures(begin_s=10.0, end_s=12.0, num_requests=3, num_tokens=50)
    assert figures.line() == "3 requests, 50 tokens in 2.00 s: 25.0 tokens/s"
    figures.first_token_s = [0.1, 0.2, 0.9]
    assert figures.line().endswith("25.0 tokens/s, first token after 0.200 s (median)")


# --- generate, with the whole engine -------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A tiny model without a chat template."""
    directory = tmp_path_factory.mktemp("cli")
    model = make_checkpoint(directory / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return str(build_artifact(model, directory / "artifact"))


def generate_arguments(artifact, *arguments):
    engine = ["--model", artifact, "--backend", "mock", "--devices", "cpu", "--max-model-len", "64"]
    return ["generate", *engine, *arguments]


@pytest.mark.slow
def test_generate(artifact):
    done = serve(*generate_arguments(artifact, "--max-tokens", "5", "--ignore-eos", "one", "two"))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.split("\n") if line.startswith(">>> ")] == [
        ">>> one", ">>> two",
    ]  # fmt: skip
    assert done.stderr.splitlines()[-1].startswith("2 requests, 10 tokens in ")


@pytest.mark.slow
def test_generate_reads_standard_input(artifact):
    done = serve(
        *generate_arguments(artifact, "--max-tokens", "3", "--ignore-eos"), input="hello\n"
    )
    assert done.returncode == 0, done.stderr
    assert ">>>" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("1 request, 3 tokens in ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["--top-p", "7", "x"], "top_p", id="sampling"),
        pytest.param(["--devices", "npu:x", "x"], "npu:x", id="devices"),
        pytest.param(["--npu-queue-limit", "0", "x"], "npu-queue-limit", id="engine"),
        pytest.param(["--max-tokens", "1000", "x"], "1000", id="too long"),
        pytest.param(["--chat", "x"], "chat template", id="no template"),
        pytest.param(["--model", "/nowhere", "x"], "/nowhere", id="no model"),
        pytest.param(["--nothing", "x"], "--nothing", id="unknown flag"),
        pytest.param(["--chat", "--raw", "x"], "not allowed", id="both forms"),
    ],
)
def test_generate_refuses(artifact, arguments, reason):
    done = serve(*generate_arguments(artifact, *arguments))
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_generate_without_a_prompt(artifact):
    done = serve(*generate_arguments(artifact), input="")
    assert done.returncode == 2
    assert "there is no prompt" in done.stderr


def test_generate_has_every_flag_of_the_engine():
    from furiosa_llm import AsyncEngineArgs
    from furiosa_llm.cli.generate import build_parser

    engine = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser()).format_help()
    ours = build_parser().format_help()
    flags = {word.rstrip(",]") for word in engine.split() if word.startswith("--")}
    assert len(flags) > 17
    assert {flag for flag in flags if flag not in ours} == set()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_exits_with_130(artifact):
    """A prompt that would run for long; the signal comes once its first token was shown."""
    arguments = generate_arguments(artifact, "--max-tokens", "60", "--ignore-eos", "x")
    env = {**os.environ, "FURIOSA_SERVE_MOCK_TOKENS_PER_S": "5", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*SERVE, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.read(1), process.stderr.read().decode()
        os.killpg(process.pid, signal.SIGINT)
        # The pipe's end is reached when every process that holds it is gone: the workers' too.
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err.decode()
        assert b"Traceback" not in err
    finally:
        process.kill()
        process.wait()
