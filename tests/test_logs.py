"""Where the daemon's log goes: formats, and a file that stays bounded and loses no word."""

import json
import subprocess
import sys

import pytest

LOG = """
import logging, os, sys, warnings
from pathlib import Path
from furiosa_llm.server import logs
logs.MAX_LOG_BYTES = 2000
file = Path(sys.argv[1]) if sys.argv[1] else None
logs.set_up_logging("info", sys.argv[2], file)
log = logging.getLogger("furiosa_llm.server.daemon")
"""


def run(code, file="", format_name="text"):
    done = subprocess.run(
        [sys.executable, "-c", LOG + code, str(file), format_name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr


def test_text():
    text = run("log.debug('no'); log.info('hello %d', 7); warnings.warn('careful')")
    lines = text.splitlines()
    assert lines[0].endswith(" INFO server.daemon: hello 7")
    assert "WARNING py.warnings: " in lines[1]
    assert "no" not in lines[0].split()


def test_json():
    text = run(
        "log.info('ä\\nb')\ntry: 1/0\nexcept Exception: log.exception('oh')", format_name="json"
    )
    first, second = map(json.loads, text.splitlines())
    assert (first["level"], first["message"]) == ("info", "ä\nb")
    assert first["logger"] == "furiosa_llm.server.daemon"
    assert first["time"].endswith("Z")
    assert "ZeroDivisionError" in second["exception"]


@pytest.mark.parametrize("is_owner", [True, False])
def test_a_file_is_rotated_by_its_owner_and_followed_by_others(tmp_path, is_owner):
    file = tmp_path / "log"
    code = f"""
for number in range(100):
    log.info('line %d', number)
os.write(1, b'from descriptor 1\\n')
os.write(2, b'from descriptor 2\\n')
if not {is_owner}:
    logs.set_up_logging("info", "text", file, is_owner=False)
    log.info('before')
    file.rename(file.with_name('log.1'))
    log.info('after')
"""
    run(code, file)
    text = file.read_text()
    assert file.stat().st_size < 4000
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    if is_owner:
        assert "line 99" in text
        assert text.endswith("from descriptor 1\nfrom descriptor 2\n")
    else:
        assert text.splitlines()[-1].endswith("after")
        assert "before" in (tmp_path / "log.1").read_text()
