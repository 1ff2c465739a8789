"""furiosa-serve batch: every line is answered once, whatever it holds and whatever ends the run."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from client_daemon import DaemonProcess
from tiny_models import tiny_artifact

from furiosa_llm.cli.batch_files import InputFile, OutputFile
from furiosa_llm.cli.main import main
from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def daemon(model, tmp_path_factory):
    with DaemonProcess(model, f"ipc://{tmp_path_factory.mktemp('d')}/s") as daemon:
        yield daemon


def line(custom_id, url=COMPLETIONS, method="POST", **body):
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def run(daemon, tmp_path, lines, *flags):
    """(result, answers by custom_id)"""
    source = write(tmp_path / "in.jsonl", lines)
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(
        main, ["batch", str(source), str(out), "--connect", daemon.endpoint, *flags]
    )
    answers = [json.loads(each) for each in out.read_text().splitlines()] if out.exists() else []
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert len(by_id) == len(answers)
    return result, by_id


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_http_api(daemon, tmp_path):
    user = [{"role": "user", "content": "hi"}]
    common = {"max_tokens": 4, "ignore_eos": True, "seed": 5}
    result, answers = run(
        daemon,
        tmp_path,
        [
            line("text", prompt="the fox", **common),
            line("ids", prompt=[5, 6, 7], n=2, **common),
            line("several", prompt=["the", "fox"], echo=True, **common),
            line("logprobs", prompt="the", logprobs=1, **common),
            line("chat", CHAT, messages=user, **common),
            line("chat logprobs", CHAT, messages=user, logprobs=True, top_logprobs=1, **common),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "6 requests answered" in result.stderr
    for answer in answers.values():
        assert answer["error"] is None
        assert answer["id"].startswith("batch_req_")
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"]
    bodies = {name: answer["response"]["body"] for name, answer in answers.items()}
    text = bodies["text"]
    assert (text["object"], text["id"][:5]) == ("text_completion", "cmpl-")
    assert text["choices"][0]["finish_reason"] == "length"
    assert text["usage"]["completion_tokens"] == 4
    assert [choice["index"] for choice in bodies["ids"]["choices"]] == [0, 1]
    assert bodies["ids"]["usage"]["completion_tokens"] == 8
    assert bodies["ids"]["usage"]["prompt_tokens"] == 3
    several = bodies["several"]["choices"]
    assert [choice["text"][:3] for choice in several] == ["the", "fox"]
    assert len(bodies["logprobs"]["choices"][0]["logprobs"]["tokens"]) == 4
    chat = bodies["chat"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    content = bodies["chat logprobs"]["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert chat["model"] == text["model"]


@pytest.mark.parametrize(
    ("url", "body", "status", "param"),
    [
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 9999}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": "x", "stream": True}, 400, "stream"),
        (COMPLETIONS, {"prompt": "x", "model": "another"}, 404, "model"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400,
         "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_answered_by_its_error(daemon, tmp_path, url, body, status, param):
    good = line("good", prompt="x", max_tokens=1)
    result, answers = run(daemon, tmp_path, [line("bad", url, **body), good])
    assert result.exit_code == 1
    assert "1 were answered by an error" in result.stderr
    response = answers["bad"]["response"]
    assert response["status_code"] == status
    assert response["body"]["error"]["param"] == param
    assert response["body"]["error"]["message"]
    assert answers["good"]["response"]["status_code"] == 200


def test_an_engine_of_its_own(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [line("a", prompt="x", max_tokens=2, ignore_eos=True)])
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "furiosa_llm", "batch", str(source), str(out),
        "--model", str(model), "--backend", "mock", "--devices", "npu:0:0",
        "--paged-attention-num-blocks", "64",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["response"]["body"]["usage"]["completion_tokens"] == 2


# --- going on -------------------------------------------------------------------------------------


def test_what_is_answered_is_skipped_and_a_torn_line_is_made_again(daemon, tmp_path):
    lines = [line(f"r{i}", prompt="x", max_tokens=1) for i in range(40)]
    result, first = run(daemon, tmp_path, lines, "--concurrency", "3")
    assert (result.exit_code, len(first)) == (0, 40)
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:10]) + whole[10][:-20])
    kept = {json.loads(each)["custom_id"]: json.loads(each) for each in whole[:10]}
    result, second = run(daemon, tmp_path, lines)
    assert result.exit_code == 0
    assert "40 requests answered, 10 of them by an earlier run" in result.stderr
    assert set(second) == set(first)
    assert {name: second[name] for name in kept} == kept
    result, third = run(daemon, tmp_path, lines)
    assert (result.exit_code, third) == (0, second)


def test_a_daemon_that_goes_ends_the_run_and_no_line_is_lost(model, tmp_path):
    lines = [line(f"r{i}", prompt="x", max_tokens=20, ignore_eos=True) for i in range(30)]
    with DaemonProcess(model, f"ipc://{tmp_path}/s") as daemon:
        run(daemon, tmp_path, lines[:5])
    result, answers = run(daemon, tmp_path, lines)  # nobody is there
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert len(answers) == 5
    daemon.start()
    with daemon:
        result, answers = run(daemon, tmp_path, lines)
    assert (result.exit_code, len(answers)) == (0, 30)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense\n", "line 1: "),
        ('{"custom_id": "a"}\n', "line 1: "),
        ("[1]\n", "line 1: "),
        (json.dumps(line("", prompt="x")) + "\n", "custom_id does not have 1 to 512 characters"),
        (json.dumps(line("a", method="GET")) + "\n", "line 1: method is 'GET'"),
        (json.dumps(line("a", "/v1/embeddings")) + "\n", "line 1: url is '/v1/embeddings'"),
        (json.dumps(line("a")) + "\n\n" + json.dumps(line("a")) + "\n", "line 3: custom_id 'a' is"),
        ('{"custom_id": "\xff', "line 1: "),
    ],
)
def test_an_input_that_is_none_is_refused_before_anything_runs(tmp_path, text, reason):
    source = tmp_path / "in.jsonl"
    source.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidRequestError) as caught:
        InputFile.check(source)
    assert reason in str(caught.value)


def test_an_input_that_is_not_there(tmp_path):
    result = CliRunner().invoke(main, ["batch", str(tmp_path / "no"), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "cannot be read: No such file" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_last_line_needs_no_end(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line("a", prompt="x")))
    assert [each.custom_id for each in InputFile.check(source).lines()] == ["a"]


def test_an_output_is_one_process_at_a_time(tmp_path):
    with OutputFile(tmp_path / "out"), pytest.raises(FuriosaLLMError, match="another batch"):
        OutputFile(tmp_path / "out")
    with OutputFile(tmp_path / "out") as output:
        output.write({"custom_id": "a"})
    with OutputFile(tmp_path / "out") as output:
        assert output.answered == {"a"}


def test_a_file_that_is_no_output_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(InvalidRequestError, match="line 1: it is no line of a batch's output"):
        OutputFile(path)
    assert path.read_text() == "mine\n"


def test_a_full_disk_is_said(tmp_path):
    with OutputFile(tmp_path / "out") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.write", _full)
        with pytest.raises(FuriosaLLMError, match="No space left on device; run the same"):
            output.write({"custom_id": "a"})


def _full(fd, packed):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--concurrency", "0"], "--concurrency: 0 is not from 1 to 1024"),
        (["--name", "a", "--connect", "b"], "--name and --connect both say which daemon"),
        (["--name", "a", "--model", "b"], "--model makes an engine"),
        (
            ["--connect", "tcp://x:1", "--server-key", "k"],
            "--server-key and --key-file go together",
        ),
        (["--connect", "tcp://x:1"], "only with keys"),
    ],
)
def test_flags_that_will_not_do(tmp_path, flags, reason):
    source = write(tmp_path / "in.jsonl", [line("a", prompt="x")])
    result = CliRunner().invoke(main, ["batch", str(source), str(tmp_path / "out"), *flags])
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
