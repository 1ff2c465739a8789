"""Whatever the document allows, and much of what it forbids, is answered as the document says.

Every route and every check of schemathesis, without a filter: no 5xx, no status, content type or
shape that is not in the document, and what the schemas forbid is refused.
"""

import re

import pytest
import requests
import schemathesis
from http_server import running_server
from hypothesis import HealthCheck, settings
from tiny_models import tiny_artifact

from furiosa_llm import __version__
from furiosa_llm.server.api_operations import OPERATIONS
from furiosa_llm.server.openapi import make_document

# Without keys: with them schemathesis repeats each request without one, and keys are a matter of
# routes, not of bodies. The second test asks it of each route.
schema = schemathesis.openapi.from_dict(
    make_document(["tiny"], version=__version__, needs_key=False)
)
# What no schema can say (two fields that do not go together, a prompt that is too long) is a 400.
schema.config.checks.positive_data_acceptance.expected_statuses = ["2xx", "400", "404"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def server(model):
    # A short context, since most requests ask for as many tokens as there is room for.
    with running_server(model, max_model_len=100) as server:
        yield server


@pytest.fixture(scope="module")
def session():
    """Connections that are kept; there are some 1,500 requests."""
    with requests.Session() as session:
        yield session


@schema.parametrize()
@settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_route_answers_as_the_document_says(case, server, session):
    case.call_and_validate(base_url=server.url, session=session)


@pytest.fixture(scope="module")
def locked(model):
    with running_server(
        model, environ={"FURIOSA_SERVE_API_KEY": "right"}, is_started=False
    ) as server:
        yield server


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.method} {each.path}")
@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": "right"}],
)
def test_every_route_but_the_open_ones_needs_the_key(locked, session, operation, headers):
    url = locked.url + re.sub("{.*}", "tiny", operation.path)
    answer = session.request(operation.method, url, headers=headers)
    assert (answer.status_code == 401) == (not operation.is_open)
    right = session.request(operation.method, url, headers={"authorization": "Bearer right"})
    assert right.status_code != 401
