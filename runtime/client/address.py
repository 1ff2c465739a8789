"""Where a daemon is: by its name, by the path of its socket, or on another machine with keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.checks import shown
from furiosa_llm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The keys of a tcp:// connection.

    Attributes:
        server_key: the daemon's public key file, or the key itself, 40 characters of Z85.
        key_file: the client's own .key_secret file, whose public key the daemon must know.
    """

    server_key: str | Path
    key_file: str | Path

    def load(self) -> tuple[bytes, bytes, bytes]:
        """(the daemon's public key, our public key, our secret key), in Z85.

        Raises: InvalidRequestError naming the file that cannot be read, or that holds no such key.
        """
        server_key = str(self.server_key)
        if len(server_key) == 40 and not Path(server_key).exists():
            server_public = server_key.encode()
        else:
            server_public, _ = _load(self.server_key, "server_key")
        public, secret = _load(self.key_file, "key_file")
        if secret is None:
            raise InvalidRequestError(
                f"key_file: {self.key_file} holds no secret key: give the .key_secret file",
                param="key_file",
            )
        return server_public, public, secret


def _load(path: str | Path, param: str) -> tuple[bytes, bytes | None]:
    from zmq.auth.certs import load_certificate

    try:
        return load_certificate(str(path))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{param}: {path} cannot be read: {error}", param=param) from None


def endpoint_of(address: str, *, has_keys: bool) -> str:
    """The ZeroMQ endpoint of `address`: a daemon's name, ipc://PATH or tcp://HOST:PORT.

    Raises: FuriosaLLMError if no daemon of that name runs; InvalidRequestError for anything else,
        and for tcp:// without keys.
    """
    if not isinstance(address, str) or not address:
        raise InvalidRequestError(
            f"address: {shown(address)} is not a daemon's name, ipc://PATH or tcp://HOST:PORT",
            param="address",
        )
    scheme, separator, rest = address.partition("://")
    if not separator:
        from furiosa_llm.run_dir import RunDir

        return f"ipc://{RunDir.find(address).socket}"
    if scheme not in ("ipc", "tcp") or not rest:
        raise InvalidRequestError(
            f"address: {shown(address)} is neither a daemon's name nor ipc://PATH nor "
            f"tcp://HOST:PORT",
            param="address",
        )
    if scheme == "tcp" and not has_keys:
        raise InvalidRequestError(
            f"address: {shown(address)} can be reached only with keys: pass curve=CurveKeys(...)",
            param="address",
        )
    return address
