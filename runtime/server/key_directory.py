"""A directory of CURVE keys: a daemon's pair, and those of the clients that may connect.

    daemon.key_secret   the daemon's own: --curve-key-file
    daemon.key          its public half, for every client
    clients/NAME.key    the public half of a client's: --curve-clients-dir is `clients`
    NAME.key_secret     for that client alone

Only their owner can read the files, and none is ever overwritten.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zmq.auth.certs import create_certificates

from furiosa_llm.errors import InvalidRequestError

DAEMON = "daemon"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyDirectory:
    """Where the files are."""

    path: Path

    @property
    def daemon_secret(self) -> Path:
        return self.path / f"{DAEMON}.key_secret"

    @property
    def daemon_public(self) -> Path:
        return self.path / f"{DAEMON}.key"

    @property
    def clients(self) -> Path:
        return self.path / "clients"

    def client_secret(self, name: str) -> Path:
        return self.path / f"{name}.key_secret"

    def client_public(self, name: str) -> Path:
        return self.clients / f"{name}.key"

    def create(self, names: Sequence[str]) -> None:
        """Make a pair for each of these clients, and the daemon's if there is none yet.

        Raises: InvalidRequestError for a name that is none or has keys already, and then nothing
            was made; or if the files cannot be written.
        """
        for name in names:
            if not _NAME.fullmatch(name):
                raise InvalidRequestError(
                    f"{name!r} cannot be a client's name, which is part of file names: use at most "
                    f"64 letters, digits, '.', '_' and '-', the first of them a letter or digit"
                )
            if name == DAEMON or names.count(name) > 1:
                raise InvalidRequestError(f"the name {name!r} is taken: use another")
            for file in (self.client_secret(name), self.client_public(name)):
                if file.exists():
                    raise InvalidRequestError(
                        f"{file} is there already, and may be in use: use another name than "
                        f"{name!r}, or delete both of its files first"
                    )
        try:
            self.clients.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.daemon_secret.exists():
                self._create(DAEMON, self.daemon_public, self.daemon_secret)
            for name in names:
                self._create(name, self.client_public(name), self.client_secret(name))
        except OSError as error:
            raise InvalidRequestError(
                f"keys cannot be written to {self.path}: {error.strerror}"
            ) from None

    def _create(self, name: str, public: Path, secret: Path) -> None:
        # In a directory that nobody else can enter, and linked from there: a secret is never
        # readable by others, not even for a moment, and nothing is overwritten.
        with tempfile.TemporaryDirectory(dir=self.path) as private:
            pair = create_certificates(private, name)
            for made, file in zip(pair, (public, secret), strict=True):
                os.chmod(made, 0o600)
                os.link(made, file)
