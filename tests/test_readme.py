"""What the README says to type, typed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMOLLM2
from daemons import make_home

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def home(smollm2_gguf):
    """A daemon of the default model, started as the README starts it."""
    with make_home() as home:
        for name in ("FURIOSA_SERVE_BACKEND", "FURIOSA_SERVE_TOPOLOGY", "FURIOSA_SERVE_DEVICES"):
            del home.env[name]
        home.run_process("start", SMOLLM2, "--name", "demo")
        yield home


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_is_answered(home):
    (command,) = re.findall(r"^(curl .*?\]\}')$", README, re.DOTALL | re.MULTILINE)
    address = json.loads(home.file("address.json", "demo").read_text())["http"]
    assert "http://127.0.0.1:8000" in command
    command = command.replace("http://127.0.0.1:8000", address)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 1


def test_the_socket_client_is_answered(home):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (program,) = [block for block in blocks if "furiosa_llm.client" in block]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=home.env,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 1
