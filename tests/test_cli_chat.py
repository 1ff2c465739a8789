"""furiosa-serve chat and generate over a daemon: what is said, what is shown, what Ctrl-C stops."""

import asyncio
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time

import pytest
from client_daemon import DaemonProcess
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams
from furiosa_llm.cli.chat import Repl
from furiosa_llm.cli.conversation import Conversation, Leave
from furiosa_llm.client import AsyncClient, Client
from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError

SERVE = [sys.executable, "-m", "furiosa_llm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def daemon(model, tmp_path_factory):
    with DaemonProcess(model, f"ipc://{tmp_path_factory.mktemp('d')}/s") as daemon:
        yield daemon


def serve(*arguments, **keywords):
    return subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=60, **keywords
    )


# --- the conversation -----------------------------------------------------------------------------


@pytest.fixture
def conversation():
    return Conversation(SamplingParams(max_tokens=5))


def test_what_is_said_becomes_messages(conversation):
    conversation.ask("hi")
    conversation.answer("hello")
    conversation.command("/system be brief")
    assert conversation.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert conversation.command("/system") == "be brief"
    assert conversation.command("/system -") == "there is no system message"
    conversation.command("/reset")
    assert conversation.messages == []


def test_taking_back_and_asking_again(conversation):
    assert not conversation.retry()
    conversation.ask("hi")
    conversation.answer("hello")
    conversation.take_back()  # there is nothing unanswered to take back
    assert len(conversation.messages) == 2
    assert conversation.retry()
    assert conversation.messages == [{"role": "user", "content": "hi"}]
    conversation.take_back()
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set max-tokens 9", "max_tokens", 9),
        ("/set max_tokens none", "max_tokens", None),
        ("/set stop END", "stop", ("END",)),
        ('/set stop ["a", "b"]', "stop", ("a", "b")),
        ("/set seed = 5", "seed", 5),
        ("/set ignore_eos true", "ignore_eos", True),
    ],
)
def test_set_changes_a_parameter(conversation, line, field, value):
    assert conversation.command(line).startswith(field)
    assert getattr(conversation.params, field) == value
    assert field in conversation.command("/set")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/set temperature hot", "temperature: 'hot' is not a number"),
        ("/set temperature", "/set temperature what? It is 1.0"),
        ("/set n 5", "there is no n to set"),
        ("/nonsense", "/nonsense is no command: /help shows them"),
        ("/save", "which file?"),
        ("/load /not/there", "cannot be read: No such file"),
        ("/save /not/there/x", "cannot be written: No such file"),
        ("/retry", "there is no question to ask again"),
    ],
)
def test_a_wrong_command_changes_nothing(conversation, line, reason):
    before = (conversation.params, conversation.messages)
    with pytest.raises(FuriosaLLMError) as caught:
        conversation.command(line)
    assert reason in str(caught.value)
    assert (conversation.params, conversation.messages) == before


def test_help_names_every_command(conversation):
    shown = conversation.command("/help")
    assert all(name in shown for name in conversation.command_names)
    for line in ("/quit", "/exit"):
        with pytest.raises(Leave):
            conversation.command(line)


def test_saving_and_loading(conversation, tmp_path):
    path = tmp_path / "chat.json"
    conversation.command("/system be brief")
    conversation.ask("grüß dich")
    conversation.answer("hello")
    assert conversation.command(f"/save {path}") == f"saved 3 messages to {path}"
    conversation.command(f"/save {path}")  # it is ours
    said = conversation.messages
    other = Conversation(SamplingParams())
    with pytest.raises(InvalidRequestError, match="exists: choose another name"):
        other.command(f"/save {path}")
    assert other.command(f"/load {path}") == "3 messages"
    assert other.messages == said == json.loads(path.read_text())["messages"]


@pytest.mark.parametrize(
    "content",
    ["nonsense", "[]", '{"messages": 5}', '{"messages": [{"role": "x", "content": "y"}]}'],
)
def test_loading_what_was_not_saved(conversation, tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_text(content)
    conversation.ask("hi")
    with pytest.raises(InvalidRequestError, match="is not"):
        conversation.command(f"/load {path}")
    assert len(conversation.messages) == 1


# --- the loop -------------------------------------------------------------------------------------


def test_lines_on_standard_input_are_answered_in_turn(daemon, tmp_path):
    text = (
        '/set seed 7\nhi\n"""two\nlines"""\none \\\nmore\n/nonsense\n\n/save %s\n/quit\nnot this\n'
    )
    saved = tmp_path / "chat.json"
    done = serve(
        "chat", "--connect", daemon.endpoint, "--max-tokens", "5", "--system", "be brief",
        input=text % saved,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: /nonsense is no command" in done.stderr
    assert done.stdout.startswith("seed 7\n")
    assert done.stdout.count("(cut at max_tokens)") == 3
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "be brief", "hi", "two\nlines", "one \nmore",
    ]  # fmt: skip
    with Client(daemon.endpoint) as client:
        sampling = SamplingParams(max_tokens=5, seed=7, temperature=0.0)
        answer = client.chat(messages[:2], sampling).outputs[0].text
    assert messages[2] == {"role": "assistant", "content": answer}


def test_an_answer_that_fails_is_taken_back(daemon):
    lines = iter(["x" * 2000, "hi", "/retry"])
    conversation = Conversation(SamplingParams(max_tokens=3, ignore_eos=True))

    def read_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with asyncio.Runner() as runner:
        client = AsyncClient(daemon.endpoint)
        Repl(conversation, runner, client, read_line).run()
        runner.run(client.close())
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[0]["content"] == "hi"


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, arguments, environment):
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execve(sys.executable, [*SERVE, *arguments], environment)
        self.shown = ""

    def type(self, text):
        os.write(self._fd, text.encode())

    def wait_for(self, pattern):
        """Read until what was shown since the last match matches; returns the match."""
        deadline_s = time.monotonic() + 30
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline_s, self.shown
            try:
                self.shown += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:  # it has ended
                raise AssertionError(self.shown) from None
        self.shown = self.shown[match.end() :]
        return match

    def end(self):
        """Its exit code."""
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
@pytest.mark.parametrize("has_own_engine", [False, True])
def test_ctrl_c_stops_the_answer_and_not_the_program(model, tmp_path, has_own_engine):
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "FURIOSA_SERVE_MOCK_TOKENS_PER_S": "100",
        "TERM": "dumb",
    }
    with DaemonProcess(model, f"ipc://{tmp_path}/s", tokens_per_s=100) as daemon:
        source = ["--connect", daemon.endpoint]
        if has_own_engine:
            source = ["--model", str(model), "--backend", "mock", "--devices", "npu:0:0"]
        terminal = Terminal(["chat", *source, "--ignore-eos"], environment)
        terminal.wait_for(">>> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n.")  # the echo, and the first of the answer
        os.kill(terminal._pid, signal.SIGINT)
        terminal.wait_for(r"\(stopped\)\r\n>>> ")
        with Client(daemon.endpoint) as client:
            assert client.status().num_in_flight == 0
        os.kill(terminal._pid, signal.SIGINT)
        terminal.wait_for(r"\(Ctrl-D leaves\)\r\n>>> ")
        terminal.type("/set max_tokens 3\n")
        terminal.wait_for("max_tokens 3\r\n>>> ")
        terminal.type("again\n")
        terminal.wait_for(r"\(cut at max_tokens\)\r\n>>> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    history = tmp_path / "state" / "furiosa-serve" / "chat_history"
    assert history.read_text().splitlines()[-3:] == ["hello", "/set max_tokens 3", "again"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_chat_without_a_daemon(tmp_path):
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = serve("chat", env=environment, input="hi\n")
    assert done.returncode == 1
    assert "no daemon named default is running" in done.stderr


# --- generate over a daemon -----------------------------------------------------------------------


def test_generate_over_a_daemon(daemon):
    flags = ["generate", "--connect", daemon.endpoint, "--max-tokens", "5", "--ignore-eos"]
    done = serve(*flags, "one", "two")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r">>> one\n.*\n\n>>> two\n.*\n", done.stdout, re.DOTALL)
    assert "2 requests, 10 tokens" in done.stderr
    with Client(daemon.endpoint) as client:
        sampling = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
        chatted = client.chat([{"role": "user", "content": "one"}], sampling)
        raw = client.generate("one", sampling)
    assert chatted.outputs[0].text in done.stdout
    assert serve(*flags, "--raw", "one").stdout.strip("\n") == raw.outputs[0].text.strip("\n")


def test_generate_says_what_it_needs():
    done = serve("generate", "hi")
    assert done.returncode == 2
    assert "the following arguments are required: --model, or --name or --connect" in done.stderr
