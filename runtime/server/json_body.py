"""A request's JSON body: read within bounds, then a typed value or a 400 that says where and why.

A body is decoded in two passes: one that only finds its top-level fields, so that unknown and
unsupported ones can be told to the caller, and one straight into a msgspec struct. Neither makes
objects of what nobody asked for.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from furiosa_llm.server.errors import HttpError, body_too_large, invalid, unsupported_media_type
from furiosa_llm.server.mailbox import ClientLeftError

T = TypeVar("T", bound=msgspec.Struct)

_find_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_WHERE = re.compile(r" - at `(?:key in )?\$(.*)`$")
_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_TYPE = re.compile(r"\b(?:" + "|".join(_JSON_TYPES) + r")\b")
_MISSING = re.compile(r"missing required field `([^`]*)`")


class JsonBody:
    """A JSON object as it came.

    Raises: HttpError (400) if it is anything else.
    """

    def __init__(self, raw: bytes) -> None:
        if not raw.strip():
            raise invalid("the body is empty: send a JSON object")
        self._raw = raw
        try:
            self._fields = _find_fields(raw)
        except Exception as error:
            raise _decode_error(error) from None

    @property
    def names(self) -> set[str]:
        """Of the top-level fields. Where one comes twice, its last value counts."""
        return set(self._fields)

    def value(self, name: str) -> Any:
        """The value of one top-level field; None if it is not there."""
        raw = self._fields.get(name)
        try:
            return None if raw is None else msgspec.json.decode(raw)
        except Exception as error:
            raise _decode_error(error) from None

    def decode(self, decoder: msgspec.json.Decoder[T]) -> T:
        """The whole as the decoder's struct, other fields left out.

        Raises: HttpError (400) whose param says where it is wrong, such as messages[0].role.
        """
        try:
            return decoder.decode(self._raw)
        except Exception as error:
            raise _decode_error(error) from None


async def read_json(scope: Scope, receive: Receive, max_bytes: int) -> JsonBody:
    """The body of a request.

    Raises: HttpError (400, 413, 415); ClientLeftError if the client leaves before its end.
    """
    _check_content_type(scope)
    return JsonBody(await _read(scope, receive, max_bytes))


# --- reading --------------------------------------------------------------------------------------


def _check_content_type(scope: Scope) -> None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise unsupported_media_type("content-encoding", encoding.decode("latin-1"))
    given = headers.get(b"content-type")
    if given is None:
        return
    media_type, *parameters = (part.strip() for part in given.lower().split(b";"))
    is_json = media_type == b"application/json" or media_type.endswith(b"+json")
    charsets = [p[8:].strip(b'"') for p in parameters if p.startswith(b"charset=")]
    if not is_json or any(charset not in (b"utf-8", b"utf8") for charset in charsets):
        raise unsupported_media_type("content-type", given.decode("latin-1"))


async def _read(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > max_bytes:
        raise body_too_large(max_bytes)
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        pieces.append(message["body"])
        num_bytes += len(message["body"])
        if num_bytes > max_bytes:
            raise body_too_large(max_bytes)
        if not message["more_body"]:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# --- what is wrong with it ------------------------------------------------------------------------


def _decode_error(error: Exception) -> HttpError:
    match error:
        case RecursionError():
            return invalid("the body is nested too deeply")
        case UnicodeDecodeError():  # msgspec before 0.23
            return _not_utf8()
        case msgspec.ValidationError():
            return _wrong_value(str(error))
        case msgspec.DecodeError() if "UTF-8" in str(error):
            return _not_utf8()
        case msgspec.DecodeError():
            # It calls a lone surrogate truncated, for the other half is missing.
            reason = str(error).replace(
                "Input data was truncated", "it, or a \\u escape in it, ends early"
            )
            return invalid(f"the body is not valid JSON: {reason}")
    raise error


def _not_utf8() -> HttpError:
    return invalid("the body is not valid UTF-8")


def _wrong_value(message: str) -> HttpError:
    """msgspec's sentence with its place in front, as OpenAI writes places."""
    where = _WHERE.search(message)
    path = "" if where is None else where[1].lstrip(".")
    reason = _TYPE.sub(lambda match: _JSON_TYPES[match[0]], _WHERE.sub("", message))
    reason = reason.replace("`", "").replace("Expected", "expected").replace("Object", "object")
    missing = _MISSING.search(message)
    if missing is not None:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return invalid(f"{path}: it is required", path, code="missing_required_parameter")
    if not path:
        return invalid(f"the body: {reason}, send a JSON object")
    return invalid(f"{path}: {reason}", path, code="invalid_type")
