"""Where readings come from: a daemon of this user by its name, or any server of ours over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any, Protocol

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.loadgen.http_url import HttpUrl
from furiosa_llm.run_dir import RunDir
from furiosa_llm.server.control_client import ControlClient
from furiosa_llm.top.metrics_text import Metrics, read_histograms
from furiosa_llm.top.reading import Reading, reading_of

TIMEOUT_S = 5.0
MAX_BODY_BYTES = 16 << 20


class Source(Protocol):
    """A server to be looked at."""

    def read(self) -> Reading:
        """Raises: FuriosaLLMError if it cannot be reached now."""


class HttpSource:
    """A server's `/v1/status` and `/metrics`."""

    def __init__(self, url: HttpUrl, api_key: str | None = None) -> None:
        self._url = url
        self._get = HttpGetter(url, api_key)

    def read(self) -> Reading:
        status = self._get("/v1/status")
        try:
            said = json.loads(status)
        except ValueError:
            said = None
        if not isinstance(said, dict) or "state" not in said:
            raise FuriosaLLMError(f"{self._url}/v1/status is no status: is it a server of ours?")
        metrics = read_histograms(self._get("/metrics").decode(errors="replace"))
        return reading_of(said, at_s=time.monotonic(), where=str(self._url), metrics=metrics)


class DaemonSource:
    """A daemon of this user.

    Its control socket answers without a key, whatever the HTTP side requires; latencies are shown
    where its /metrics answers without one too, or with the key given.
    """

    def __init__(self, name: str, api_key: str | None = None) -> None:
        self._run_dir = RunDir.find(name)
        self._name, self._api_key = name, api_key

    def read(self) -> Reading:
        with ControlClient(self._run_dir.control, "status") as control:
            said = control.receive(TIMEOUT_S)
        http = str(said.get("http", ""))
        where = f"{self._name} at {http}" if http else self._name
        return reading_of(said, at_s=time.monotonic(), where=where, metrics=self._metrics(http))

    def _metrics(self, http: str) -> Metrics | None:
        try:
            if http.startswith("unix:"):
                get = HttpGetter(http.removeprefix("unix:"), self._api_key)
            else:
                get = HttpGetter(HttpUrl.parse("http", http), self._api_key)
            return read_histograms(get("/metrics").decode(errors="replace"))
        except FuriosaLLMError:
            return None  # it wants a key, or a certificate that is not known here


class HttpGetter:
    """GETs of one server, each over a connection of its own.

    Args:
        where: a URL, or the path of a Unix socket.
    """

    def __init__(self, where: HttpUrl | str, api_key: str | None) -> None:
        self._where = where
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def __call__(self, path: str) -> bytes:
        """The body. Raises: FuriosaLLMError if there is none."""
        prefix = "" if isinstance(self._where, str) else self._where.prefix
        connection = self._connection()
        try:
            connection.request("GET", prefix + path, headers=self._headers)
            answer = connection.getresponse()
            body = answer.read(MAX_BODY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise FuriosaLLMError(f"{self._where} cannot be reached: {error}") from None
        finally:
            connection.close()
        if answer.status != 200:
            hint = ": give the key with --api-key-file" if answer.status == 401 else ""
            raise FuriosaLLMError(f"{self._where}{path} answers {answer.status}{hint}")
        return body

    def _connection(self) -> http.client.HTTPConnection:
        url = self._where
        if isinstance(url, str):
            return _UnixConnection(url)
        kind: Any = http.client.HTTPSConnection if url.is_tls else http.client.HTTPConnection
        connection: http.client.HTTPConnection = kind(url.host, url.port, timeout=TIMEOUT_S)
        return connection


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)
