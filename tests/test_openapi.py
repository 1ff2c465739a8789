"""The OpenAPI document is of the routes there are, and its viewer needs nothing from afar."""

import re
from base64 import b64encode
from hashlib import sha256

import jsonschema_rs
import msgspec
import pytest
from http_server import running_server
from starlette.routing import Route
from tiny_models import tiny_artifact

from furiosa_llm import __version__
from furiosa_llm.server.api_operations import OPERATIONS
from furiosa_llm.server.app import make_routes
from furiosa_llm.server.auth import OPEN_PATHS, ApiKeys
from furiosa_llm.server.docs_page import PAGE
from furiosa_llm.server.field_docs import field_docs
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.openapi import make_document
from furiosa_llm.server.overview import OwnersOverview


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model")).path


@pytest.fixture(scope="module")
def server(model):
    with running_server(model, names=("tiny", "small"), max_model_len=100) as server:
        yield server


@pytest.fixture(scope="module")
def document(server):
    with server.client() as client:
        return client.get("/openapi.json").json()


def references_in(value):
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references_in(inner)


def test_every_route_is_documented_and_no_other(server):
    overview = OwnersOverview(server.service)
    routes = make_routes(server.service, ApiKeys(environ={}), HttpConfig(), overview)
    assert all(isinstance(route, Route) for route in routes)
    served = {
        (method, route.path.replace(":path", ""))
        for route in routes
        for method in route.methods - {"HEAD"}
    }
    assert served == {(each.method, each.path) for each in OPERATIONS}


def test_open_operations_are_the_open_paths():
    assert {each.path for each in OPERATIONS if each.is_open} == OPEN_PATHS


def test_the_document_is_whole(document):
    assert document["openapi"] == "3.1.0"
    assert document["info"] == {"title": "furiosa-serve", "version": __version__}
    names = {
        reference.removeprefix("#/components/schemas/") for reference in references_in(document)
    }
    schemas = document["components"]["schemas"]
    assert names <= set(schemas)
    for name, schema in schemas.items():
        # Draft 2020-12 is OpenAPI 3.1's; references are looked up in the whole document.
        jsonschema_rs.meta.validate(schema)
        assert schema["title"] == name
    identifiers = [
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
    ]
    assert len(identifiers) == len(set(identifiers)) == len(OPERATIONS)


def test_it_names_the_models_and_the_bounds_that_are_checked(document):
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["model"]["anyOf"][0]["enum"] == ["tiny", "small"]
    assert fields["temperature"]["anyOf"][0] == {
        "type": "number", "minimum": 0, "maximum": 100.0
    }  # fmt: skip
    assert fields["n"]["description"].startswith("Choices to produce")


def test_keys_are_in_it_where_they_are_needed():
    without = make_document(["tiny"], version="1", needs_key=False)
    assert "securitySchemes" not in without["components"]
    paths = make_document(["tiny"], version="1", needs_key=True)["paths"]
    assert paths["/v1/models"]["get"]["security"] == [{"bearer": []}, {"apiKey": []}]
    assert "401" in paths["/v1/models"]["get"]["responses"]
    assert "security" not in paths["/livez"]["get"]


@pytest.mark.parametrize(
    "operation",
    [pytest.param(each, id=each.path) for each in OPERATIONS if each.example is not None],
)
def test_every_example_works_and_answers_as_documented(server, document, operation):
    body = document["paths"][operation.path]["post"]["requestBody"]["content"]["application/json"]
    with server.client() as client:
        answer = client.post(operation.path, json=body["example"])
    assert answer.status_code == 200, answer.text
    reference = f"#/components/schemas/{operation.answer.__name__}"
    validator = jsonschema_rs.Draft202012Validator({**document, "$ref": reference})
    validator.validate(answer.json())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.method} {each.path}")
def test_a_server_that_starts_answers_with_documented_statuses(model, operation, starting):
    documented = make_document(["tiny"], version="1", needs_key=False)["paths"]
    responses = documented[operation.path][operation.method.lower()]["responses"]
    path = re.sub("{.*}", "tiny", operation.path)
    with starting.client() as client:
        answer = client.request(operation.method, path, json=operation.example)
    assert str(answer.status_code) in responses
    if "503" in responses:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


@pytest.fixture(scope="module")
def starting(model):
    with running_server(model, is_started=False) as server:
        yield server


def test_the_viewer_loads_nothing_from_elsewhere(server):
    with server.client() as client:
        answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", answer.text.replace("// ", ""))
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    # The policy forbids these, so they would silently do nothing.
    assert not re.search(r"\son\w+=|\sstyle=", answer.text)


class Plain(msgspec.Struct):
    first: int
    """What the first
    is."""
    second: int
    third: int = 0
    """The third."""


class Extended(Plain):
    second: int
    """Told here."""


def test_docstrings_of_fields_are_found_through_the_bases():
    assert field_docs(Extended) == {
        "first": "What the first is.", "second": "Told here.", "third": "The third."
    }  # fmt: skip
    assert field_docs(int) == {}
