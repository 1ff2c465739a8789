"""An OpenAI-compatible server over HTTP: ours, llama.cpp's, vLLM's, …"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from furiosa_llm.loadgen.http_connection import HttpConnection, request_bytes
from furiosa_llm.loadgen.http_url import HttpUrl
from furiosa_llm.loadgen.record import Record, clock
from furiosa_llm.loadgen.target import Prompt, TargetError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequests:
    """What all requests of a run have in common."""

    endpoint: str  # a key of PATHS
    model: str
    max_tokens: int
    ignore_eos: bool = True
    stream: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of the body

    def body(self, prompt: Prompt) -> bytes:
        if self.endpoint == "chat":
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": prompt}
        body = {
            "model": self.model,
            **asked,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": self.stream,
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:  # no field of OpenAI's; ours, vLLM, SGLang and llama.cpp know it
            body["ignore_eos"] = True
        return json.dumps(body | dict(self.extra), separators=(",", ":")).encode()


class HttpTarget:
    """Sends requests over connections of its own.

    Args:
        headers: further ones, such as an API key.
        keep_alive: False for a fresh connection per request. That is the fair way to compare
            servers of which one closes the connection after each stream.
        timeout_s: for one request as a whole, its connecting included.
    """

    def __init__(
        self,
        url: HttpUrl,
        requests: HttpRequests,
        *,
        headers: Mapping[str, str] | None = None,
        keep_alive: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self._url, self._requests = url, requests
        self._ssl = url.ssl_context()
        self._headers = dict(headers or {})
        if not keep_alive:
            self._headers["Connection"] = "close"
        self._keep_alive, self._timeout_s = keep_alive, timeout_s
        self._idle: list[HttpConnection] = []
        self._path = url.prefix + PATHS[requests.endpoint]

    async def send(self, prompt: Prompt, record: Record) -> None:
        message = request_bytes(
            "POST",
            self._path,
            self._requests.body(prompt),
            authority=self._url.authority,
            headers=self._headers,
        )
        record.sent_s = clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(message, record)
        except TimeoutError:
            record.fail("timeout", f"no whole answer within {self._timeout_s:g} s")
        except OSError as error:
            record.fail("connect", str(error))
        record.end_s = record.end_s or clock()

    async def _exchange(self, message: bytes, record: Record) -> None:
        """Send over an idle connection, if there is one, or else a new one.

        An idle connection may be closed by the server in the moment in which it is used, which is
        nobody's fault: when nothing of an answer has come, the request goes out again, once.
        """
        connection = self._reusable()
        if connection is not None:
            await self._on(connection, message, record)
            if record.error != "connection lost" or connection.has_answer_begun:
                return
            record.error, record.detail, record.end_s = None, "", 0.0
        await self._on(await self._connect(), message, record)

    async def _on(self, connection: HttpConnection, message: bytes, record: Record) -> None:
        try:
            await connection.request(message, record)
        except asyncio.CancelledError:
            connection.abort()
            raise
        if not self._keep_alive:
            connection.close()
        elif connection.is_open:
            self._idle.append(connection)

    def _reusable(self) -> HttpConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            HttpConnection, self._url.host, self._url.port, ssl=self._ssl
        )
        return connection

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


async def first_model(url: HttpUrl, headers: Mapping[str, str], *, timeout_s: float = 30.0) -> str:
    """The name of the first model that the server lists.

    Raises: TargetError if the server cannot be reached or lists none.
    """
    loop = asyncio.get_running_loop()
    record = Record(due_s=clock())
    message = request_bytes(
        "GET", url.prefix + "/v1/models", b"", authority=url.authority, headers=headers
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_connection(
                HttpConnection, url.host, url.port, ssl=url.ssl_context()
            )
            await connection.request(message, record)
    except TimeoutError:
        raise TargetError(f"{url} does not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise TargetError(f"{url} cannot be reached: {error}") from None
    connection.close()
    if record.error is not None:
        raise TargetError(f"{url}/v1/models: {record.error}: {record.detail}")
    try:
        return str(json.loads(connection.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise TargetError(f"{url}/v1/models lists no model: name one with --model") from None
