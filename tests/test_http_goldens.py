"""Raw wires: each case's answer is what it was, byte for byte.

goldens/generate_http.py writes them.
"""

from pathlib import Path

import pytest
from http_cases import CASES, PacedDelivery, record
from http_server import running_server
from tiny_models import tiny_artifact

GOLDEN = Path(__file__).parent / "goldens" / "http.txt"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tiny_artifact(tmp_path_factory.mktemp("model")).path) as server:
        server.service.delivery = PacedDelivery(server.loop)
        yield server


@pytest.fixture(scope="module")
def goldens():
    parts = GOLDEN.read_text(encoding="utf-8").split("=== ")[1:]
    return {part.split("\n", 1)[0]: "=== " + part for part in parts}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_wire(server, goldens, case):
    assert record(server, case).strip() == goldens[case.name].strip()


def test_there_is_no_golden_without_a_case(goldens):
    assert list(goldens) == [case.name for case in CASES]
