"""API keys: from a file or the environment, compared in constant time, reloaded on demand."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from starlette.types import Scope

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.server.errors import HttpError, unauthorized

KEY_VARIABLES = ("FURIOSA_SERVE_API_KEY", "FURIOSA_SERVE_API_KEYS")
"""One key, and several with commas between them."""

OPEN_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/docs"})
"""Probes: whoever restarts a server has no key, and they tell nothing of use to anybody else. The
page that shows the API, as browsers send no key for a page: it is the same on every server."""

MAX_KEYS = 10_000


class ApiKeys:
    """The keys that callers must show; with none, everybody may call.

    Args:
        file: one key a line; empty lines and lines that begin with # are skipped.
        environ: where `KEY_VARIABLES` are looked up.
    Raises: InvalidRequestError if the file cannot be read or holds no key: an operator who names
        a file wants keys.
    """

    def __init__(
        self, file: str | Path | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._file = None if file is None else Path(file)
        self._environ = environ
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    @property
    def is_required(self) -> bool:
        return bool(self._digests)

    def reload(self) -> None:
        """Read the keys again; when that fails the old ones stay in force."""
        keys = [self._environ.get(KEY_VARIABLES[0], "")]
        keys += self._environ.get(KEY_VARIABLES[1], "").split(",")
        if self._file is not None:
            keys += _keys_in(self._file)
        # Digests have one length, so that the comparison's time tells nothing about a key's.
        digests = tuple(dict.fromkeys(_digest(key.strip()) for key in keys if key.strip()))
        if len(digests) > MAX_KEYS:
            raise InvalidRequestError(
                f"{len(digests)} API keys are more than {MAX_KEYS}", param="api_key_file"
            )
        self._digests = digests

    def check(self, scope: Scope) -> None:
        """Raises: HttpError (401) unless the request shows a key, or needs none."""
        if self._digests and scope["path"] not in OPEN_PATHS:
            error = self._refusal(_shown_key(scope))
            if error is not None:
                raise error

    def _refusal(self, key: str | None) -> HttpError | None:
        if key is None:
            return unauthorized(
                "no API key was given: send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        digest = _digest(key)
        is_known = False
        for known in self._digests:  # all of them, whichever it is
            is_known |= hmac.compare_digest(digest, known)
        return None if is_known else unauthorized("the API key is not known here")


def _keys_in(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"the API key file {file} cannot be read: {error}", param="api_key_file"
        ) from error
    keys = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequestError(
            f"the API key file {file} holds no key: write one a line", param="api_key_file"
        )
    return keys


def _shown_key(scope: Scope) -> str | None:
    headers = dict(scope["headers"])
    bearer: bytes = headers.get(b"authorization", b"")
    if bearer[:7].lower() == b"bearer ":
        return bearer[7:].strip().decode("latin-1")
    key: bytes | None = headers.get(b"x-api-key")
    return None if key is None else key.strip().decode("latin-1")


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
