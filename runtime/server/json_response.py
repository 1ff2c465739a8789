"""JSON answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Send

_encode = msgspec.json.Encoder().encode


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`content` (dicts, lists, msgspec structs, …) as the whole answer, for Starlette."""
    return Response(_encode(content), status, headers, "application/json")


async def send_json(
    content: object,
    send: Send,
    headers: Iterable[tuple[bytes, bytes]] = (),
    status: int = 200,
    *,
    is_last: bool = True,
) -> None:
    """The same over plain ASGI; `content` may be JSON already, as bytes.

    Args:
        is_last: False: the response is not ended by it.
    """
    body = content if isinstance(content, bytes) else _encode(content)
    fixed = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
