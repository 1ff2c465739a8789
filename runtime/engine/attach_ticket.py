"""What another process needs to share an engine's workers. Travels as JSON, never as a pickle."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

from furiosa_llm.checks import shown
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.wire.codec import decode_configure, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import MAX_FRONT_ENDS, Configure

_VERSION = 1


@dataclass(frozen=True, slots=True)
class AttachTicket:
    """Lets one process at a time be a further front-end: `AsyncLLMEngine.attach(ticket)`.

    It is good for as long as the engine that gave it runs. Whoever can read it and open its
    endpoint can use the workers: both are for this user alone.
    """

    front_end: int
    """Index of the front-end, from 1."""
    endpoint: str
    """Where the workers connect to it."""
    owner_pid: int
    """The process whose end is the workers' end."""
    tokenizer_dir: str
    tokenizer_mode: str
    seed: int | None
    max_waiting: int
    workers: tuple[Configure, ...]
    devices: tuple[str, ...]

    def to_json(self) -> str:
        """For a pipe, a file that only this user can read, or the environment of a child."""
        plain = {name: getattr(self, name) for name in _KINDS}
        workers = [b64encode(encode(configure)).decode() for configure in self.workers]
        return json.dumps({"version": _VERSION, **plain, "workers": workers})

    @classmethod
    def from_json(cls, text: str) -> AttachTicket:
        """What `to_json` wrote. Raises: InvalidRequestError for anything else."""
        try:
            return cls._of(json.loads(text))
        except (ValueError, TypeError, WireError, RecursionError) as error:
            raise InvalidRequestError(f"{shown(text)} is not an attach ticket: {error}") from None

    @classmethod
    def _of(cls, plain: Any) -> AttachTicket:
        if not isinstance(plain, dict) or plain.keys() != {"version", "workers", *_KINDS}:
            raise ValueError("it has other fields")
        if plain["version"] != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
        for name, kinds in _KINDS.items():
            if type(plain[name]) not in kinds:
                raise ValueError(f"its {name} is {shown(plain[name])}")
        if not 1 <= plain["front_end"] < MAX_FRONT_ENDS:
            raise ValueError(f"its front_end is not from 1 to {MAX_FRONT_ENDS - 1}")
        workers = tuple(decode_configure(b64decode(each)) for each in plain["workers"])
        devices = tuple(map(str, plain["devices"]))
        if not workers or len(workers) != len(devices):
            raise ValueError("it names no workers, or not all their devices")
        fields = {name: plain[name] for name in _KINDS}
        return cls(**(fields | {"workers": workers, "devices": devices}))


_KINDS: dict[str, tuple[type, ...]] = {
    "front_end": (int,),
    "endpoint": (str,),
    "owner_pid": (int,),
    "tokenizer_dir": (str,),
    "tokenizer_mode": (str,),
    "seed": (int, type(None)),
    "max_waiting": (int,),
    "devices": (list, tuple),
}
"""The fields that JSON carries as they are, and the types that each may have."""
