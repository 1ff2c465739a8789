"""The tests of OpenAI's package once more, on its 2.x line.

scripts/test.sh installs that into a directory of its own, and this fails where it is missing. The
tests run in a process of their own, since one process can load but one of the two.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OPENAI_2 = TESTS.parent / ".venv" / "openai-2"

RUN = """
import sys
import pytest
code = pytest.main(sys.argv[1:])
import openai  # not before: pytest wants to load what it rewrites
assert openai.__version__.startswith("2."), (openai.__version__, openai.__file__)
sys.exit(code)
"""


@pytest.mark.slow
def test_what_the_package_of_today_does_that_of_yesterday_does_too():
    assert OPENAI_2.is_dir(), f"{OPENAI_2} is missing: run scripts/test.sh, which installs it"
    files = [str(TESTS / name) for name in ("test_http_sdk.py", "test_http_responses.py")]
    only = ["-k", "test_http_sdk or openais_client"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *only, *files],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(OPENAI_2)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("12 passed"), done.stdout
