"""The id that a request carries through responses, logs and errors: the client's own, or ours."""

from __future__ import annotations

import re
from random import Random

from starlette.types import Scope

_KEY = "furiosa.request_id"
_random = Random()
"""An id is no secret. `secrets` would ask the system, and so give the interpreter lock away to the
engine's thread, and wait for it, at every request."""

_VALID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def assign_request_id(scope: Scope) -> str:
    """Choose the request's id, once: `X-Request-Id` if it is harmless, else a new one.

    An id may end up in logs and in headers, so one that holds more than 128 letters, digits and
    ._:- is replaced and not repaired.
    """
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    request_id = given.decode() if _VALID.fullmatch(given) else f"{_random.getrandbits(128):032x}"
    scope[_KEY] = request_id
    return request_id


def request_id_of(scope: Scope) -> str:
    """The id that `assign_request_id` chose."""
    request_id: str = scope[_KEY]
    return request_id
