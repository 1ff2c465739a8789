"""GET /openapi.json: the HTTP API as an OpenAPI 3.1 document, made from the table of operations.

The schemas are those of the structs that bodies are decoded into, so what the document says of a
field's type is what is checked; descriptions are the docstrings that stand in the code.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from furiosa_llm.sampling_params import MAX_LOGPROBS, MAX_N, MAX_TEMPERATURE, SamplingParams
from furiosa_llm.server.api_operations import EVENTS, JSON, OPERATIONS, Operation, Struct
from furiosa_llm.server.auth import ApiKeys
from furiosa_llm.server.field_docs import field_docs
from furiosa_llm.server.json_response import json_response
from furiosa_llm.server.service import Service

Schema = dict[str, Any]

_TITLE = "furiosa-serve"
_REFERENCE = "#/components/schemas/{name}"
_STATUSES = {
    200: "It worked.",
    400: "The request is wrong; the message says where.",
    401: "The API key is missing or unknown.",
    404: "There is no such thing.",
    405: "The path has no such method.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much is running or waiting: try again after Retry-After seconds.",
    500: "The server failed on this request.",
    503: "The server is starting, shutting down, or has failed: try again after Retry-After "
    "seconds.",
}
_OPEN_AT_0 = {"exclusiveMinimum": 0}
_BOUNDS: dict[str, Schema] = {
    "n": {"minimum": 1, "maximum": MAX_N},
    "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {**_OPEN_AT_0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {**_OPEN_AT_0, "maximum": 2},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
"""Of numbers in requests; `SamplingParams` checks them, where msgspec sees only the type."""

_KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


class OpenApi:
    """The endpoint."""

    def __init__(self, service: Service, auth: ApiKeys, version: str) -> None:
        self._service = service
        self._auth = auth
        self._version = version
        self._documents: dict[bool, Schema] = {}

    async def get(self, request: Request) -> Response:
        needs_key = self._auth.is_required  # keys come and go by a reload
        if needs_key not in self._documents:
            # It takes 40 ms: too long for the event loop, and for being made when nobody asks.
            self._documents[needs_key] = await asyncio.to_thread(
                make_document,
                self._service.served_model_names,
                version=self._version,
                needs_key=needs_key,
            )
        return json_response(self._documents[needs_key])


def make_document(model_names: Sequence[str], *, version: str, needs_key: bool) -> Schema:
    """The document.

    Args:
        model_names: what `model` may be.
        version: of the server.
        needs_key: whether the server asks for an API key.
    """
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        described = _operation(operation, model_names[0], needs_key=needs_key)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    components: Schema = {"schemas": _schemas(model_names)}
    if needs_key:
        components["securitySchemes"] = _KEY_SCHEMES
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": version},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in OPERATIONS)],
        "paths": paths,
        "components": components,
    }


# --- operations -----------------------------------------------------------------------------------


def _operation(operation: Operation, model: str, *, needs_key: bool) -> Schema:
    described: Schema = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation, needs_key=needs_key),
    }
    names = re.findall(r"{(\w+)}", operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if operation.body is not None:
        content = {"schema": _reference(operation.body)}
        if operation.example is not None:
            content["example"] = {"model": model, **operation.example}
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    if needs_key and not operation.is_open:
        described["security"] = [{name: []} for name in _KEY_SCHEMES]
    return described


def _operation_id(operation: Operation) -> str:
    words = re.findall(r"[a-z0-9]+", operation.path.removeprefix("/v1"))
    return "_".join((operation.method.lower(), *words))


def _responses(operation: Operation, *, needs_key: bool) -> Schema:
    responses: Schema = {}
    if operation.answer is not None or operation.media_type is not None:
        responses["200"] = _response(200, _content(operation))
    statuses = set(operation.errors)
    if needs_key and not operation.is_open:
        statuses.add(401)
    error = {JSON: {"schema": _reference(operation.error)}}
    responses |= {str(status): _response(status, error) for status in sorted(statuses)}
    if operation.unready is not None:
        responses["503"] = _response(503, {JSON: {"schema": _reference(operation.unready)}})
    return responses


def _content(operation: Operation) -> Schema:
    if operation.answer is None:
        assert operation.media_type is not None
        kind = "object" if operation.media_type == JSON else "string"
        return {operation.media_type: {"schema": {"type": kind}}}
    content = {JSON: {"schema": _reference(operation.answer)}}
    if operation.events is not None:
        data = {"type": "string", "description": operation.events}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content[EVENTS] = {"schema": event}
    return content


def _response(status: int, content: Schema) -> Schema:
    names = ["X-Request-Id"]
    if status in (429, 503):
        names.append("Retry-After")
    headers = {name: {"schema": {"type": "string"}} for name in names}
    return {"description": _STATUSES[status], "headers": headers, "content": content}


# --- schemas --------------------------------------------------------------------------------------


def _reference(struct: Struct) -> Schema:
    return {"$ref": _REFERENCE.format(name=struct.__name__)}


def _schemas(model_names: Sequence[str]) -> Schema:
    bodies = [each.body for each in OPERATIONS if each.body is not None]
    answers = [each.answer for each in OPERATIONS if each.answer is not None]
    structs = list(dict.fromkeys([*bodies, *answers, *(each.error for each in OPERATIONS)]))
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    for cls in _classes_in(msgspec.inspect.multi_type_info(structs)):
        _describe(schemas[cls.__name__], cls)
    for body in bodies:
        _narrow(schemas[body.__name__]["properties"], model_names)
    return dict(sorted(schemas.items()))


def _classes_in(types: Iterable[msgspec.inspect.Type]) -> set[type]:
    """The structs and dataclasses of `types` and of all their fields."""
    found: set[type] = set()
    waiting = list(types)
    while waiting:
        match waiting.pop():
            case msgspec.inspect.StructType(cls=cls, fields=fields) | (
                msgspec.inspect.DataclassType(cls=cls, fields=fields)
            ) if cls not in found:
                found.add(cls)
                waiting += [field.type for field in fields]
            case (
                msgspec.inspect.UnionType(types=inner) | msgspec.inspect.TupleType(item_types=inner)
            ):
                waiting += inner
            case (
                msgspec.inspect.ListType(item_type=item)
                | msgspec.inspect.VarTupleType(item_type=item)
            ):
                waiting.append(item)
            case msgspec.inspect.DictType(key_type=key, value_type=value):
                waiting += [key, value]
    return found


def _describe(schema: Schema, cls: type) -> None:
    """Add the docstrings of its fields; a field of sampling has its own in `SamplingParams`."""
    docs = field_docs(SamplingParams) | field_docs(cls)
    for name, field in schema["properties"].items():
        if name in docs:
            # Beside a reference OpenAPI 3.1 allows a description.
            field["description"] = docs[name]


def _narrow(properties: Schema, model_names: Sequence[str]) -> None:
    """Say of a body's fields what their types do not."""
    for name, bounds in _BOUNDS.items():
        for kind in _numbers_of(properties.get(name, {})):
            kind.update(bounds)
    for kind in _kinds_of(properties["model"]):
        if kind.get("type") == "string":
            kind["enum"] = list(model_names)


def _numbers_of(field: Schema) -> list[Schema]:
    return [kind for kind in _kinds_of(field) if kind.get("type") in ("integer", "number")]


def _kinds_of(field: Schema) -> list[Schema]:
    kinds: list[Schema] = field.get("anyOf", [field])
    return kinds
